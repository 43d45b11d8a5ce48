"""What a cache gives is what the teachers say; it is filled once, by however many, and damage is made good."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from kdcompress.data import CropFlip, Mixup, NoViews, TrainLoader, Views, nth_view
from kdcompress.teacher_cache import _source as source
from kdcompress.teacher_cache import list_caches, verify_cache
from kdcompress.teacher_cache._store import ROWS_FILE_BYTES
from kdcompress.types import Batch, EnsembleOutputs
from tests.unit.teacher_cache.made import (
    POOLED,
    VIEWS,
    Opener,
    fill_in_process,
    make_cache,
    make_loader,
    make_split,
    make_teachers,
)


def fixed_batch(loader: TrainLoader, number: int = 0) -> Batch:
    ids = loader.split.ids
    return loader.batch(ids, nth_view(torch.full_like(ids, number), ids, loader.views.num_views))


def assert_close(cached: EnsembleOutputs, live: EnsembleOutputs) -> None:
    """Up to the rounding to fp16."""
    torch.testing.assert_close(cached.logits, live.logits, rtol=1e-3, atol=1e-3)
    assert cached.teacher_ids == live.teacher_ids
    for one, other in zip(cached.features, live.features, strict=True):
        assert list(one) == list(other)
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-5)


def assert_equal(one: EnsembleOutputs, other: EnsembleOutputs) -> None:
    assert torch.equal(one.logits, other.logits)
    for left, right in zip(one.features, other.features, strict=True):
        assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("views", [VIEWS, NoViews(), Mixup(CropFlip(1), 0.5, 171)], ids=lambda v: v.key())
@pytest.mark.parametrize("features", [{}, POOLED, {"*": "map"}], ids=str)
def test_with_all_views_it_says_what_the_teachers_say(tmp_path: Path, views: Views, features: dict[str, str]) -> None:
    opener, split = Opener(make_teachers(), features), make_split()
    loader = make_loader(split, views)
    cache, live = make_cache(tmp_path, opener, split=split, views=views), opener()
    for epoch in (0, 1, 0):
        for batch in loader.epoch(epoch):
            said = cache(batch)
            assert_close(said, live(batch))
            assert_equal(cache(batch), said)
    distinct = {(int(i), int(v)) for e in (0, 1) for b in loader.epoch(e) for i, v in zip(b.ids, b.views, strict=True)}
    assert len(distinct) <= cache.num_asked <= len(distinct) + 16 * 2 * loader.num_steps


def test_a_filled_cache_asks_nobody_and_lets_go_of_the_teachers(tmp_path: Path) -> None:
    opener, split = Opener(make_teachers()), make_split()
    loader = make_loader(split, num_fixed=3)
    cache = make_cache(tmp_path, opener, split=split)
    before = cache.survey(loader, 3, 32)
    assert (before.num_rows, before.num_missing, before.num_damaged) == (3 * 171, 3 * 171, 0)
    assert before.num_bytes == 3 * 171 * cache.layout.row_bytes
    assert before.seconds > 0
    assert not list(cache.store.folder.glob("rows-*"))  # nothing is written before the size is told
    steps: list[tuple[int, int]] = []
    cache.fill(loader, 3, 32, lambda done, total: steps.append((done, total)))
    assert steps[-1] == (3 * 171, 3 * 171)
    assert not cache.holds_teachers
    asked = cache.num_asked
    assert asked == 3 * 171 + 2 * 32
    again = make_cache(tmp_path, Opener(make_teachers()), split=split)
    for epoch in range(6):
        for batch in loader.epoch(epoch):
            assert_close(again(batch), opener()(batch))
            assert_equal(cache(batch), again(batch))
    assert (cache.num_asked, again.num_asked) == (asked, 0)
    assert again.survey(loader, 3, 32) == source.Survey(3 * 171, 0, 0, before.num_bytes, 0.0)
    more = again.survey(loader, 5, 32, measure=False)
    assert more.num_missing == 2 * 171  # the first three serve whoever wants five


def test_stored_answers_do_not_depend_on_autocast(tmp_path: Path) -> None:
    split = make_split()
    loader = make_loader(split)
    plain, mixed = (make_cache(tmp_path / name, split=split) for name in "ab")
    batch = fixed_batch(loader)
    with torch.autocast("cpu", torch.bfloat16):
        said = mixed(batch)
    assert_equal(plain(batch), said)
    assert said.logits.dtype == torch.float32
    assert not said.logits.requires_grad
    assert not said.logits.is_inference()


@pytest.mark.parametrize("how", ["one byte", "zeros", "truncated", "too long", "removed", "swapped"])
def test_a_damaged_file_is_noticed_and_made_good(tmp_path: Path, how: str) -> None:
    split = make_split()
    loader = make_loader(split, num_fixed=2)
    cache = make_cache(tmp_path, split=split)
    cache.fill(loader, 2, 32)
    expected = [cache(fixed_batch(loader, number)) for number in range(2)]
    cache.close()
    file = cache.store.folder / "rows-00000"
    size, row = file.stat().st_size, cache.layout.row_bytes
    content = bytearray(file.read_bytes())
    if how == "one byte":
        content[5 * row + 20] ^= 4
    elif how == "zeros":
        content[4 * row : 9 * row] = bytes(5 * row)
    elif how == "truncated":
        del content[100 * row + 3 :]
    elif how == "too long":
        content += bytes(50)
    elif how == "swapped":
        content[: 2 * row] = content[row : 2 * row] + content[:row]
    if how == "removed":
        file.unlink()
    else:
        file.write_bytes(content)

    told: list[str] = []
    opener = Opener(make_teachers())
    found = make_cache(tmp_path, opener, split=split, tell=told.append)
    survey = found.survey(loader, 2, 32, measure=False)
    assert survey.num_missing == {"one byte": 1, "zeros": 5, "swapped": 2}.get(how, 2 * 171)
    assert survey.num_damaged == {"one byte": 1, "swapped": 2}.get(how, 0)
    found.release()
    for number in range(2):
        assert_close(found(fixed_batch(loader, number)), opener()(fixed_batch(loader, number)))
    assert not found.holds_teachers
    assert bool(told) == (how in ("one byte", "swapped"))
    assert file.stat().st_size == size
    rebuilt = make_cache(tmp_path, Opener(make_teachers()), split=split)
    assert rebuilt.survey(loader, 2, 32, measure=False).num_missing == 0

    file.write_bytes(content) if how != "removed" else file.unlink()
    refilled = make_cache(tmp_path, Opener(make_teachers()), split=split)
    refilled.fill(loader, 2, 32)
    for number in range(2):
        assert_equal(refilled(fixed_batch(loader, number)), expected[number])


def test_damage_while_it_is_used_is_noticed(tmp_path: Path) -> None:
    split, told = make_split(), []
    loader = make_loader(split, num_fixed=1)
    cache = make_cache(tmp_path, split=split, tell=told.append)
    cache.fill(loader, 1, 32)
    expected, asked = cache(fixed_batch(loader)), cache.num_asked
    with (cache.store.folder / "rows-00000").open("r+b") as handle:
        handle.seek(3 * cache.layout.row_bytes + 30)
        handle.write(b"\xff\xff\xff")
    found = cache(fixed_batch(loader))
    assert told == []  # image 3 is not in the split
    with (cache.store.folder / "rows-00000").open("r+b") as handle:
        handle.seek(4 * cache.layout.row_bytes + 30)
        handle.write(b"\xff\xff\xff")
    found = cache(fixed_batch(loader))
    assert_close(found, expected)
    assert cache.num_asked == asked + 16
    assert len(told) == 1
    assert "1 answers are asked for again" in told[0]


def test_a_row_of_another_cache_is_not_used(tmp_path: Path) -> None:
    """The file of one put in the place of the other's, though both have the same layout."""
    split = make_split()
    loader = make_loader(split, num_fixed=1)
    one, other = (make_cache(tmp_path, Opener(make_teachers(seeds)), split=split) for seeds in ((0, 1), (0, 2)))
    one.fill(loader, 1, 32)
    other.fill(loader, 1, 32)
    expected = other(fixed_batch(loader))
    (one.store.folder / "rows-00000").replace(other.store.folder / "rows-00000")
    again = make_cache(tmp_path, Opener(make_teachers((0, 2))), split=split)
    assert again.survey(loader, 1, 32, measure=False).num_damaged == 171
    assert_close(again(fixed_batch(loader)), expected)


