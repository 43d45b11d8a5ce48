"""Distilling from what the teachers said before, and looking after what is stored, as processes."""

from __future__ import annotations

import hashlib
import json
import signal
from pathlib import Path

import pytest

from tests.cli.command import Started, run_cold
from tests.cli.conftest import Shop, must

EPOCHS = 8
VIEWS = 3
WORDS = ("data.limit=300", "train.batch_size=32", f"train.epochs={EPOCHS}", "seed=5", f"cache.views={VIEWS}")
HOLDS_TEACHERS = '''"""AMTML-KD that says how many teachers are in memory."""
import gc

from kdcompress.methods.amtml_kd import AMTMLKD


class Counting(AMTMLKD):
    def forward(self, step):
        if step.progress == 0:
            print("teachers in memory:", sum(type(one).__name__ == "Teacher" for one in gc.get_objects()))
        return super().forward(step)
'''


def distill(shop: Shop, folder: Path, *words: object, cache: Path) -> Started:
    teachers = (shop.folder / "a" / "model.pt", shop.folder / "b" / "model.pt")
    cached = ("cache.enabled=true", f"cache.dir={cache}")
    hints = ("method.hint_share=0.1", *cached)  # feature maps are most of a cache
    words = ("--teachers", *teachers, "--student", "resnet8", "--init", "random", *words, *WORDS, *hints)
    return shop.warm.start("distill", *words, folder=folder)


