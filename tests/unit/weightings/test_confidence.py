from dataclasses import replace

import numpy as np
import pytest
import torch

from kdcompress.weightings.confidence import Confidence
from tests.made_steps import make_shapes, make_step


@pytest.mark.parametrize("num_teachers", [1, 2, 4])
def test_against_the_equation(num_teachers: int) -> None:
    shapes = make_shapes(num_teachers)
    step = make_step(shapes, num_unlabelled=2)
    assert step.teachers is not None
    logits = step.teachers.logits.double().numpy()
    expected = np.full((6, num_teachers), 1 / num_teachers)
    for i in range(2, 6) if num_teachers > 1 else ():
        y = int(step.labels[i])
        errors = np.array([np.log(np.exp(z).sum()) - z[y] for z in logits[i]])
        expected[i] = (1 - np.exp(errors) / np.exp(errors).sum()) / (num_teachers - 1)
    np.testing.assert_allclose(Confidence(shapes)(step), expected, rtol=1e-5)


def test_smoothed_labels_are_taken_sharp_and_mixed_ones_as_they_are() -> None:
    shapes = make_shapes()
    step = make_step(shapes)
    smooth = replace(step, label_targets=0.9 * step.label_targets + 0.1 / 5)
    torch.testing.assert_close(Confidence(shapes)(smooth), Confidence(shapes)(step))
    mixed = replace(step, labels=torch.full_like(step.labels, -1))
    torch.testing.assert_close(Confidence(shapes)(mixed), Confidence(shapes)(step))
