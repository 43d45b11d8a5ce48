"""A cache is named by everything that its answers depend on; there are limits; caches can be listed and removed."""

import json
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from torch import nn

from kdcompress.data import CropFlip, MemorySet, Mixup, NoViews, RandomResizedCrop, Split
from kdcompress.errors import InputError, RunError
from kdcompress.teacher_cache import (
    StoredCache,
    default_folder,
    find_caches,
    list_caches,
    remove_cache,
    require_room,
    verify_cache,
)
from tests.unit.teacher_cache.made import (
    POOLED,
    PREPROCESS,
    VIEWS,
    Opener,
    make_cache,
    make_loader,
    make_split,
    make_teachers,
)


def name_of(root: Path, opener: Opener | None = None, **options: object) -> str:
    cache = make_cache(root, opener, **options)  # type: ignore[arg-type]
    cache.close()
    return cache.store.folder.name


def changed_weight() -> Opener:
    teachers = make_teachers()
    parameter = next(teachers[1].network.parameters())
    with torch.no_grad():
        parameter.view(-1)[3] += 1e-6
    return Opener(teachers)


def changed_statistics() -> Opener:
    teachers = make_teachers()
    next(buffer for name, buffer in teachers[0].network.named_buffers() if "running_var" in name)[1] += 1e-4
    return Opener(teachers)


def other_activation() -> Opener:
    """The same weights in another structure."""
    teachers = make_teachers()
    teachers[0].network.stage_a[2] = nn.GELU()  # type: ignore[operator, index]
    return Opener(teachers)


def other_normalisation() -> Opener:
    return Opener(make_teachers(preprocess=replace(PREPROCESS, mean=(0.4,))))


def test_the_same_again_is_the_same_cache(tmp_path: Path) -> None:
    assert name_of(tmp_path) == name_of(tmp_path)
    split = make_split()
    relabelled = Split(MemorySet(split.images.images.clone(), split.images.labels * 0, ("x", "y", "z")), split.ids[:9])  # type: ignore[attr-defined]
    assert name_of(tmp_path, split=relabelled) == name_of(tmp_path)
    assert len(list_caches(tmp_path)) == 1


def test_whatever_changes_an_answer_changes_the_name(tmp_path: Path) -> None:
    split = make_split()
    one_pixel = split.images.images.clone()  # type: ignore[attr-defined]
    one_pixel[150, 0, 4, 4] ^= 1
    names = [
        name_of(tmp_path),
        name_of(tmp_path, changed_weight()),
        name_of(tmp_path, changed_statistics()),
        name_of(tmp_path, other_activation()),
        name_of(tmp_path, other_normalisation()),
        name_of(tmp_path, Opener(make_teachers((1, 0)))),
        name_of(tmp_path, Opener(make_teachers((0,)))),
        name_of(tmp_path, Opener(make_teachers((0, 1, 2)))),
        name_of(tmp_path, Opener(make_teachers(), {})),
        name_of(tmp_path, Opener(make_teachers(), {"last": "map"})),
        name_of(tmp_path, Opener(make_teachers(), {"stage1": "pooled"})),
        name_of(tmp_path, Opener(make_teachers(), {"*": "pooled"})),
        name_of(tmp_path, split=Split(MemorySet(one_pixel, split.images.labels, split.images.classes), split.ids)),
        name_of(tmp_path, split=make_split(199)),
        name_of(tmp_path, views=CropFlip(1, True)),
        name_of(tmp_path, views=CropFlip(2, False)),
        name_of(tmp_path, views=NoViews()),
        name_of(tmp_path, views=RandomResizedCrop(8, num_views=9, view_seed=0)),
        name_of(tmp_path, views=RandomResizedCrop(8, num_views=9, view_seed=1)),
        name_of(tmp_path, views=Mixup(VIEWS, 0.5, 171)),
        name_of(tmp_path, views=Mixup(VIEWS, 0.4, 171)),
        name_of(tmp_path, views=Mixup(VIEWS, 0.5, 171), split=Split(split.images, split.ids.flip(0))),
        name_of(tmp_path, top_k=2),
    ]
    assert len(set(names)) == len(names)


def filled(root: Path, seeds: tuple[int, ...] = (0, 1)) -> StoredCache:
    split = make_split()
    cache = make_cache(root, Opener(make_teachers(seeds)), split=split)
    cache.fill(make_loader(split, num_fixed=2), 2, 32)
    cache.close()
    return next(one for one in list_caches(root) if one.path == cache.store.folder)


