"""Methods compared by a process that is killed on its way, and what it leaves."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from tests.cli.command import Started
from tests.cli.conftest import Shop, must

WORDS = ("train.epochs=2", "train.precision=fp32", "data.limit=200", "data.test_limit=100", "train.batch_size=32")
ROWS = ["avg-kd", "supervised", "supervised-equal-compute"]


def compare(shop: Shop, folder: Path, *words: object) -> Started:
    teachers = (shop.folder / "a" / "model.pt", shop.folder / "b" / "model.pt")
    words = ("--teachers", *teachers, "--student", "resnet8", "--init", "random", *words, f"cache.dir={folder}/cache")
    return shop.warm.start("compare", *words, *WORDS, folder=folder)


def weights(run: Path) -> str:
    return hashlib.sha256((run / "student" / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def finished(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A comparison that was killed in its second training and resumed, and what was said then."""
    folder = tmp_path_factory.mktemp("compare")
    process = compare(shop, folder, "--seeds", "2", "--out", "cmp")
    second = folder / "cmp" / "supervised" / "seed-0" / "log.jsonl"
    process.until(lambda: second.exists() and '"event": "epoch", "epoch": 1' in second.read_text(encoding="utf-8"))
    process.signal(signal.SIGKILL)
    assert process.finish().code == -signal.SIGKILL
    assert not (folder / "cmp" / "compare.json").exists()
    first = folder / "cmp" / "avg-kd" / "seed-0" / "log.jsonl"
    written = first.stat().st_mtime_ns
    said = must(compare(shop, folder, "--resume", "--out", "cmp", "--seeds", "2").finish())
    assert first.stat().st_mtime_ns == written, "what was finished is left alone"
    return folder, said


@pytest.mark.parametrize("place", ["data: digits", "compare: 3 methods", "training 1 of 6", "accuracy of 6 students"])
def test_ctrl_c_between_two_trainings_says_how_to_go_on(
    shop: Shop, finished: tuple[Path, str], tmp_path: Path, place: str
) -> None:
    if place.startswith(("accuracy", "data")):  # of a comparison that is resumed
        shutil.copytree(finished[0] / "cmp", tmp_path / "cmp")
        for file in tmp_path.rglob("judged.json"):
            file.unlink()
        process = shop.warm.start("compare", "--resume", "--out", "cmp", folder=tmp_path)
    else:
        process = compare(shop, tmp_path, "--seeds", "2", "--out", "cmp")
    process.until(lambda: place in process.out.read_text(encoding="utf-8"))
    process.signal(signal.SIGINT)
    done = process.finish()
    assert done.code == 1
    first, second = done.error.splitlines()
    assert first.startswith("error: stopped by SIGINT")
    assert "run the same command with --resume to go on" in second
    assert "Traceback" not in done.err


def read(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "cmp" / "compare.json").read_text(encoding="utf-8"))
    return document


def test_the_rest_is_done(finished: tuple[Path, str]) -> None:
    _, said = finished
    trainings = [line for line in said.splitlines() if line.startswith("training ")]
    begun = 6 - len(trainings)
    assert begun in (1, 2), "the second one may have got to its end before it was killed"
    expected = [f"{row} seed {seed}" for seed in (0, 1) for row in ROWS]
    assert [line.split(" · ")[1] for line in trainings] == expected[begun:]
    assert all(line.startswith(f"training {n} of 6") for n, line in enumerate(trainings, start=begun + 1))
    assert " left" in trainings[0]
    assert "no teacher is asked" in said


