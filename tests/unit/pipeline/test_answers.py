"""Which source a run gets, and how many teachers are in memory for it."""

import gc
import weakref
from pathlib import Path

import pytest
import torch

from kdcompress.bundle import Preprocess
from kdcompress.data import MemorySet, NoViews, Split, TrainLoader
from kdcompress.execution import PLAIN
from kdcompress.models import build_network
from kdcompress.networks import TeacherEnsemble
from kdcompress.pipeline._answers import TeacherFiles, fills_first
from kdcompress.pipeline._teachers import open_teacher
from kdcompress.recipe import TeacherSection
from kdcompress.teacher_cache import open_cache
from kdcompress.teachers import load_checkpoint, save_checkpoint

CPU = torch.device("cpu")


def open_files(folder: Path) -> tuple[TeacherEnsemble, TeacherFiles]:
    sections = []
    for number in range(2):
        torch.manual_seed(number)
        network = build_network("resnet8", num_classes=3, in_channels=1, image_size=8)
        save_checkpoint(
            folder / f"{number}.pt",
            network,
            arch="resnet8",
            arch_args={"image_size": 8},
            num_classes=3,
            in_channels=1,
            classes=("a", "b", "c"),
            preprocess=Preprocess(1, 8, 8, (0.5,), (0.25,)),
            training_digests=None,
        )
        sections.append(TeacherSection(path=str(folder / f"{number}.pt")))
    ensemble = TeacherEnsemble(
        [
            open_teacher(section, load_checkpoint(section.path), number, (1, 8, 8)).teacher
            for number, section in enumerate(sections, start=1)
        ]
    )
    return ensemble, TeacherFiles(ensemble, sections, (1, 8, 8), {"last": "pooled"}, PLAIN, CPU)


def test_teachers_that_were_let_go_are_opened_again_for_what_is_damaged(tmp_path: Path) -> None:
    ensemble, files = open_files(tmp_path)
    images = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    split = Split(MemorySet(images, torch.arange(40) % 3, ("a", "b", "c")), torch.arange(40))
    loader = TrainLoader(split, NoViews(), num_classes=3, batch_size=40, seed=0)
    told: list[str] = []
    cache = open_cache(
        tmp_path / "cache",
        teachers=ensemble.teachers,
        features={"last": "pooled"},
        split=split,
        views=loader.views,
        data_name="noise",
        device=CPU,
        open_teachers=files,
        tell=told.append,
    )
    cache.fill(loader, 1, 40)
    batch = next(loader.epoch(0))
    expected = cache(batch)
    alive = weakref.ref(ensemble)
    files.let_go()
    del ensemble
    gc.collect()
    assert alive() is None

    rows = cache.store.folder / "rows-00000"
    rows.write_bytes(rows.read_bytes()[: 7 * cache.layout.row_bytes] + bytes(33 * cache.layout.row_bytes))
    with rows.open("r+b") as handle:
        handle.seek(20)
        handle.write(b"xyz")
    found = cache(batch)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-3, atol=1e-3)
    assert len(told) == 1
    assert not cache.holds_teachers
    assert cache.num_asked == 40 + 34 + 14  # 34 in a batch of 48


@pytest.mark.parametrize(
    ("num_views", "epochs", "first"), [(1, 1, True), (9, 20, False), (9, 40, True), (162, 240, False)]
)
def test_a_cache_is_filled_first_if_the_training_would_visit_nearly_all_of_it(
    num_views: int, epochs: int, first: bool
) -> None:
    assert fills_first(num_views, epochs) == first