def test_caches_are_listed_found_and_verified(tmp_path: Path) -> None:
    assert list_caches(tmp_path / "nothing") == ()
    first, second = filled(tmp_path), filled(tmp_path, (2, 3))
    os.utime(second.path / "cache.json", (1, 1))
    assert [cache.key for cache in list_caches(tmp_path)] == [first.key, second.key]
    assert first.about == {"data": "tiny", "teachers": ["teacher 1", "teacher 2"], "views": VIEWS.key()}
    assert first.disk_bytes > 0
    assert find_caches(tmp_path, [second.key[:6]])[0].path == second.path
    with pytest.raises(InputError, match="unknown cache 'zz'"):
        find_caches(tmp_path, ["zz"])
    with pytest.raises(InputError, match="unknown cache ''"):
        find_caches(tmp_path, [""])
    (tmp_path / first.key[:6]).mkdir()
    (tmp_path / first.key[:6] / "cache.json").write_text("{}")
    with pytest.raises(InputError, match="2 caches begin with"):
        find_caches(tmp_path, [first.key[:5]])
    assert (verify_cache(first).num_sound, verify_cache(first).num_damaged) == (342, 0)
    with (first.path / "rows-00000").open("r+b") as handle:
        handle.seek(9)
        handle.write(b"abc")
    assert (verify_cache(first).num_sound, verify_cache(first).num_damaged) == (341, 1)


@pytest.mark.parametrize("content", ["", "[]", "{}", "changed"])
def test_a_description_that_is_not_that_of_the_name_is_noticed_and_written_anew(tmp_path: Path, content: str) -> None:
    cache = filled(tmp_path)
    file = cache.path / "cache.json"
    good = file.read_text()
    if content == "changed":
        content = good.replace('"num_classes": 3', '"num_classes": 4')
        assert content != good
    file.write_text(content)
    with pytest.raises(RunError, match=r"cache\.json is missing or was changed"):
        verify_cache(next(iter(list_caches(tmp_path))))
    again = make_cache(tmp_path)
    assert file.read_text() == good
    assert json.loads(good)["key"].startswith(cache.key)
    assert again.survey(make_loader(make_split()), 2, 32, measure=False).num_missing == 0


def hold(root: Path, pipe: Connection) -> None:
    make_cache(root)
    pipe.send("open")
    pipe.recv()


@pytest.fixture
def in_use(tmp_path: Path) -> Iterator[StoredCache]:
    cache = filled(tmp_path)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=hold, args=(tmp_path, there))
    process.start()
    assert here.poll(60), "the process that holds the cache did not start"
    assert here.recv() == "open"
    yield cache
    here.send("close")
    process.join()


def test_a_cache_is_removed_but_not_while_a_training_uses_it(in_use: StoredCache, tmp_path: Path) -> None:
    other = filled(tmp_path, (5, 6))
    with pytest.raises(RunError, match="a running training uses this cache"):
        remove_cache(in_use)
    assert verify_cache(in_use).num_sound == 342
    remove_cache(other)
    assert [cache.key for cache in list_caches(tmp_path)] == [in_use.key]


def test_the_limit_is_for_all_caches_together_and_says_what_would_help(tmp_path: Path) -> None:
    other = filled(tmp_path, (2, 3))
    cache = make_cache(tmp_path)
    require_room(cache, 10**6, 10**6, max_gb=0.002)
    taken = f"{(10**6 + other.disk_bytes) / 1e9:.3g}"
    with pytest.raises(InputError, match=f"take 0.001 GB, with the others {taken}; the limit is 0.001 GB") as caught:
        require_room(cache, 10**6, 10**6, max_gb=0.001)
    assert caught.value.where == "cache.max_gb"
    assert "kdcompress cache rm" in caught.value.fix
    assert "hint_pool" not in caught.value.fix
    remove_cache(other)
    require_room(cache, 10**6, 10**6, max_gb=0.001)
    with pytest.raises(InputError, match=r"with the others 0\.0011;"):
        require_room(cache, 10**6, 10**6, 0.001, promised_bytes=10**5)
    maps = make_cache(tmp_path, Opener(make_teachers(), {"last": "map"}))
    with pytest.raises(InputError, match="would take 2") as caught:
        require_room(maps, 2 * 10**9, 2 * 10**9, max_gb=1.0)
    assert "method.hint_pool=pooled" in caught.value.fix
    assert "cache.max_gb=2" in caught.value.fix
    with pytest.raises(RunError, match="GB are free"):
        require_room(cache, 10**15, 10**15, max_gb=1e9)


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "kdcompress" / "teachers"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "kdcompress" / "teachers"


def test_pooled_maps_are_what_the_form_says(tmp_path: Path) -> None:
    assert make_cache(tmp_path, Opener(make_teachers(), POOLED)).layout.features == ({"stage2": (6, 1, 1)},) * 2
    assert (
        make_cache(tmp_path, Opener(make_teachers(), {"last": "map"})).layout.features == ({"stage2": (6, 4, 4)},) * 2
    )
