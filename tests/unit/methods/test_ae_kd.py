import numpy as np
import pytest
import torch

from kdcompress.methods.ae_kd import AEKD
from kdcompress.methods.avg_kd import AverageKD
from tests.made_steps import make_shapes, make_step


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def test_against_the_equations_with_the_simplex_searched_on_a_grid() -> None:
    T, cap, shapes = 4.0, 0.6, make_shapes(3)
    step = make_step(shapes)
    assert step.teachers is not None
    z, teachers = step.student.logits.detach().double().numpy(), step.teachers.logits.double().numpy()
    p, q = softmax(z / T), softmax(teachers / T)
    gradients = T * (p[:, None] - q).mean(0)
    grid = np.array([(a, b, 1 - a - b) for a in np.linspace(0, cap, 301) for b in np.linspace(0, cap, 301)])
    grid = grid[(grid[:, 2] >= 0) & (grid[:, 2] <= cap)]
    weights = grid[np.square(grid @ gradients).sum(1).argmin()]
    kls = (q * np.log(q / p[:, None])).sum(2).mean(0)
    answer = AEKD(shapes)(step)
    np.testing.assert_allclose(answer.diagnostics["teacher_weight_mean"], weights, atol=5e-3)
    assert float(answer.terms["soft_targets"].value.detach()) == pytest.approx(T**2 * weights @ kls, rel=5e-3)


def test_one_teacher_is_classic_kd() -> None:
    shapes = make_shapes(1)
    step = make_step(shapes)
    found, expected = AEKD(shapes)(step).terms, AverageKD(shapes)(step).terms
    torch.testing.assert_close(found["soft_targets"].value, expected["soft_targets"].value)


def test_the_cap_and_the_temperature_reach_the_weighting() -> None:
    """A teacher that agrees with the student would get all the weight; each gets no more than the cap."""
    shapes = make_shapes(3)
    step = make_step(shapes)
    assert step.teachers is not None
    step.teachers.logits[:, 0] = step.student.logits.detach()
    for cap in (0.4, 0.9):
        mean = AEKD(shapes, cap=cap)(step).diagnostics["teacher_weight_mean"]
        assert float(mean[0]) == pytest.approx(cap, abs=1e-6)
    cold, warm = (AEKD(shapes, temperature=T)(make_step(shapes)).diagnostics for T in (1.0, 4.0))
    assert not np.allclose(cold["teacher_weight_mean"], warm["teacher_weight_mean"], atol=1e-3)
