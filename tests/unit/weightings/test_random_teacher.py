from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdcompress.weightings.random_teacher import RandomTeacher
from tests.made_steps import make_shapes, make_step


@pytest.mark.parametrize("num_steps", [512, 600])
def test_each_step_has_one_teacher_and_all_get_their_turn(num_steps: int) -> None:
    shapes = make_shapes(3)
    torch.manual_seed(0)
    weighting = RandomTeacher(shapes)
    counts = torch.zeros(3)
    for number in range(num_steps):
        weights = weighting(make_step(shapes, batch=2, progress=number / num_steps))
        assert torch.equal(weights[0], weights[1])
        assert sorted(weights[0].tolist()) == [0.0, 0.0, 1.0]
        counts += weights[0]
    deviation = (num_steps * 2 / 9) ** 0.5
    assert bool(((counts - num_steps / 3).abs() < 4 * deviation).all())


def test_a_resumed_run_draws_the_same_and_one_of_another_seed_does_not() -> None:
    shapes = make_shapes(5)
    steps = [make_step(shapes, progress=number / 100) for number in range(100)]
    torch.manual_seed(0)
    first = RandomTeacher(shapes)
    torch.manual_seed(1)
    other = RandomTeacher(shapes)
    resumed = RandomTeacher(shapes)
    resumed.load_state_dict(first.state_dict())
    assert all(torch.equal(first(step), resumed(step)) for step in steps)
    same = sum(torch.equal(first(step), other(step)) for step in steps)
    assert same < 50  # 20 of 100 by chance


class Reads(TorchDispatchMode):
    """Counts the numbers that are read from a device, which waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_the_seed_is_read_once_and_again_when_it_is_another() -> None:
    shapes = make_shapes(5)
    steps = [make_step(shapes, progress=number / 100) for number in range(20)]
    weighting, other = RandomTeacher(shapes), RandomTeacher(shapes)
    expected = [other(step) for step in steps]
    with Reads() as reads:
        for step in steps:
            weighting(step)
        assert reads.count == 1
        weighting.load_state_dict(other.state_dict())
        drawn = [weighting(step) for step in steps]
        assert reads.count == 2
    assert all(map(torch.equal, drawn, expected))
