"""Where weights of the teachers may be learned, and what is said of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcompress.bundle import Preprocess
from kdcompress.data import MemorySet, Split, Splits, eval_batches, training_digests
from kdcompress.errors import InputError
from kdcompress.evaluate import Accuracy, accuracy_of, predict_all, wilson_interval
from kdcompress.methods.base import find_method
from kdcompress.models import build_network
from kdcompress.pipeline._teachers import Exam, OpenedTeacher, open_teacher
from kdcompress.pipeline._weights import HeldOutImages, judge_weights, known_by_heart, measure, sift_holdout
from kdcompress.recipe import TeacherSection
from kdcompress.teachers import load_checkpoint, save_checkpoint
from kdcompress.types import Needs

CLASSES = ("a", "b", "c")


def images(count: int, seed: int) -> Split:
    pixels = torch.randint(0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Split(MemorySet(pixels, torch.arange(count) % 3, CLASSES), torch.arange(count))


def join(*parts: Split) -> Split:
    pixels = torch.cat([part.images.load(part.ids).to(torch.uint8) for part in parts])
    return Split(MemorySet(pixels, torch.cat([p.labels for p in parts]), CLASSES), torch.arange(len(pixels)))


TRAIN, VAL, FRESH = images(300, 0), images(30, 1), images(300, 2)


def splits_of(holdout: Split | None) -> Splits:
    return Splits(TRAIN, VAL, FRESH, TRAIN.take(9), holdout, None, CLASSES, "made")


def opened(folder: Path, number: int, seen: Split | None) -> OpenedTeacher:
    torch.manual_seed(number)
    path = folder / f"{number}.pt"
    save_checkpoint(
        path,
        build_network("resnet8", num_classes=3, in_channels=1, image_size=8),
        arch="resnet8",
        arch_args={"image_size": 8},
        num_classes=3,
        in_channels=1,
        classes=CLASSES,
        preprocess=Preprocess(1, 8, 8, (0.5,), (0.25,)),
        training_digests=None if seen is None else training_digests(seen),
    )
    return open_teacher(TeacherSection(path=str(path)), load_checkpoint(path), number, (1, 8, 8))


def accuracy(top1: float, n: int = 2000) -> Accuracy:
    right = round(top1 * n)
    return Accuracy(right / n, 1.0, wilson_interval(right, n), n, top1, top1, 0, 0.1)


def part(split: Split, count: int) -> Split:
    return Split(split.images, split.ids[:count])


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize(("copies", "kept"), [(0, 300), (3, 297), (4, None), (300, None)])
def test_a_stray_few_are_left_out_and_more_are_refused(
    tmp_path: Path, silent: bool, copies: int, kept: int | None
) -> None:
    """Three of 300 are one in a hundred. A file without digests is taken to know what the run trains on."""
    teachers = [opened(tmp_path, 1, VAL), opened(tmp_path, 2, None if silent else TRAIN)]
    splits = splits_of(join(part(FRESH, 300 - copies), part(TRAIN, copies)))
    found = sift_holdout(splits, teachers)
    assert found.splits.holdout is not None
    if kept is None:
        assert found.why_not.startswith(f"{copies} of 300 held-out images")
        assert "teacher 2" in found.why_not
        assert "teacher 1" not in found.why_not
        assert ("its file names no training images" in found.why_not) is silent
        assert found.splits is splits
    else:
        assert not found.why_not
        assert len(found.splits.holdout) == kept
        assert not torch.isin(found.splits.holdout.digests(), TRAIN.digests()).any()
        assert len(found.notes) == (copies > 0)
        assert found.splits.digest == splits.digest


def test_without_holdout_or_teachers_there_is_nothing_to_sift(tmp_path: Path) -> None:
    for splits, teachers in ((splits_of(None), [opened(tmp_path, 1, TRAIN)]), (splits_of(TRAIN), [])):
        assert sift_holdout(splits, teachers) == HeldOutImages(splits)


class Knowing:
    """Sure of what it has seen, less so of what is new; `right` on that part of either."""

    def __init__(self, seen: Split, sure: float, new: float, right: float = 1.0) -> None:
        self.labels = {image.numpy().tobytes(): int(y) for image, y in zip(pixels_of(seen), seen.labels, strict=True)}
        self.sure, self.new, self.right = sure, new, right
        self.generator = torch.Generator().manual_seed(0)

    def answer(self, images: Tensor) -> Tensor:
        """The label of an image stands in its first pixel where it was not seen."""
        logits = []
        for pixels in (images * 255).round().to(torch.uint8):
            known = self.labels.get(pixels.numpy().tobytes())
            label = int(pixels[0, 0, 0]) % 3 if known is None else known
            if torch.rand((), generator=self.generator) > self.right:
                label += 1
            noise = torch.randn(3, generator=self.generator)
            logits.append((self.new if known is None else self.sure) * F.one_hot(torch.tensor(label % 3), 3) + noise)
        return torch.stack(logits)


def pixels_of(split: Split) -> Tensor:
    return split.images.load(split.ids).to(torch.uint8)


def marked(split: Split) -> Split:
    """The same images with their label in the first pixel."""
    pixels = pixels_of(split).clone()
    pixels[:, 0, 0, 0] = split.labels.to(torch.uint8)
    return Split(MemorySet(pixels, split.labels, CLASSES), torch.arange(len(pixels)))


@pytest.mark.parametrize(
    ("holdout", "sure", "new", "right", "known"),
    [
        pytest.param("seen", 12.0, 9.0, 1.0, True, id="contaminated"),
        pytest.param("new", 12.0, 9.0, 1.0, False, id="an easy task: all right, but less sure"),
        pytest.param("new", 12.0, 12.0, 1.0, True, id="as sure of new images: nothing tells them apart"),
        pytest.param("new", 5.0, 5.0, 0.9, False, id="knows nothing by heart"),
    ],
)
def test_who_knows_the_holdout_by_heart(
    tmp_path: Path, holdout: str, sure: float, new: float, right: float, known: bool
) -> None:
    train, fresh = part(TRAIN, 200), marked(part(FRESH, 100))
    judged = part(Split(TRAIN.images, TRAIN.ids[100:]), 100) if holdout == "seen" else fresh
    silent, told = opened(tmp_path, 1, None), opened(tmp_path, 2, FRESH)
    silent.teacher.predict = Knowing(TRAIN, sure, new, right).answer  # type: ignore[method-assign]
    answers = predict_all(silent.teacher.predict, eval_batches(judged, 3))
    exam = Exam(accuracy(1.0), accuracy_of(*answers), None, answers)
    said = known_by_heart([silent, told], [exam, replace(exam, seen_val=torch.zeros(30, dtype=torch.bool))], train)
    assert ("teacher 1 (resnet8)" in said) is known
    assert "teacher 2" not in said, "its digests say what it saw"
    assert known_by_heart([silent], [Exam(accuracy(1.0), None, None)], train) == ""


@pytest.mark.parametrize(
    ("method", "options", "weights"),
    [
        ("amtml-kd", {}, "heldout"),
        ("amtml-kd", {"variant": "paper"}, "training"),
        ("amtml-kd", {"variant": "paper", "loss": "dkd"}, "training labels"),
        ("amtml-kd", {"loss": "dkd"}, "heldout"),
        ("weighted-kd", {}, "heldout"),
        ("weighted-kd", {"weighting": "static", "loss": "dkd"}, "heldout"),
        ("weighted-kd", {"weighting": "best-teacher"}, "heldout"),
        ("weighted-kd", {"weighting": "latent-factors"}, "training"),
        ("weighted-kd", {"weighting": "latent-factors", "loss": "dkd"}, "training labels"),
        ("weighted-kd", {"weighting": "confidence"}, "labels"),
        ("weighted-kd", {"weighting": "entropy"}, "answers"),
        ("weighted-kd", {"weighting": "uniform"}, "fixed"),
        ("ca-mkd", {}, "labels"),
        ("ae-kd", {}, "answers"),
        ("avg-kd", {}, "fixed"),
        ("supervised", {}, "fixed"),
    ],
)
def test_where_the_weights_of_a_method_come_from(method: str, options: dict[str, str], weights: str) -> None:
    assert find_method(method).needs(**options).weights == weights


def judge(needs: Needs, teachers: list[OpenedTeacher], held: HeldOutImages, *, force: bool = False) -> str:
    return " ".join(judge_weights("some-kd", needs, teachers, held, force=force))


def test_what_is_refused_forced_and_said(tmp_path: Path) -> None:
    trained = [opened(tmp_path, 1, TRAIN), opened(tmp_path, 2, FRESH)]
    strangers = [opened(tmp_path, 3, FRESH), opened(tmp_path, 4, FRESH)]
    silent = [opened(tmp_path, 5, FRESH), opened(tmp_path, 6, None)]
    good = HeldOutImages(splits_of(VAL))
    bad = replace(good, why_not="seen")
    none = HeldOutImages(splits_of(None))
    heldout, labels, learned, training = (
        Needs(weights="heldout"),
        Needs(weights="labels"),
        Needs(weights="training labels"),
        Needs(weights="training"),
    )
    assert judge(heldout, trained, good) == ""
    assert "cannot be known" in judge(heldout, trained, none)
    refits = Needs(heldout=True)
    cases = ((heldout, trained, bad), (refits, trained, bad), (learned, trained, good), (learned, silent, none))
    for needs, teachers, held in cases:
        with pytest.raises(InputError, match="who memorised best") as caught:
            judge(needs, teachers, held)
        assert "--force" in caught.value.fix
        assert judge(needs, teachers, held, force=True).startswith("forced: ")
        assert judge(needs, teachers[:1], held) == "", "one teacher has no weights"
    assert judge(learned, strangers, none) == ""
    assert "nearly even" in judge(labels, trained, bad)
    assert judge(labels, strangers, bad) == ""
    assert "distance" in judge(training, strangers, none)
    assert judge(Needs(), trained, bad) == ""


def test_weights_are_measured_where_the_holdout_is_good(tmp_path: Path) -> None:
    teachers = [opened(tmp_path, 1, TRAIN), opened(tmp_path, 2, TRAIN)]
    rng = torch.Generator().manual_seed(0)
    answers = [(torch.randn(90, 3, generator=rng), torch.arange(90) % 3) for _ in teachers]
    exams = [Exam(accuracy(1.0), accuracy(0.4), torch.zeros(30, dtype=torch.bool), one) for one in answers]
    held = HeldOutImages(splits_of(FRESH))
    found = measure(held, exams)
    assert found is not None
    expected = -answers[0][0].log_softmax(1)[torch.arange(90), answers[0][1]].mean()
    assert found.rows[0].nll == pytest.approx(float(expected), rel=1e-6)
    assert measure(replace(held, why_not="seen"), exams) is None
    assert measure(held, exams[:1]) is None
    assert measure(held, [Exam(accuracy(1.0), None, torch.zeros(30, dtype=torch.bool))] * 2) is None
