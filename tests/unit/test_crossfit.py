"""The fit of a gate, against numpy and scipy."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import entr, logsumexp, softmax
from torch import Tensor

from kdcompress.crossfit import (
    MAX_LOGITS,
    answer_inputs,
    centre_and_scale,
    fit_coefficients,
    fold_masks,
    mixture_nll,
    num_answer_inputs,
)


@pytest.mark.parametrize(("teachers", "classes"), [(3, 6), (1, 2), (2, 128), (2, 129)])
def test_what_a_gate_reads_of_the_answers(teachers: int, classes: int) -> None:
    z = np.random.default_rng(0).normal(size=(7, teachers, classes)) * 3
    p = softmax(z, axis=2)
    expected = [logsumexp(z, axis=2), entr(p).sum(2), p.max(2)]
    if teachers * classes <= MAX_LOGITS:
        expected.append(z.reshape(7, -1))
    found = answer_inputs(torch.tensor(z))
    np.testing.assert_allclose(found.numpy(), np.concatenate(expected, 1), rtol=1e-12)
    assert found.shape[1] == num_answer_inputs(teachers, classes)


def test_what_never_varied_weighs_no_more_when_it_does() -> None:
    inputs = torch.tensor([[1.0, 5.0], [3.0, 5.0]], dtype=torch.float64)
    centre, scale = centre_and_scale(inputs)
    assert (centre.tolist(), scale.tolist()) == ([2.0, 5.0], [1.0, 1.0])
    centre, scale = centre_and_scale(3 * inputs)
    assert (centre.tolist(), scale.tolist()) == ([6.0, 15.0], [3.0, 1.0])


def test_mixture_nll() -> None:
    rng = np.random.default_rng(0)
    scores, p = rng.normal(size=(4, 3)), rng.uniform(size=(4, 3))
    w = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    expected = -np.log((w * p).sum(1))
    np.testing.assert_allclose(mixture_nll(torch.tensor(scores), torch.tensor(p).log()), expected, rtol=1e-12)


def test_the_fit_is_the_minimum_that_scipy_finds() -> None:
    rng = np.random.default_rng(1)
    X, log_p = rng.normal(size=(60, 4)), np.log(rng.uniform(size=(60, 3)))

    def objective(flat: np.ndarray) -> float:
        scores = X @ flat.reshape(3, 4).T
        w = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        return float(-np.log((w * np.exp(log_p)).sum(1)).mean() + 0.05 * (flat**2).sum())

    expected = minimize(objective, np.zeros(12), tol=1e-12)
    found = fit_coefficients(torch.tensor(X), torch.tensor(log_p), torch.ones(1, 60).double(), 0.1)[0]
    # A gradient of at most 1e-4 and a curvature of at least λ = 0.1 leave 1e-3 in each coefficient, 1e-7 in the value.
    assert objective(found.numpy().ravel()) == pytest.approx(expected.fun, abs=1e-7)
    np.testing.assert_allclose(found.numpy().ravel(), expected.x, atol=1e-3)


def test_folds_do_not_see_their_own_images() -> None:
    """What a fold is fitted on is everything else, whatever happens to the other folds in the same run."""
    rng = np.random.default_rng(2)
    X, log_p = torch.tensor(rng.normal(size=(50, 3))), torch.tensor(np.log(rng.uniform(size=(50, 2))))
    held = fold_masks(torch.arange(50) % 4)
    together = fit_coefficients(X, log_p, 1 - held, 0.1)
    for fold, mask in enumerate(held):
        rows = mask == 0
        alone = fit_coefficients(X[rows], log_p[rows], torch.ones(1, int(rows.sum())).double(), 0.1)[0]
        torch.testing.assert_close(together[fold], alone, atol=2e-3, rtol=0)


@pytest.mark.parametrize("labels", [torch.arange(100) % 10, torch.arange(100) // 10])
def test_every_fold_has_its_part_of_every_class(labels: Tensor) -> None:
    held = fold_masks(labels)
    assert torch.equal(held.sum(0), torch.ones(100).double())
    for number in range(10):
        assert torch.equal(held[:, labels == number].sum(1), torch.full((5,), 2.0).double())
