import numpy as np
import torch

from kdcompress.weightings.entropy import Entropy
from tests.made_steps import make_shapes, make_step


def test_against_the_equation() -> None:
    shapes = make_shapes(3)
    step = make_step(shapes)
    assert step.teachers is not None
    z = step.teachers.logits.double().numpy()
    p = np.exp(z) / np.exp(z).sum(2, keepdims=True)
    h = -(p * np.log(p)).sum(2)
    np.testing.assert_allclose(Entropy(shapes)(step), (1 - h / h.sum(1, keepdims=True)) / 2, rtol=1e-5)


def test_teachers_without_any_doubt_count_the_same() -> None:
    """Where p log p is not a number (defect C6)."""
    shapes = make_shapes(4)
    weights = Entropy(shapes)(make_step(shapes, teacher_scale=1e6))
    torch.testing.assert_close(weights, torch.full((6, 4), 0.25))


def test_one_sure_teacher_among_doubtful_ones_counts_most() -> None:
    shapes = make_shapes(3)
    step = make_step(shapes)
    assert step.teachers is not None
    step.teachers.logits[:, 1] *= 1000
    assert bool((Entropy(shapes)(step).argmax(1) == 1).all())