def test_the_table_follows_from_the_runs(finished: tuple[Path, str]) -> None:
    folder, said = finished
    document = read(folder)
    assert [method["name"] for method in document["methods"]] == ROWS
    top1 = {method["name"]: [run["top1"] for run in method["runs"]] for method in document["methods"]}
    for method in document["methods"]:
        assert [run["seed"] for run in method["runs"]] == [0, 1]
        assert method["mean"] == pytest.approx(sum(top1[method["name"]]) / 2)
        assert method["n"] == 2
        assert all(run["peak_memory_mb"] > 50 and run["images_per_s"] > 1 for run in method["runs"])
    found = document["methods"][1]["difference"]
    pairs = top1["supervised"], top1["avg-kd"]
    if found["sd"] > 0.0101:  # one of the 100 test images at least
        assert found["p"] == pytest.approx(stats.ttest_rel(*pairs).pvalue)
    assert found["mean"] == pytest.approx(sum(pairs[0]) / 2 - sum(pairs[1]) / 2)
    assert found["low"] <= found["mean"] <= found["high"]
    assert document["methods"][0]["difference"] is None
    assert document["data"]["images"] == 100
    assert "avg-kd" in said
    markdown = (folder / "cmp" / "compare.md").read_text(encoding="utf-8")
    assert "| supervised-equal-compute |" in markdown
    epochs = {method["name"]: method["recipe"]["train"]["epochs"] for method in document["methods"]}
    assert epochs["avg-kd"] == epochs["supervised"] == 2 < epochs["supervised-equal-compute"]


def test_every_training_is_an_ordinary_run(shop: Shop, finished: tuple[Path, str]) -> None:
    folder, _ = finished
    run = folder / "cmp" / "supervised" / "seed-0"
    must(shop.warm.run("distill", "--recipe", run / "recipe.yaml", "--out", "again", folder=folder))
    assert weights(folder / "again") == weights(run), "though it was killed on its way"
    top1 = read(folder)["methods"][1]["runs"][0]["top1"]
    must(shop.warm.run("report", run, "--restarts", "1", "--batch-sizes", "1", folder=folder))
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row["accuracy"]["top1"] for row in report["rows"]}
    assert rows["student"] == top1
    assert report["comparison"] == read(folder)
    assert "## Comparison" in (run / "report.md").read_text(encoding="utf-8")


def test_a_comparison_is_shown_and_goes_on_with_more_seeds(shop: Shop, finished: tuple[Path, str]) -> None:
    folder, _ = finished
    assert "not decided" in must(shop.warm.run("report", "cmp", folder=folder))
    for words, said in (
        (("--seeds", "2", "--methods", "ca-mkd"), "other methods"),
        (("train.epochs=3",), "other overrides"),
    ):
        done = shop.warm.run("compare", "--resume", "--out", "cmp", *words, folder=folder)
        assert (done.code, said in done.error) == (2, True), done.err
    before = read(folder)
    must(shop.warm.run("compare", "--resume", "--out", "cmp", "--seeds", "3", folder=folder))
    after = read(folder)
    assert [method["n"] for method in after["methods"]] == [3, 3, 3]
    assert after["methods"][0]["runs"][:2] == before["methods"][0]["runs"]
    done = shop.warm.run("compare", "--resume", "--out", "cmp", "--seeds", "2", folder=folder)
    assert (done.code, "has 3 seeds" in done.error) == (2, True), done.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--methods", "no-such-kd"), "no-such-kd"),
        (("--methods", "avg-kd:temprature=2"), "temprature"),
        (("--seeds", "1"), "--seeds"),
        (("--resume", "--out", "nowhere"), "is no comparison"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    shop: Shop, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    done = compare(shop, tmp_path, *words).finish()
    assert done.code == 2
    assert said in done.error
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_as_many_settings_are_tried_for_each(shop: Shop, tmp_path: Path) -> None:
    words = ("--methods", "avg-kd:temperature=2", "amtml-kd", "--seeds", "2", "--trials", "3", "--out", "cmp")
    said = must(compare(shop, tmp_path, *words).finish())
    assert said.count("is best on val") == 4
    methods = read(tmp_path)["methods"]
    for method in methods:
        trials = method["trials"]
        assert len(trials) == (0 if method["name"] == ROWS[2] else 3)
        assert all(trial["seeds"] == [1000, 1001] for trial in trials)
        if trials:
            best = max(trials, key=lambda trial: sum(trial["scores"]))
            assert method["setting"] == best["setting"]
            assert sum(best["scores"]) > 0
    assert methods[2]["setting"] == methods[1]["setting"]
