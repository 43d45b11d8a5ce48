import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics
from torch import Tensor

from kdcompress.errors import DataError, ShapeError, VerificationError
from kdcompress.evaluate import (
    accuracy_of,
    agreement,
    evaluate,
    paired_difference,
    predict_all,
    wilson_interval,
)
from kdcompress.types import UNLABELLED, Batch


def batches(images: Tensor, labels: Tensor, size: int, num_classes: int) -> list[Batch]:
    ids = torch.arange(len(labels))
    one_hot = torch.nn.functional.one_hot(labels.clamp(min=0), num_classes).float() * (labels >= 0)[:, None]
    parts = zip(images.split(size), ids.split(size), labels.split(size), one_hot.split(size), strict=True)
    return [Batch(image, number, torch.zeros_like(number), label, target) for image, number, label, target in parts]


def first_pixels(images: Tensor) -> Tensor:
    """A predictor whose logits are the first pixels of the image."""
    return images.flatten(1)[:, :3]


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys(case: tuple[int, int]) -> None:
    successes, n = case
    expected = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    low, high = wilson_interval(successes, n)
    assert low == pytest.approx(expected.low, abs=1e-9)
    assert high == pytest.approx(expected.high, abs=1e-9)
    assert 0 <= low <= successes / n <= high <= 1


def test_accuracy_is_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 8, (500,), generator=generator)
    logits = torch.randn(500, 8, generator=generator) + 1.5 * torch.nn.functional.one_hot(labels, 8)
    found = accuracy_of(logits, labels)
    probability = logits.double().softmax(1).numpy()
    predicted = logits.argmax(1).numpy()
    recall = metrics.recall_score(labels, predicted, average=None)
    assert found.top1 == pytest.approx(metrics.accuracy_score(labels, predicted))
    assert found.top5 == pytest.approx(metrics.top_k_accuracy_score(labels, probability, k=5, labels=range(8)))
    assert found.macro_recall == pytest.approx(metrics.balanced_accuracy_score(labels, predicted))
    assert found.worst_class == pytest.approx(recall.min())
    assert found.worst_class_index == recall.argmin()
    assert found.nll == pytest.approx(metrics.log_loss(labels, probability, labels=range(8)))
    assert found.interval == wilson_interval(round(found.top1 * 500), 500)
    assert found.n == 500


def test_top5_of_three_classes_is_everything() -> None:
    found = accuracy_of(torch.eye(3), torch.tensor([1, 2, 0]))
    assert (found.top1, found.top5) == (0.0, 1.0)


def test_a_class_without_images_does_not_enter_the_mean() -> None:
    logits = torch.eye(4)[[0, 0, 1, 2]]
    found = accuracy_of(logits, torch.tensor([0, 1, 1, 2]))
    assert found.macro_recall == pytest.approx((1 + 0.5 + 1) / 3)
    assert (found.worst_class, found.worst_class_index) == (0.5, 1)


def test_evaluate_runs_over_batches_and_leaves_out_unlabelled_images() -> None:
    images = torch.rand(11, 1, 2, 2, generator=torch.Generator().manual_seed(2))
    labels = first_pixels(images).argmax(1)
    labels[3] = (labels[3] + 1) % 3
    labels[4:7] = UNLABELLED  # one whole batch of three, with images 6 to 8 half labelled
    found = evaluate(first_pixels, batches(images, labels, 3, 3), 3)
    assert found.n == 8
    assert found.top1 == 7 / 8
    logits, kept = predict_all(first_pixels, batches(images, labels, 4, 3))
    assert torch.equal(logits, first_pixels(images[labels >= 0]))
    assert torch.equal(kept, labels[labels >= 0])


def test_what_cannot_be_evaluated_is_refused() -> None:
    images, labels = torch.rand(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ShapeError, match="3 classes, the data 5"):
        evaluate(first_pixels, batches(images, labels, 2, 5), 5)
    with pytest.raises(DataError, match="no labelled image"):
        evaluate(first_pixels, batches(images, labels - 1, 2, 3), 3)
    with pytest.raises(VerificationError, match="not finite"):
        evaluate(lambda part: first_pixels(part) / 0.0, batches(images, labels, 2, 3), 3)
    with pytest.raises(DataError, match="from 0 to 3, the model has 3 classes"):
        accuracy_of(torch.eye(3), torch.tensor([0, 1, 3]))
    with pytest.raises(DataError):
        accuracy_of(torch.empty(0, 3), torch.empty(0, dtype=torch.int64))


def test_agreement_counts_equal_classes() -> None:
    assert agreement(torch.eye(4), torch.eye(4)[[0, 1, 3, 3]]) == 0.75
    with pytest.raises(DataError):
        agreement(torch.empty(0, 3), torch.empty(0, 3))


def test_paired_difference_by_hand() -> None:
    """n = 8, A alone right twice, B alone once: (3 - 2) / 10 ± 1.96 √((.3 + .2 - .01) / 10)."""
    a = torch.tensor([1, 1, 1, 1, 0, 0, 1, 1]).bool()
    b = torch.tensor([1, 1, 1, 1, 1, 0, 0, 0]).bool()
    found = paired_difference(a, b)
    half = 1.959964 * math.sqrt((0.3 + 0.2 - 0.1**2) / 10)
    assert found.difference == pytest.approx(1 / 8)
    assert found.low == pytest.approx(0.1 - half, abs=1e-6)
    assert found.high == pytest.approx(0.1 + half, abs=1e-6)
    swapped = paired_difference(b, a)
    assert (swapped.low, swapped.high) == pytest.approx((-found.high, -found.low))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_the_interval_holds_the_difference_and_stays_possible(pairs: list[tuple[bool, bool]]) -> None:
    a, b = (torch.tensor(part) for part in zip(*pairs, strict=True))
    found = paired_difference(a, b)
    assert found.difference == pytest.approx(a.double().mean() - b.double().mean())
    assert -1 <= found.low <= found.difference <= found.high <= 1


@pytest.mark.parametrize(
    ("n", "both", "only_a", "only_b"),
    [(200, 0.85, 0.03, 0.05), (1000, 0.9, 0.02, 0.02), (2000, 0.93, 0.012, 0.004), (50, 0.5, 0.2, 0.1)],
)
def test_the_paired_interval_covers_the_truth_in_95_percent_of_samples(
    n: int, both: float, only_a: float, only_b: float
) -> None:
    generator = np.random.default_rng(5)
    counts = generator.multinomial(n, [both, only_a, only_b, 1 - both - only_a - only_b], size=2000)
    covered = 0
    for kinds in counts:
        a = torch.from_numpy(np.repeat([True, True, False, False], kinds))
        b = torch.from_numpy(np.repeat([True, False, True, False], kinds))
        found = paired_difference(a, b)
        covered += found.low <= only_a - only_b <= found.high
    # 2,000 samples tell a coverage to ± 0.01; the interval may be a little too wide, hardly too narrow.
    assert 0.935 <= covered / 2000 <= 0.985


def test_different_numbers_of_images_are_no_pairs() -> None:
    with pytest.raises(ShapeError, match="3 and 4"):
        paired_difference(torch.ones(3).bool(), torch.ones(4).bool())
    with pytest.raises(DataError):
        paired_difference(torch.ones(0).bool(), torch.ones(0).bool())