def weights(run: Path) -> str:
    return hashlib.sha256((run / "student" / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def filled(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A folder with a filled cache and a run, what was said, and the student's weights."""
    folder = tmp_path_factory.mktemp("filled")
    said = must(distill(shop, folder, "--out", "run", cache=folder / "cache").finish())
    return folder, said, weights(folder / "run")


def names(shop: Shop, folder: Path) -> list[str]:
    lines = must(shop.warm.run("cache", "ls", "--dir", "cache", folder=folder)).splitlines()
    return [line.split()[0] for line in lines[:-1]]


def test_size_and_time_are_told_before_it_is_filled_and_a_second_run_asks_nobody(
    shop: Shop, filled: tuple[Path, str, str]
) -> None:
    folder, said, expected = filled
    lines = [line for line in said.splitlines() if line.startswith("teacher cache")]
    assert lines[0].startswith(f"teacher cache: {VIEWS} views of 300 training images · ")
    assert " GB · about " in lines[0]
    assert lines[1].startswith("teacher cache: 1 view of 357 held-out images · ")
    assert all(line.startswith("teacher cache: filled in ") for line in lines[2:])
    assert len(lines) == 4
    again = must(distill(shop, folder, "--out", "again", cache=folder / "cache").finish())
    assert again.count("complete, no teacher is asked") == 2
    assert "filled in" not in again
    assert weights(folder / "again") == expected
    provenance = json.loads((folder / "again" / "student" / "bundle.json").read_text())["provenance"]
    assert provenance[0]["cache"] == {"views": VIEWS, "top_k": None}


def test_no_teacher_is_in_memory_while_a_student_learns_from_the_cache(
    shop: Shop, filled: tuple[Path, str, str], tmp_path: Path
) -> None:
    (tmp_path / "counting.py").write_text(HOLDS_TEACHERS)
    teachers = (shop.folder / "a" / "model.pt", shop.folder / "b" / "model.pt")
    for enabled, count in (("true", 0), ("false", 2)):
        cache = (f"cache.enabled={enabled}", f"cache.dir={filled[0] / 'cache'}")
        words = ("--student", "resnet8", "--init", "random", "--method", "counting:Counting", "--out", enabled)
        done = run_cold("distill", "--teachers", *teachers, *words, *WORDS, *cache, "train.epochs=3", folder=tmp_path)
        assert done.code == 0, done.err
        assert f"teachers in memory: {count}" in done.out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_a_cached_run_that_is_stopped_ends_in_the_same_weights(
    shop: Shop, filled: tuple[Path, str, str], tmp_path: Path, number: signal.Signals
) -> None:
    folder, _, expected = filled
    process = distill(shop, tmp_path, "--out", "run", cache=folder / "cache")
    process.until(lambda: f"epoch 3/{EPOCHS}" in process.err.read_text(encoding="utf-8"))
    process.signal(number)
    assert process.finish().code != 0
    must(shop.warm.run("distill", "--resume", "--out", "run", folder=tmp_path))
    assert weights(tmp_path / "run") == expected


def test_killed_while_it_fills_and_damaged_since_it_ends_in_the_same_weights(
    shop: Shop, filled: tuple[Path, str, str], tmp_path: Path
) -> None:
    _, _, expected = filled
    process = distill(shop, tmp_path, "--out", "run", cache=tmp_path / "cache")
    process.until(lambda: any((tmp_path / "cache").glob("*/rows-*")))
    process.signal(signal.SIGKILL)
    process.finish()
    must(shop.warm.run("distill", "--resume", "--out", "run", folder=tmp_path))
    assert weights(tmp_path / "run") == expected

    largest = max((tmp_path / "cache").glob("*/rows-*"), key=lambda file: file.stat().st_blocks)
    content = bytearray(largest.read_bytes())
    content[1000:1040] = b"x" * 40
    largest.write_bytes(content)
    verified = shop.warm.run("cache", "verify", "--dir", "cache", folder=tmp_path)
    assert verified.code == 1
    assert "damaged: they will be asked for again" in verified.out
    said = must(distill(shop, tmp_path, "--out", "again", cache=tmp_path / "cache").finish())
    assert "are damaged and will be asked for again" in said
    assert weights(tmp_path / "again") == expected
    assert must(shop.warm.run("cache", "verify", "--dir", "cache", folder=tmp_path)).count("all sound") == 2


def test_all_views_give_what_live_teachers_give(shop: Shop, tmp_path: Path) -> None:
    """Digits have 9 views: the whole space is kept, so the pictures are those of a run without a cache."""
    losses = []
    for words in (("cache.views=9",), ("cache.enabled=false",)):
        out = words[0].replace("=", "-")
        teachers = (shop.folder / "a" / "model.pt", shop.folder / "b" / "model.pt")
        line = (
            "--teachers",
            *teachers,
            "--student",
            "resnet8",
            "--init",
            "random",
            "--out",
            out,
            *WORDS[:4],
            "train.lr=1e-4",
        )
        said = must(shop.warm.run("distill", *line, "cache.enabled=true", "cache.dir=cache", *words, folder=tmp_path))
        assert ("filled as the training asks" in said) == (words[0] == "cache.views=9")
        log = (tmp_path / out / "log.jsonl").read_text(encoding="utf-8").splitlines()
        losses.append([e["losses"][0] for e in map(json.loads, log) if e["event"] == "epoch"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0] != losses[1]


def test_a_cache_that_is_too_large_is_refused_before_anything_is_written(shop: Shop, tmp_path: Path) -> None:
    done = distill(shop, tmp_path, "--out", "run", "cache.max_gb=1e-4", cache=tmp_path / "cache").finish()
    assert done.code == 2
    assert "the limit is 0.0001 GB" in done.error
    assert "cache.max_gb=" in done.error
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "cache").glob("*/rows-*"))


def test_ls_and_rm(shop: Shop, tmp_path: Path) -> None:
    assert must(shop.warm.run("cache", "ls", "--dir", "cache", folder=tmp_path)) == "0 caches, 0.000 GB in cache\n"
    must(distill(shop, tmp_path, "train.epochs=1", cache=tmp_path / "cache").finish())
    first, second = names(shop, tmp_path)
    said = must(shop.warm.run("cache", "rm", first[:5], "--dir", "cache", folder=tmp_path))
    assert first in said
    assert names(shop, tmp_path) == [second]
    for words, problem in (((), "name the caches"), (("zz",), "unknown cache 'zz'"), ((second, "--all"), "or give")):
        done = shop.warm.run("cache", "rm", *words, "--dir", "cache", folder=tmp_path)
        assert (done.code, done.out) == (2, "")
        assert problem in done.error
    must(shop.warm.run("cache", "rm", "--all", "--dir", "cache", folder=tmp_path))
    assert names(shop, tmp_path) == []
