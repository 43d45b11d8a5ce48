"""Every weighting, found by its file name: weights that sum to 1, for any teachers, batch and precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kdcompress.discovery import CARD_HEADINGS, read_card
from kdcompress.types import Step
from kdcompress.weightings.base import PACKAGE, Weighting, diagnose, find_weighting, list_weightings
from tests.made_steps import make_shapes, make_step, permute_teachers

NAMES = list_weightings()


def build(name: str, num_teachers: int, num_classes: int = 5) -> tuple[Weighting, Step]:
    """A weighting that has learned what it can: random parameters, fitted to held-out outputs."""
    torch.manual_seed(0)
    shapes = make_shapes(num_teachers, num_classes)
    weighting = find_weighting(name)(shapes)
    for parameter in weighting.parameters():
        nn.init.normal_(parameter)
    weighting.refit(make_step(shapes, batch=120, seed=1))
    return weighting, make_step(shapes)


def test_the_known_ones_are_found() -> None:
    known = {"uniform", "latent-factors", "heldout-gate", "confidence", "entropy", "static", "gradient-conflict"}
    assert known | {"best-teacher", "random-teacher"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_card(name: str) -> None:
    card = read_card(PACKAGE, name)
    assert tuple(card.sections) == CARD_HEADINGS
    assert card.title.endswith(".")
    assert all(card.sections.values())


@pytest.mark.parametrize("name", NAMES)
@given(
    num_teachers=st.integers(1, 5),
    batch=st.integers(1, 7),
    num_classes=st.sampled_from([2, 1000]),
    scale=st.sampled_from([0.01, 1.0, 1000.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=10, deadline=None)
def test_weights_sum_to_one(
    name: str, num_teachers: int, batch: int, num_classes: int, scale: float, dtype: torch.dtype
) -> None:
    weighting, _ = build(name, num_teachers, num_classes)
    shapes = make_shapes(num_teachers, num_classes)
    step = make_step(shapes, batch, dtype=dtype, teacher_scale=scale, num_unlabelled=batch // 2)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        weights = weighting(step)
    assert weights.dtype == torch.float32
    assert weights.shape == (batch, num_teachers)
    assert bool((weights >= 0).all())
    torch.testing.assert_close(weights.sum(1), torch.ones(batch))
    figures = weighting.diagnostics(weights)
    assert all(bool(value.isfinite().all()) and not value.requires_grad for value in figures.values())
    assert all(sentence.endswith(".") for sentence in diagnose(figures))


@pytest.mark.parametrize("name", NAMES)
def test_permuting_the_teachers_permutes_the_weights(name: str) -> None:
    weighting, step = build(name, 4)
    order = [3, 1, 0, 2]
    permuted = weighting(permute_teachers(step, order, keep_ids=True))
    torch.testing.assert_close(permuted, weighting(step)[:, order])


@pytest.mark.parametrize("name", [name for name in NAMES if not find_weighting(name).by_image])
def test_weights_that_are_the_same_for_all_images_are_no_collapse(name: str) -> None:
    """What weighs whole batches says so, and is not told to the user as a gate that tells no images apart."""
    weighting, step = build(name, 3)
    weights = weighting(step)
    assert torch.equal(weights, weights[:1].expand_as(weights))
    assert all("count the same for all images" in said for said in diagnose(weighting.diagnostics(weights)))


@pytest.mark.parametrize("name", NAMES)
def test_the_order_in_which_the_teachers_answered_the_heldout_images_does_not_matter(name: str) -> None:
    weighting, step = build(name, 3)
    weights = weighting(step)
    heldout = make_step(make_shapes(3), batch=120, seed=1)
    weighting.refit(permute_teachers(heldout, [2, 0, 1], keep_ids=True))
    torch.testing.assert_close(weighting(step), weights, rtol=1e-4, atol=1e-5)
