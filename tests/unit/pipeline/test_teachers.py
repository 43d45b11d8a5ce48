from pathlib import Path

import pytest
import torch

from kdcompress.bundle import Preprocess
from kdcompress.data import load_splits
from kdcompress.errors import ShapeError
from kdcompress.evaluate import Accuracy, wilson_interval
from kdcompress.models import build_network
from kdcompress.pipeline._teachers import (
    Exam,
    image_size,
    open_teacher,
    read_checkpoints,
    require_fitting,
    resolved,
    saw_val,
)
from kdcompress.recipe import TeacherSection
from kdcompress.teachers import save_checkpoint

BY_DIGESTS = "images, by the digests in the teachers' files"


def exam(*seen: int, val: float = 0.9, holdout: float | None = None) -> Exam:
    """Of a teacher that was trained on these of 1,000 images of val; its file is silent where none is named."""
    mask = torch.zeros(1000, dtype=torch.bool)
    mask[list(seen)] = True
    return Exam(accuracy(val), None if holdout is None else accuracy(holdout), mask if seen else None)


def accuracy(top1: float) -> Accuracy:
    right = round(top1 * 1000)
    return Accuracy(right / 1000, 1.0, wilson_interval(right, 1000), 1000, top1, top1, 0, 0.1)


def test_a_stray_few_images_of_val_are_copies_and_more_were_trained_on() -> None:
    """The rule of the held-out images: one in a hundred, whichever of the teachers has seen it."""
    assert saw_val([exam(1), exam(1, 2)]) == (False, f"2 of 1,000 {BY_DIGESTS}; up to 1 % may be copies")
    few = exam(*range(5))
    assert saw_val([few, exam(*range(5, 10))]) == (False, f"10 of 1,000 {BY_DIGESTS}; up to 1 % may be copies")
    assert saw_val([few, exam(*range(5, 11))]) == (True, f"11 of 1,000 {BY_DIGESTS}")


def test_silent_files_are_asked_by_their_accuracy_where_the_others_saw_only_copies() -> None:
    told = "by the teachers' accuracy on val against --holdout"
    assert saw_val([exam(1), exam(val=0.99, holdout=0.9)]) == (True, told)
    assert saw_val([exam(1), exam(val=0.9, holdout=0.9)]) == (False, told)
    assert saw_val([exam(1), exam()])[0] is None
    assert saw_val([exam(*range(11)), exam()]) == (True, f"11 of 1,000 {BY_DIGESTS}")


def checkpoint_of(path: Path, arch: str, **arguments: int) -> TeacherSection:
    torch.save(build_network(arch, **arguments).state_dict(), path)
    return TeacherSection(path=str(path))


def test_a_teacher_of_colour_images_is_refused_for_grey_ones(tmp_path: Path) -> None:
    sections = [checkpoint_of(tmp_path / f"{n}.pt", "resnet8", num_classes=10, in_channels=n) for n in (1, 3)]
    splits = load_splits("digits")
    require_fitting(read_checkpoints(sections[:1]), splits)
    with pytest.raises(ShapeError, match=r"images of 3 channel\(s\), those of digits have 1") as caught:
        require_fitting(read_checkpoints(sections), splits)
    assert caught.value.where == str(tmp_path / "3.pt")


def test_the_size_wanted_is_the_largest_square(tmp_path: Path) -> None:
    def wants(name: str, height: int, width: int) -> TeacherSection:
        save_checkpoint(
            tmp_path / name,
            build_network("resnet8", num_classes=2),
            arch="resnet8",
            arch_args={},
            num_classes=2,
            in_channels=3,
            classes=None,
            preprocess=Preprocess(3, height, width, (0.5,) * 3, (1.0,) * 3),
        )
        return TeacherSection(path=str(tmp_path / name))

    sections = [wants("a.pt", 32, 32), wants("b.pt", 24, 24), wants("c.pt", 40, 64)]
    assert image_size(sections, read_checkpoints(sections)) == 32
    assert image_size(sections[2:], read_checkpoints(sections[2:])) is None
    larger = [sections[0].model_copy(update={"image_size": 48})]
    assert image_size(larger, read_checkpoints(larger)) == 48


def test_another_size_than_the_images_stands_in_the_resolved_section(tmp_path: Path) -> None:
    section = checkpoint_of(tmp_path / "a.pt", "resnet8", num_classes=10, in_channels=1)
    (checkpoint,) = read_checkpoints([section])
    stated = section.model_copy(update={"mean": (0.5,), "std": (0.5,), "image_size": 16})
    for asked, shape, size in ((stated, (1, 8, 8), 16), (stated, (1, 16, 16), 16)):
        opened = open_teacher(asked, checkpoint, 1, shape)
        again = resolved(asked, opened)
        assert again.image_size == size
        assert open_teacher(again, checkpoint, 1, shape).teacher.preprocess == opened.teacher.preprocess
