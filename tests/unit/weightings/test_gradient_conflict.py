from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.svm import OneClassSVM

from kdcompress.losses import kl_divergence
from kdcompress.weightings.gradient_conflict import GradientConflict, shortest_combination
from tests.made_steps import make_shapes, make_step


def solve(gram: Any, cap: float) -> float:
    """The least λᵀ G λ, by scipy."""
    count = len(gram)
    found = minimize(
        lambda x: x @ gram @ x,
        np.full(count, 1 / count),
        jac=lambda x: 2 * gram @ x,
        bounds=[(0, max(cap, 1 / count))] * count,
        constraints={"type": "eq", "fun": lambda x: x.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return float(found.fun)


@given(seed=st.integers(0, 10_000), count=st.integers(1, 8), width=st.sampled_from([2, 5, 100]), cap=st.floats(0.2, 1))
@settings(max_examples=40, deadline=None)
def test_the_simplex_problem_is_solved(seed: int, count: int, width: int, cap: float) -> None:
    rng = np.random.default_rng(seed)
    gradients = rng.normal(size=(count, width)) + rng.normal(size=width)
    gram = gradients @ gradients.T
    weights = shortest_combination(torch.from_numpy(gram), cap).numpy()
    assert weights.sum() == pytest.approx(1)
    assert weights.min() >= 0
    assert weights.max() <= max(cap, 1 / count) + 1e-12
    assert weights @ gram @ weights <= solve(gram, cap) + 2e-3 * np.diag(gram).mean()


@pytest.mark.parametrize("count", [2, 3, 5, 6])
def test_the_weights_are_those_of_a_one_class_support_vector_machine(count: int) -> None:
    """Which is how the paper's authors solve it, with ν = 1 / (C · teachers) and at least 1 / teachers."""
    rng = np.random.default_rng(count)
    for _ in range(5):
        gradients = rng.normal(size=(count, 10)) * rng.uniform(0.2, 2, (count, 1)) + rng.normal(size=10)
        gram, nu = gradients @ gradients.T, min(1.0, max(1 / count, 1 / (0.6 * count)))
        machine = OneClassSVM(kernel="precomputed", nu=nu, tol=1e-9).fit(gram)
        expected = np.zeros(count)
        expected[machine.support_] = machine.dual_coef_ / (count * nu)
        np.testing.assert_allclose(shortest_combination(torch.from_numpy(gram), 0.6), expected, atol=1e-4)


def test_the_gradients_are_those_of_the_kl() -> None:
    """Two teachers: the weights are the point of the segment that is nearest to 0."""
    shapes = make_shapes(2)
    step = make_step(shapes)
    assert step.teachers is not None
    gradients = []
    for t in range(2):
        targets = (step.teachers.logits[:, t] / 4).softmax(1)
        (g,) = torch.autograd.grad(kl_divergence(targets, step.student.logits, 4.0), step.student.logits)
        gradients.append(g.double().sum(0).numpy())  # the KL is a mean already, so the sum is the mean gradient
    a, b = gradients
    expected = float(np.clip((b - a) @ b / ((a - b) @ (a - b)), 0.4, 0.6))
    weights = GradientConflict(shapes)(step)
    np.testing.assert_allclose(weights, [[expected, 1 - expected]] * 6, atol=1e-5)


def test_teachers_that_say_the_same_share_the_weight_and_the_cap_holds() -> None:
    gram = torch.ones(3, 3, dtype=torch.float64)
    np.testing.assert_allclose(shortest_combination(gram, 0.6), [1 / 3] * 3)
    gram = torch.diag(torch.tensor([1e-6, 1.0, 1.0], dtype=torch.float64))
    np.testing.assert_allclose(shortest_combination(gram, 0.6), [0.6, 0.2, 0.2], atol=1e-6)