def test_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdcompress.teacher_cache._store.ROWS_FILE_BYTES", 2000)
    assert ROWS_FILE_BYTES > 2000
    monkeypatch.setattr(source, "PART", 50)
    split, opener = make_split(), Opener(make_teachers())
    loader = make_loader(split, num_fixed=3)
    cache = make_cache(tmp_path, opener, split=split)
    cache.fill(loader, 3, 32)
    files = sorted(cache.store.folder.glob("rows-*"))
    assert len(files) > 10
    assert all(file.stat().st_size <= 2000 for file in files)
    files[4].unlink()
    again = make_cache(tmp_path, Opener(make_teachers()), split=split)
    missing = again.survey(loader, 3, 32, measure=False).num_missing
    assert 0 < missing <= 2000 // cache.layout.row_bytes
    for number in range(3):
        assert_close(again(fixed_batch(loader, number)), opener()(fixed_batch(loader, number)))
    assert again.num_asked <= missing + 2 * 16


@pytest.mark.parametrize(
    "seconds", [0.4, pytest.param(0.2, marks=pytest.mark.slow), pytest.param(0.8, marks=pytest.mark.slow)]
)
def test_killed_while_it_fills_it_goes_on_where_it_was(tmp_path: Path, seconds: float) -> None:
    split = make_split(6000)
    loader = make_loader(split, num_fixed=2)
    whole = make_cache(tmp_path / "whole", split=split)
    whole.fill(loader, 2, 32)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=fill_in_process, args=(tmp_path / "killed", 0.01, 2, 6000))
    process.start()
    deadline = time.monotonic() + 60
    while not list((tmp_path / "killed").glob("*/rows-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(seconds)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL

    resumed = make_cache(tmp_path / "killed", split=split)
    survey = resumed.survey(loader, 2, 32, measure=False)
    assert 0 < survey.num_missing < survey.num_rows
    resumed.fill(loader, 2, 32)
    assert resumed.num_asked <= survey.num_missing + 32
    for number in range(2):
        batch = fixed_batch(loader, number)
        assert_equal(resumed(batch), whole(batch))


def test_processes_that_fill_together_share_the_work(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=fill_in_process, args=(tmp_path, 0.005, 2, 6000)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    split = make_split(6000)
    loader = make_loader(split, num_fixed=2)
    cache = make_cache(tmp_path, split=split)
    assert cache.survey(loader, 2, 32, measure=False).num_missing == 0
    asked = [int(file.read_text()) for file in tmp_path.glob("asked-*")]
    assert len(asked) == 2
    assert sum(asked) == 2 * len(split)  # nothing twice
    whole = make_cache(tmp_path / "whole", split=split)
    whole.fill(loader, 2, 32)
    for number in range(2):
        assert_equal(cache(fixed_batch(loader, number)), whole(fixed_batch(loader, number)))
    found = verify_cache(next(one for one in list_caches(tmp_path)))
    assert (found.num_sound, found.num_damaged) == (2 * len(split), 0)


def test_small_batches_come_in_few_sizes(tmp_path: Path) -> None:
    opener, split = Opener(make_teachers()), make_split()
    loader = make_loader(split)
    cache = make_cache(tmp_path, opener, split=split)
    for epoch in range(4):
        for batch in loader.epoch(epoch):
            cache(batch)
    assert set(opener.sizes) <= {16, 32}


@pytest.mark.parametrize("views", [VIEWS, NoViews()], ids=lambda v: v.key())
def test_caches_that_are_filled_together_hold_the_same_bytes_and_the_teachers_are_asked_once(
    tmp_path: Path, views: Views
) -> None:
    split, num_fixed = make_split(), min(3, views.num_views)
    loader = make_loader(split, views, num_fixed=num_fixed)
    wanted: tuple[dict[str, str], ...] = ({}, POOLED, {"*": "map"})

    def open_all(root: Path) -> list[source.CachedTeachers]:
        return [make_cache(root, Opener(make_teachers(), one), split=split, views=views) for one in wanted]

    alone, together = open_all(tmp_path / "alone"), open_all(tmp_path / "together")
    for cache in alone:
        cache.fill(loader, num_fixed, 32)
    opener = Opener(make_teachers(), {"*": "map"})
    source.fill_together(together, opener(), loader, num_fixed, 32)
    assert sum(opener.sizes) == num_fixed * len(split)
    for one, other in zip(alone, together, strict=True):
        assert one.store.folder.name == other.store.folder.name
        assert [file.read_bytes() for file in sorted(one.store.folder.glob("rows-*"))] == [
            file.read_bytes() for file in sorted(other.store.folder.glob("rows-*"))
        ]
        assert other.num_asked == 0
    source.fill_together(together, opener(), loader, num_fixed, 32)
    assert sum(opener.sizes) == num_fixed * len(split), "what is there is not asked for again"
