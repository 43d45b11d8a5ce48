"""The main job as its user walks it: train, distill, export, quantize, report, evaluate, inspect."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.command import Warm, run_cold
from tests.cli.conftest import SHORT, Shop, must, write_images


@pytest.fixture(scope="module")
def deployed(shop: Shop) -> Path:
    """The student's run with everything made of it."""
    run = shop.folder / "deployed"
    shutil.copytree(shop.folder / "run", run)
    assert "deployed/onnx-fp32" in shop.must("export", "deployed")
    assert "deployed/onnx-int8-" in shop.must("quantize", "deployed", "--int8", "--for", "auto", "--restarts", "0")
    said = shop.must("report", "deployed", "--batch-sizes", "1,3", "--restarts", "1")
    assert "deployed/report.json" in said
    return run


def evaluate(shop: Shop, *words: object) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(shop.must("evaluate", *words, "--json"))
    return answer


def test_several_teachers_after_one_flag_and_settings_after_them(shop: Shop) -> None:
    recipe = yaml.safe_load((shop.folder / "run" / "recipe.yaml").read_text(encoding="utf-8"))
    assert [Path(teacher["path"]) for teacher in recipe["teachers"]] == [shop.folder / n / "model.pt" for n in "ab"]
    assert (recipe["seed"], recipe["train"]["epochs"], recipe["data"]["limit"]) == (3, 2, 200)
    assert recipe["data"]["source"] == "digits", "what the teachers were trained on"
    assert recipe["train"]["lr"] > 0, "resolved"
    assert "teacher 1 (resnet8)" in shop.said
    assert "teacher 2 (dscnn)" in shop.said
    assert "run: run" in shop.said


def test_a_run_folder_holds_what_it_promises(shop: Shop) -> None:
    run = shop.folder / "run"
    assert {"recipe.yaml", "run.json", "log.jsonl", "last.pt", "student"} == {path.name for path in run.iterdir()}
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["epoch"] for line in lines if line["event"] == "epoch"] == [1, 2]


def test_the_resolved_recipe_repeats_the_run(shop: Shop, tmp_path: Path) -> None:
    must(shop.warm.run("distill", "--recipe", shop.folder / "run" / "recipe.yaml", "--out", "again", folder=tmp_path))
    again, first = (folder / "student" / "model.safetensors" for folder in (tmp_path / "again", shop.folder / "run"))
    assert again.read_bytes() == first.read_bytes()


def test_what_was_made_answers_as_the_report_says(shop: Shop, deployed: Path) -> None:
    report = json.loads((deployed / "report.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in report["rows"]}
    bundles = [name for name, row in rows.items() if row["kind"] in ("student", "bundle")]
    assert bundles[:2] == ["student", "onnx-fp32"]
    assert bundles[2].startswith("onnx-int8-")
    assert len(bundles) == 3
    for name in bundles:
        answer = evaluate(shop, deployed / name, "--data", "digits")
        assert (answer["top1"], answer["n"]) == (rows[name]["accuracy"]["top1"], 360)
        assert [latency["batch_size"] for latency in rows[name]["latency"]] == [1, 3]
    assert rows["student"]["accuracy"] == rows["onnx-fp32"]["accuracy"] | {"nll": rows["student"]["accuracy"]["nll"]}
    assert rows[bundles[2]]["size_mb"] < rows["onnx-fp32"]["size_mb"] / 2
    for name, teacher in (("teacher 1 (resnet8)", "a/model.pt"), ("teacher 2 (dscnn)", "b/model.pt")):
        assert evaluate(shop, teacher, "--data", "digits")["top1"] == rows[name]["accuracy"]["top1"]
    assert report["reference"] == "ensemble"
    assert report["teachers_saw_val"] is False, "val is carved alike, so the digests say no"
    assert evaluate(shop, deployed, "--data", "digits")["top1"] == rows["student"]["accuracy"]["top1"], (
        "RUN is its student"
    )


def test_inspect_tells_of_every_format(shop: Shop, deployed: Path) -> None:
    teacher = json.loads(shop.must("inspect", "a/model.pt", "--json"))
    assert (teacher["arch"], teacher["num_classes"], teacher["training_images"]) == ("resnet8", 10, 200)
    for name, kind in (("student", "torch"), ("onnx-fp32", "onnx")):
        bundle = json.loads(shop.must("inspect", deployed / name, "--json"))
        assert (bundle["kind"], bundle["arch"], len(bundle["classes"])) == (kind, "resnet8", 10)
        assert bundle["provenance"][0]["step"] == "distill"
    assert "resnet8" in shop.must("inspect", "run")


def test_out_is_written_and_nothing_beside_it(shop: Shop, tmp_path: Path) -> None:
    must(shop.warm.run("quantize", shop.folder / "run", "--restarts", "0", "--out", "here/ü [b]", folder=tmp_path))
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["ü [b]"]
    assert not list((shop.folder / "run").glob("onnx-*"))


def test_the_newest_run_is_taken_and_named(warm: Warm, tmp_path: Path) -> None:
    for seed in (0, 1):
        words = ("train", "--arch", "resnet8", "--data", "digits", f"seed={seed}", "train.epochs=1", "data.limit=30")
        must(warm.run(*words, folder=tmp_path))
    first, second = sorted((tmp_path / "runs").iterdir(), key=lambda run: (run / "recipe.yaml").stat().st_mtime_ns)
    said = must(warm.run("export", folder=tmp_path))
    assert f"run: runs/{second.name} (the newest)" in said
    assert (second / "onnx-fp32").is_dir()
    assert not (first / "onnx-fp32").exists()
    assert f"runs/{second.name} is finished" in must(warm.run("train", "--resume", folder=tmp_path))


def test_paths_with_spaces_umlauts_and_brackets(warm: Warm, tmp_path: Path) -> None:
    write_images(tmp_path / "meine Bilder [ü]")
    words = ("--arch", "resnet8", "--data", "meine Bilder [ü]", "--out", "Läufe/[bold] 1", "train.epochs=1")
    assert "run: Läufe/[bold] 1" in must(warm.run("train", *words, folder=tmp_path))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    must(warm.run("distill", "--recipe", "../Läufe/[bold] 1/recipe.yaml", "--out", "x", folder=elsewhere))
    assert (elsewhere / "x" / "student").is_dir(), "a recipe names its data whatever folder it is used in"


def test_a_cold_start_without_a_warning(tmp_path: Path) -> None:
    words = ("train", "--arch", "resnet8", "--data", "digits", "--out", "run", "train.epochs=1", *SHORT)
    done = run_cold(*words, folder=tmp_path)
    assert done.code == 0, done.err
    assert "warning" not in done.err.lower()


def test_a_student_at_chance_is_told_of(shop: Shop, tmp_path: Path) -> None:
    """It ends as any other, but nobody ships it unawares."""
    words = ("train", "--arch", "resnet8", "--data", "digits", "--out", tmp_path / "dull", "train.epochs=1")
    said = shop.must(*words, "train.lr=1e-9", "data.limit=200")
    assert re.search(r"warning: [\d.]+% of \d+ val images is no better than chance among 10 classes", said)
    assert "no better than chance" not in shop.said
