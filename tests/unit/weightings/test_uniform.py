import torch

from kdcompress.weightings.uniform import Uniform
from tests.made_steps import make_shapes, make_step


def test_every_teacher_counts_the_same() -> None:
    shapes = make_shapes(num_teachers=4)
    weights = Uniform(shapes)(make_step(shapes, dtype=torch.bfloat16))
    assert torch.equal(weights, torch.full((6, 4), 0.25))
