"""Shares are what they say, measured on real gradients."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kdcompress.balance import Balancer, felt_shares, find_factors, gradient_norm, hardly_felt
from kdcompress.errors import InputError
from kdcompress.types import Share, Term

ONE = torch.ones(())


def network() -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(6, 4), torch.randn(10, 6)


def terms_of(layer: nn.Linear, inputs: Tensor, weights: Mapping[str, float | Share]) -> dict[str, Term]:
    answers = layer(inputs)
    values = {
        "kl": answers.square().mean(),
        "labels": (answers - 1).abs().mean(),
        "hint": 1e-4 * answers.exp().mean(),
        "angle": 30 * torch.sin(answers).mean(),
        "apart": torch.zeros((), requires_grad=True).exp(),
        "constant": torch.tensor(2.0),
    }
    return {name: Term(values[name], weight) for name, weight in weights.items()}


def norm_of(value: Tensor, layer: nn.Linear) -> float:
    """The norm of a gradient, independently: backward and flatten."""
    layer.zero_grad()
    value.backward(retain_graph=True)
    return float(torch.cat([parameter.grad.flatten() for parameter in layer.parameters()]).norm())


def test_the_real_gradients_have_the_asked_shares() -> None:
    layer, inputs = network()
    weights = {"kl": 1.0, "labels": -0.3, "hint": Share(0.1), "angle": Share(0.25)}
    terms = terms_of(layer, inputs, weights)
    balancer = Balancer(layer.parameters())
    balancer.measure(terms, ONE)
    factors = balancer.factors(weights)
    felt = {name: norm_of(terms[name].value * factor, layer) for name, factor in factors.items()}
    whole = sum(felt.values())
    assert felt["hint"] / whole == pytest.approx(0.1, rel=1e-5)
    assert felt["angle"] / whole == pytest.approx(0.25, rel=1e-5)
    assert (factors["kl"], factors["labels"]) == (1.0, -0.3)
    shares = balancer.shares(weights)
    assert {name: float(share) for name, share in shares.items()} == pytest.approx(
        {name: value / whole for name, value in felt.items()}, rel=1e-5
    )


@given(
    norms=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=5),
    asked=st.lists(st.floats(0.001, 0.24), min_size=1, max_size=4),
)
def test_factors_give_back_the_shares(norms: list[float], asked: list[float]) -> None:
    measured = {str(index): torch.tensor(norm, dtype=torch.float64) for index, norm in enumerate(norms)}
    weights: dict[str, float | Share] = {
        name: Share(share) for name, share in zip(list(measured)[1:], asked, strict=False)
    }
    weights = {name: weights.get(name, 0.7) for name in measured}
    factors = find_factors(measured, weights)
    shares = felt_shares(measured, factors)
    assert sum(float(share) for share in shares.values()) == pytest.approx(1)
    for name, weight in weights.items():
        if isinstance(weight, Share):
            assert float(shares[name]) == pytest.approx(weight.value)


def test_a_share_of_zero_and_a_weight_of_zero_act_not_and_are_not_measured() -> None:
    layer, inputs = network()
    weights: dict[str, float | Share] = {"kl": 1.0, "angle": 1.0, "labels": 0.0, "hint": Share(0.0)}
    balancer = Balancer(layer.parameters())
    balancer.measure(terms_of(layer, inputs, weights), ONE)
    assert balancer.factors(weights) == weights | {"hint": 0.0}
    shares = balancer.shares(weights)
    assert list(shares) == ["kl", "angle"]
    assert float(shares["kl"] + shares["angle"]) == pytest.approx(1)


def test_a_term_that_acts_alone_is_not_measured() -> None:
    layer, _ = network()
    balancer = Balancer(layer.parameters())
    weights: dict[str, float | Share] = {"kl": 2.0, "labels": 0.0, "hint": Share(0.0)}
    assert not balancer.due(0, weights)
    assert balancer.factors(weights) == {"kl": 2.0, "labels": 0.0, "hint": 0.0}
    assert balancer.shares(weights) == {}


@pytest.mark.parametrize("name", ["apart", "constant"])
def test_a_term_that_does_not_reach_the_backbone_is_not_blown_up(name: str) -> None:
    layer, inputs = network()
    weights = {"kl": 1.0, name: Share(0.3)}
    balancer = Balancer(layer.parameters())
    balancer.measure(terms_of(layer, inputs, weights), ONE)
    assert float(balancer.factors(weights)[name]) == 0
    assert float(balancer.shares(weights)[name]) == 0
    assert hardly_felt(0.0, weights[name])


def test_a_tiny_gradient_is_enlarged_only_so_far() -> None:
    norms = {"kl": torch.tensor(1.0), "hint": torch.tensor(1e-20)}
    factor = find_factors(norms, {"kl": 1.0, "hint": Share(0.5)})["hint"]
    assert float(factor) == pytest.approx(1e8)


def test_norms_are_smoothed_and_an_overflow_is_passed_over() -> None:
    parameter = nn.Parameter(torch.tensor([1.0]))
    balancer = Balancer([parameter])
    for slope, expected in ((4.0, 4.0), (2.0, 3.0), (float("inf"), 3.0), (1.0, 2.0)):
        balancer.measure({"kl": Term((slope * parameter).sum())}, ONE)
        assert balancer.state_dict()["kl"].item() == expected


def test_an_overflow_at_the_first_measurement_counts_as_nothing_felt() -> None:
    parameter = nn.Parameter(torch.tensor([1.0]))
    balancer = Balancer([parameter])
    weights: dict[str, float | Share] = {"kl": 1.0, "hint": Share(0.1)}
    balancer.measure({"kl": Term(parameter.sum()), "hint": Term((float("inf") * parameter).sum(), Share(0.1))}, ONE)
    assert float(balancer.factors(weights)["hint"]) == 0


def test_the_scale_of_mixed_precision_cancels() -> None:
    layer, inputs = network()
    value = terms_of(layer, inputs, {"kl": 1.0})["kl"].value
    plain = gradient_norm(value, list(layer.parameters()), ONE)
    scaled = gradient_norm(value, list(layer.parameters()), torch.tensor(65536.0))
    assert float(plain) == pytest.approx(norm_of(value, layer), rel=1e-6)
    torch.testing.assert_close(scaled, plain)


def test_the_calendar_and_new_terms() -> None:
    layer, inputs = network()
    balancer = Balancer(layer.parameters())
    weights: dict[str, float | Share] = {"kl": 1.0, "labels": 1.0}
    assert balancer.due(7, weights)
    balancer.measure(terms_of(layer, inputs, weights), ONE)
    due = [step for step in range(301) if balancer.due(step, weights)]
    assert due == [0, 10, 30, 100, 200, 300]
    assert not balancer.due(7, {**weights, "hint": Share(0.0)})
    assert balancer.due(7, {**weights, "hint": Share(0.1)})


def test_shares_that_leave_nothing_are_refused() -> None:
    norms = {"kl": ONE, "hint": ONE, "angle": ONE}
    with pytest.raises(InputError, match="hint, angle add up to 1"):
        find_factors(norms, {"kl": 1.0, "hint": Share(0.5), "angle": Share(0.5)})
    with pytest.raises(InputError, match="no other term"):
        find_factors(norms, {"kl": 0.0, "hint": Share(0.5)})


@pytest.mark.parametrize(
    ("share", "weight", "expected"),
    [
        (0.009, 1.0, True),
        (0.011, 1.0, False),
        (0.0, 0.0, False),
        (0.0, Share(0.0), False),
        (0.004, Share(0.004), False),
        (0.001, Share(0.004), True),
        (0.0, Share(0.1), True),
    ],
)
def test_what_is_hardly_felt(share: float, weight: float | Share, expected: bool) -> None:
    assert hardly_felt(share, weight) is expected


def test_the_state_goes_on() -> None:
    layer, inputs = network()
    weights = {"kl": 1.0, "hint": Share(0.1)}
    one, other = Balancer(layer.parameters()), Balancer(layer.parameters())
    one.measure(terms_of(layer, inputs, weights), ONE)
    other.load_state_dict(one.state_dict(), torch.device("cpu"))
    assert torch.equal(torch.as_tensor(one.factors(weights)["hint"]), torch.as_tensor(other.factors(weights)["hint"]))
