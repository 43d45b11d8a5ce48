"""What is noted at each step comes out as means, and a loss that is not finite is found."""

import pytest
import torch

from kdcompress.errors import NonFiniteError
from kdcompress.ledger import Ledger


def values(loss: float, kl: float, weights: tuple[float, ...] = (0.25, 0.75)) -> dict[str, torch.Tensor]:
    return {
        "0/loss": torch.tensor(loss),
        "0/terms/kl": torch.tensor(kl),
        "0/diagnostics/weights": torch.tensor(weights),
    }


def test_means_over_window_and_epoch() -> None:
    ledger = Ledger()
    ledger.note(0, values(1.0, 0.5, (0.0, 1.0)))
    ledger.note(1, values(3.0, 1.5, (1.0, 0.0)))
    assert ledger.window.take() == {}
    ledger.settle()
    expected = {"0/loss": 2.0, "0/terms/kl": 1.0, "0/diagnostics/weights": [0.5, 0.5]}
    assert ledger.window.take() == expected
    ledger.note(2, {**values(8.0, 1.0, (0.5, 0.5)), "0/terms/hint": torch.tensor(7.0)})
    ledger.settle()
    assert ledger.window.take()["0/loss"] == 8.0
    epoch = ledger.epoch.take()
    assert epoch["0/loss"] == 4.0
    assert epoch["0/terms/hint"] == 7.0
    assert ledger.epoch.take() == {}


def test_the_first_bad_step_is_named_with_the_last_finite_terms() -> None:
    ledger = Ledger()
    ledger.note(4, values(1.25, 0.5))
    ledger.settle()
    ledger.note(5, values(2.5, 0.75))
    ledger.note(6, values(float("nan"), float("inf")))
    ledger.note(7, values(float("nan"), float("nan")))
    with pytest.raises(NonFiniteError) as caught:
        ledger.settle()
    assert caught.value.what == "the loss is not finite at step 6: loss nan, kl inf"
    assert caught.value.where == "one step earlier: loss 2.5, kl 0.75"


def test_students_are_told_apart_where_there_are_several() -> None:
    ledger = Ledger()
    ledger.note(0, {f"{index}/{name}": torch.tensor(1.5 + index) for index in (0, 1) for name in ("loss", "terms/kl")})
    ledger.settle()
    assert ledger.describe_last() == "student 0 loss 1.5, student 0 kl 1.5, student 1 loss 2.5, student 1 kl 2.5"


def test_only_losses_have_to_be_finite() -> None:
    ledger = Ledger()
    ledger.note(0, values(1.0, float("inf")))
    ledger.settle()
    assert ledger.window.take()["0/terms/kl"] == float("inf")


def test_the_state_goes_on() -> None:
    one, other = Ledger(), Ledger()
    one.note(0, values(1.0, 0.1))
    one.settle()
    other.load_state_dict(one.state_dict())
    for ledger in (one, other):
        ledger.note(1, values(2.0, 0.2))
        ledger.settle()
    assert one.epoch.take() == other.epoch.take()
    assert one.window.take() == other.window.take()
