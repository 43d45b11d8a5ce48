"""Rates, optimizers and the average, each against an independent computation."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kdcompress.optim import (
    Optimisation,
    Schedule,
    WeightAverage,
    build_optimizer,
    learning_rate,
    parameter_groups,
)

CPU = torch.device("cpu")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


def rates_of(scheduler_class: type, num_steps: int, **options: object) -> list[float]:
    """What torch's own scheduler does, step by step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    scheduler = scheduler_class(optimizer, **options)
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_cosine_is_torchs_cosine() -> None:
    ours = [learning_rate(step, 50, base=0.4, schedule="cosine") for step in range(50)]
    assert ours == pytest.approx(rates_of(torch.optim.lr_scheduler.CosineAnnealingLR, 50, T_max=50))


def test_step_is_torchs_multi_step() -> None:
    ours = [learning_rate(step, 40, base=0.4, schedule="step", milestones=(0.5, 0.75), decay=0.2) for step in range(40)]
    theirs = rates_of(torch.optim.lr_scheduler.MultiStepLR, 40, milestones=[20, 30], gamma=0.2)
    assert ours == pytest.approx(theirs)


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    rates = [learning_rate(step, 100, base=1.0, schedule="cosine", num_warmup_steps=4) for step in range(6)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[5] == pytest.approx(0.5 * (1 + math.cos(math.pi / 96)))


@given(
    num_steps=st.integers(1, 500),
    data=st.data(),
    schedule=st.sampled_from(["cosine", "step", "constant"]),
    base=st.floats(1e-6, 10),
)
def test_a_rate_lies_between_zero_and_the_peak(
    num_steps: int, data: st.DataObject, schedule: Schedule, base: float
) -> None:
    step = data.draw(st.integers(0, num_steps - 1))
    warmup = data.draw(st.integers(0, num_steps))
    rate = learning_rate(step, num_steps, base=base, schedule=schedule, num_warmup_steps=warmup, milestones=(0.3, 0.6))
    assert 0 < rate <= base * (1 + 1e-12)


def test_only_matrices_are_decayed_and_every_parameter_is_in_one_group() -> None:
    student, method = network(), nn.Sequential(nn.Linear(2, 2))
    frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    method.register_parameter("frozen", frozen)
    groups = parameter_groups(student, method, 0.01)
    assert [group["name"] for group in groups] == ["student", "student, not decayed", "method", "method, not decayed"]
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0, 0.01, 0.0]
    assert all(parameter.ndim > 1 for group in groups[::2] for parameter in group["params"])
    assert all(parameter.ndim == 1 for group in groups[1::2] for parameter in group["params"])
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trained = [*student.parameters(), *method[0].parameters()]
    assert sorted(grouped) == sorted(id(parameter) for parameter in trained)


def test_a_method_without_parameters_makes_no_group() -> None:
    assert len(parameter_groups(network(), nn.Identity(), 0.1)) == 2


@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_takes_the_steps_of_its_formula(nesterov: bool) -> None:
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
    settings = Optimisation(lr=0.1, momentum=0.8, nesterov=nesterov)
    optimizer = build_optimizer([{"params": [weight], "weight_decay": 0.05}], settings, CPU)
    expected, momentum = weight.detach().clone(), torch.zeros(1, 2, dtype=torch.float64)
    for _ in range(5):
        weight.grad = torch.sin(weight.detach())
        optimizer.step()
        gradient = torch.sin(expected) + 0.05 * expected
        momentum = 0.8 * momentum + gradient
        expected = expected - 0.1 * (gradient + 0.8 * momentum if nesterov else momentum)
    torch.testing.assert_close(weight.detach(), expected)


def test_adamw_takes_the_steps_of_its_formula() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
    settings = Optimisation(optimizer="adamw", lr=0.1, momentum=0.8)
    optimizer = build_optimizer([{"params": [weight], "weight_decay": 0.05}], settings, CPU)
    expected = weight.detach().clone()
    first, second = torch.zeros_like(expected), torch.zeros_like(expected)
    for count in range(1, 6):
        weight.grad = torch.sin(weight.detach())
        optimizer.step()
        gradient = torch.sin(expected)
        expected = expected * (1 - 0.1 * 0.05)
        first = 0.8 * first + 0.2 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        expected = expected - 0.1 * (first / (1 - 0.8**count)) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)
    torch.testing.assert_close(weight.detach(), expected)


def test_momentum_of_zero_is_plain_descent() -> None:
    weight = nn.Parameter(torch.tensor([2.0]))
    optimizer = build_optimizer([{"params": [weight]}], Optimisation(lr=0.5, momentum=0.0), CPU)
    weight.grad = torch.tensor([1.0])
    optimizer.step()
    assert weight.item() == 1.5


def test_the_average_follows_its_formula_and_leaves_the_network_alone() -> None:
    followed = network()
    average = WeightAverage(followed, 0.6)
    expected = copy.deepcopy(followed.state_dict())
    for step in range(8):
        followed(torch.randn(6, 5))
        with torch.no_grad():
            for parameter in followed.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update(step)
        decay = min(0.6, (1 + step) / (10 + step))
        for name, value in followed.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value if value.is_floating_point() else value
    before = copy.deepcopy(followed.state_dict())
    with average.applied():
        torch.testing.assert_close(dict(followed.state_dict()), dict(expected))
    assert all(torch.equal(value, before[name]) for name, value in followed.state_dict().items())
    assert followed[1].num_batches_tracked == 8
    average.apply()
    torch.testing.assert_close(dict(followed.state_dict()), dict(expected))


def test_the_average_is_left_even_by_an_error() -> None:
    followed = network()
    average = WeightAverage(followed, 0.5)
    with torch.no_grad():
        followed[0].weight.fill_(3.0)
    with pytest.raises(RuntimeError, match="inside"), average.applied():
        raise RuntimeError("inside")
    assert bool((followed[0].weight == 3).all())
