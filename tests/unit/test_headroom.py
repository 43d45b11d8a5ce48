"""The table against numpy and scipy, and what is recommended for teachers whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.spatial.distance import jensenshannon
from torch import Tensor

from kdcompress.crossfit import SHRINKAGES, fold_masks
from kdcompress.errors import DataError, ShapeError
from kdcompress.headroom import Headroom, as_rows, disagreement, measure_headroom

CLASSES = 6


def make_answers(kind: str, images: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of three teachers that nearly say the truth: the label is drawn from what they would say without noise.

    Of "broken" the second answers at random; of "weak" all say it with noise, and the third only in 7 of 10 cases;
    teacher k of "specialists" knows classes 2k and 2k + 1 and takes all others for one of those.
    """
    rng = torch.Generator().manual_seed(seed)
    truth = 2.5 * torch.randn(images, 1, CLASSES, generator=rng)
    labels = torch.multinomial(truth[:, 0].softmax(1), 1, generator=rng)[:, 0]
    own = torch.randn(images, 3, CLASSES, generator=rng)
    knows = torch.ones(images, 3, dtype=torch.bool)
    elsewhere = 2.5 * own
    if kind == "broken":
        knows[:, 1] = False
    elif kind == "weak":
        knows[:, 2] = torch.rand(images, generator=rng) < 0.7
        own = 4 * own
    elif kind == "specialists":
        knows = torch.nn.functional.one_hot(labels // 2, 3).bool()
        elsewhere = torch.where(torch.arange(CLASSES) // 2 == torch.arange(3)[:, None], own, own - 4)
    return torch.where(knows[:, :, None], truth + 0.3 * own, elsewhere), labels


def softmax(scores: np.ndarray) -> np.ndarray:
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def numpy_cross_fit(inputs: np.ndarray, p: np.ndarray, y: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Weights of each image from gates that scipy fits on the other folds, λ by the one-standard-error rule."""
    n, k, _ = p.shape
    right = p[np.arange(n), :, y]

    def fit(rows: np.ndarray, shrinkage: float) -> np.ndarray:
        X, q = inputs[rows], right[rows]

        def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
            w = softmax(X @ flat.reshape(k, -1).T)
            mixed = (w * q).sum(1, keepdims=True)
            slope = (w - w * q / mixed).T @ X / len(X)
            value = -np.log(mixed).mean() + 0.5 * shrinkage * (flat**2).sum()
            return value, slope.ravel() + shrinkage * flat

        start = np.zeros(k * X.shape[1])
        return minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 500}).x.reshape(k, -1)

    weights = np.zeros((len(SHRINKAGES), n, k))
    for index, shrinkage in enumerate(SHRINKAGES):
        for fold in range(folds.max() + 1):
            weights[index, folds == fold] = softmax(inputs[folds == fold] @ fit(folds != fold, shrinkage).T)
    nll = -np.log((weights * right).sum(2))
    chosen = np.zeros((n, k))
    for fold in range(folds.max() + 1):
        others = nll[:, folds != fold]
        worse = others - others[others.mean(1).argmin()]
        strongest = np.argmax(worse.mean(1) <= worse.std(1, ddof=1) / math.sqrt(others.shape[1]))
        chosen[folds == fold] = weights[strongest, folds == fold]
    return chosen


def numpy_rows(logits: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
    """The weights [images, teachers] of every row, from the definitions."""
    z, y = logits.double().numpy(), labels.numpy()
    p = softmax(z)
    n, k, c = p.shape
    right = p[np.arange(n), :, y]
    folds = fold_masks(labels).numpy().argmax(0)
    rows = {f"teacher {t + 1}": np.eye(k)[[t] * n] for t in range(k)}
    rows |= {f"without teacher {t + 1}": (1 - np.eye(k))[[t] * n] / (k - 1) for t in range(k)}
    rows["average"] = np.full((n, k), 1 / k)
    rows["oracle (upper bound)"] = np.eye(k)[right.argmax(1)]
    best, drop = np.zeros((n, k)), np.zeros((n, k))
    options = np.concatenate([np.full((1, k), 1 / k), (1 - np.eye(k)) / (k - 1)])
    for fold in range(5):
        others = folds != fold
        hits, likely = (p[others].argmax(2) == y[others, None]).sum(0), np.log(right[others]).mean(0)
        best[~others] = np.eye(k)[max(range(k), key=lambda t: (hits[t], likely[t]))]
        better = np.log(right[others] @ options.T) - np.log(right[others].mean(1, keepdims=True))
        first = better.mean(0).argmax()
        sure = better[:, first].mean() > better[:, first].std(ddof=1) / math.sqrt(others.sum())
        drop[~others] = options[first if sure else 0]
    rows["best teacher"], rows["average without the worst"] = best, drop
    ones = np.ones((n, 1))
    named = np.eye(c)[p.mean(1).argmax(1)]
    rows["static weights"] = numpy_cross_fit(ones, p, y, folds)
    rows["class-wise weights"] = numpy_cross_fit(np.concatenate([named, ones], 1), p, y, folds)
    columns = [np.log(np.exp(z).sum(2)), -(p * np.log(p)).sum(2), p.max(2), z.reshape(n, -1)]
    seen = np.concatenate(columns, 1)
    seen = (seen - seen.mean(0)) / seen.std(0)
    rows["gate"] = numpy_cross_fit(np.concatenate([seen, ones], 1), p, y, folds)
    return rows


@pytest.mark.parametrize("kind", ["broken", "specialists"])
def test_every_row_is_what_numpy_and_scipy_find(kind: str) -> None:
    logits, labels = make_answers(kind, images=200)
    found = {row.name: row for row in measure_headroom(logits, labels).rows}
    p, y = softmax(logits.double().numpy()), labels.numpy()
    expected = numpy_rows(logits, labels)
    assert set(found) == set(expected)
    nll = {name: -np.log(np.einsum("nk,nkc->nc", w, p)[np.arange(len(y)), y]) for name, w in expected.items()}
    for name, weights in expected.items():
        row, right = found[name], np.einsum("nk,nkc->nc", weights, p).argmax(1) == y
        fitted = name in ("static weights", "class-wise weights", "gate")
        near = 3e-3 if fitted else 1e-9  # our L-BFGS stops at a gradient of 1e-4, scipy's goes on
        assert row.nll == pytest.approx(nll[name].mean(), abs=near), name
        assert row.nll_error == pytest.approx(nll[name].std(ddof=1) / math.sqrt(len(y)), abs=near), name
        assert row.top1 == pytest.approx(right.mean(), abs=0.011 if fitted else 1e-12), name
        assert row.top1_error == pytest.approx(right.std(ddof=1) / math.sqrt(len(y)), abs=near), name
        gain = nll["average"] - nll[name]
        assert row.gain == pytest.approx(gain.mean(), abs=near), name
        assert row.gain_error == pytest.approx(gain.std(ddof=1) / math.sqrt(len(y)), abs=near), name
        np.testing.assert_allclose(row.weights, weights.mean(0), atol=0.05 if fitted else 1e-12, err_msg=name)


@pytest.mark.parametrize(
    ("kind", "choice", "teacher"),
    [("alike", "average", None), ("broken", "drop", 2), ("weak", "static", None), ("specialists", "gate", None)],
)
def test_what_is_recommended(kind: str, choice: str, teacher: int | None) -> None:
    for seed in range(3):
        found = measure_headroom(*make_answers(kind, seed=seed)).recommendation
        assert (found.choice, found.teacher) == (choice, teacher)
        assert found.text.startswith(f"{choice}")
        if choice == "average":
            assert (found.gain, found.gain_error) == (0, 0)
        else:
            assert found.gain > found.gain_error > 0
            assert f"{found.gain:.4f} ± {found.gain_error:.4f}" in found.text


def test_no_weights_do_better_than_the_oracle_and_the_table_says_what_it_is() -> None:
    found = measure_headroom(*make_answers("weak"))
    oracle = found.row("oracle")
    assert oracle is not None
    assert all(row.nll >= oracle.nll for row in found.rows)
    assert "upper bound" in oracle.name
    table = as_rows(found)
    assert [cells[0] for cells in table] == [row.name for row in found.rows]
    assert any("400 held-out images" in line for line in found.brief())


def without_seconds(found: Headroom) -> list[tuple[object, ...]]:
    return [(row.kind, row.teacher, row.top1, row.nll, row.gain) for row in found.rows]


def test_the_same_answers_give_the_same_table_and_another_seed_other_folds() -> None:
    answers, state = make_answers("weak"), torch.get_rng_state()
    first = measure_headroom(*answers)
    assert measure_headroom(*answers) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert without_seconds(measure_headroom(*answers, seed=1)) != without_seconds(first)


@pytest.mark.parametrize("order", [[1, 0, 2], [2, 0, 1]])
def test_the_order_of_the_teachers_does_not_matter(order: list[int]) -> None:
    logits, labels = make_answers("broken", images=120)
    first, second = measure_headroom(logits, labels), measure_headroom(logits[:, order], labels)
    for one, other in zip(first.rows, second.rows, strict=True):
        if one.teacher is None:
            assert other.nll == pytest.approx(one.nll, abs=2e-3), one.name
            assert [other.weights[order.index(t)] for t in range(3)] == pytest.approx(one.weights, abs=0.02), one.name
    assert second.recommendation.choice == first.recommendation.choice
    dropped = first.recommendation.teacher
    assert second.recommendation.teacher == (None if dropped is None else order.index(dropped - 1) + 1)


@pytest.mark.parametrize(("images", "teachers"), [(49, 3), (1, 3), (200, 1)])
def test_without_enough_to_learn_from_nothing_is_fitted(images: int, teachers: int) -> None:
    logits, labels = make_answers("specialists", images)
    found = measure_headroom(logits[:, :teachers], labels)
    assert found.recommendation.choice == "average"
    assert {row.kind for row in found.rows} <= {"teacher", "average", "without", "oracle"}
    assert all(math.isfinite(value) for row in found.rows for value in (row.nll, row.top1_error, row.gain_error))


def test_two_teachers_have_no_row_without_one_but_one_of_them_may_be_dropped() -> None:
    logits, labels = make_answers("broken")
    found = measure_headroom(logits[:, :2], labels)
    assert found.row("without") is None
    assert (found.recommendation.choice, found.recommendation.teacher) == ("drop", 2)


def test_too_few_images_of_each_class_for_weights_for_each() -> None:
    logits, labels = make_answers("specialists", images=59)
    assert measure_headroom(logits, labels).row("class-wise") is None
    assert measure_headroom(*make_answers("specialists", images=60)).row("class-wise") is not None


def test_sure_teachers_stay_finite() -> None:
    logits, labels = make_answers("weak", images=100)
    found = measure_headroom(1e4 * logits, labels)
    assert all(math.isfinite(row.nll) and math.isfinite(row.gain_error) for row in found.rows)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda z, y: (z[:-1], y), ShapeError),
        (lambda z, y: (z[:0], y[:0]), DataError),
        (lambda z, y: (z, y - 1), DataError),
        (lambda z, y: (z, y + 1), DataError),
    ],
)
def test_wrong_answers_are_refused(
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], error: type[Exception]
) -> None:
    with pytest.raises(error):
        measure_headroom(*change(*make_answers("alike", images=60)))


def test_disagreement_is_the_share_of_unlike_classes_and_scipys_divergence() -> None:
    logits, _ = make_answers("weak", images=80)
    found = disagreement(logits)
    p = softmax(logits.double().numpy())
    named = p.argmax(2)
    assert found.n == 80
    assert found.differ == pytest.approx(np.mean([len(set(row)) > 1 for row in named]))
    pairs = disagreement(logits[:, :2])
    expected = np.mean([jensenshannon(a, b) ** 2 for a, b in p[:, :2]])
    assert pairs.divergence == pytest.approx(expected, rel=1e-9)
    same = disagreement(logits[:, :1].expand(-1, 3, -1))
    assert (same.differ, same.divergence) == (0, pytest.approx(0, abs=1e-12))
    apart = disagreement(1e3 * torch.eye(3)[None])
    assert (apart.differ, apart.divergence) == (1, pytest.approx(math.log(3)))
    with pytest.raises(DataError):
        disagreement(logits[:0])
