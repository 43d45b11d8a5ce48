import pytest
import torch

from kdcompress.errors import InputError
from kdcompress.methods.avg_kd import AverageKD
from kdcompress.methods.ca_mkd import CAMKD
from kdcompress.methods.weighted_kd import WeightedKD
from tests.made_steps import make_shapes, make_step


def test_uniform_weights_are_averaged_kd_and_confidence_is_ca_mkd_without_hints() -> None:
    shapes, step = make_shapes(), make_step(make_shapes())
    for mine, other in (
        (WeightedKD(shapes, weighting="uniform"), AverageKD(shapes)),
        (WeightedKD(shapes, weighting="confidence", loss="dkd", mix="losses"), CAMKD(shapes, loss="dkd")),
    ):
        found, expected = mine(step).terms, other(step).terms
        assert found.keys() == expected.keys()
        for name, term in found.items():
            torch.testing.assert_close(term.value, expected[name].value)


def test_what_learns_asks_for_heldout_images_and_is_refitted() -> None:
    assert not WeightedKD.needs(weighting="entropy").heldout
    assert WeightedKD.needs(weighting="static").heldout
    shapes = make_shapes()
    method, step = WeightedKD(shapes, weighting="best-teacher"), make_step(shapes, batch=60)
    found = method.refit(method.reduce_heldout(step))
    weights = method(step).diagnostics["teacher_weight_mean"]
    assert int(weights.argmax()) + 1 == found["teacher"]


def test_the_gate_gets_the_map_it_reads() -> None:
    shapes = make_shapes()
    whole, parts, step = WeightedKD(shapes), WeightedKD(shapes), make_step(shapes, batch=100)
    assert whole.refit(step) == parts.refit(parts.reduce_heldout(step))
    assert parts.refit(step)["heldout_images"] == 100


def test_an_unknown_weighting_is_named() -> None:
    with pytest.raises(InputError, match="entropy"):
        WeightedKD(make_shapes(), weighting="entropie")
