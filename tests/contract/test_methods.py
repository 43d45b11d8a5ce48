"""Every method, found by its file name, in each of its variants: what the trainer may rely on."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kdcompress.discovery import CARD_HEADINGS, list_options
from kdcompress.errors import RecipeError
from kdcompress.methods.base import Method, card, check_options, find_method, list_methods
from kdcompress.types import LossTerms, NetworkShapes, Share, Step
from tests.made_steps import TinyStudent, make_shapes, make_step

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "amtml-kd": [
        {},
        {"hint_pool": "pooled"},
        {"variant": "paper"},
        {"variant": "paper", "hint_pool": "pooled"},
        {"variant": "paper", "official_compat": True},
    ],
}
"""Options that make a method another one; only the defaults where nothing stands here."""
CASES = [
    pytest.param(name, options, id="-".join([name, *map(str, options.values())]))
    for name in list_methods()
    for options in VARIANTS.get(name, [{}])
]
LABEL_TERMS = {"labels"}
"""Terms that ask the labels; no other may depend on them."""


def shapes_for(name: str, options: dict[str, Any], num_teachers: int = 3, num_classes: int = 5) -> NetworkShapes:
    least, most = find_method(name).needs(**options).teachers
    return make_shapes(min(max(num_teachers, least), most), num_classes)


def build(name: str, options: dict[str, Any], shapes: NetworkShapes) -> Method:
    torch.manual_seed(0)
    return find_method(name)(shapes, **options)


def strength(weight: float | Share) -> float:
    return weight.value if isinstance(weight, Share) else weight


def total(answer: LossTerms) -> Tensor:
    return torch.stack([term.value * strength(term.weight) for term in answer.terms.values()]).sum()


def student_gradients(value: Tensor, step: Step) -> list[Tensor]:
    """The gradient on each of the student's outputs that the value depends on; image by image."""
    outputs = [step.student.logits, *step.student.features.values()]
    if not value.requires_grad:
        return []
    found = torch.autograd.grad(value, outputs, retain_graph=True, allow_unused=True)
    return [gradient.flatten(1) for gradient in found if gradient is not None]


def test_the_known_ones_are_found() -> None:
    assert {"amtml-kd", "avg-kd", "supervised"} <= set(list_methods())


@pytest.mark.parametrize("name", list_methods())
def test_card_and_documentation(name: str) -> None:
    content = card(name)
    assert tuple(content.sections) == CARD_HEADINGS
    assert content.title.endswith(".")
    assert all(content.sections.values())
    cls = find_method(name)
    assert isinstance(cls.paper, str)
    assert all(f"{option.name}:" in (cls.__doc__ or "") for option in list_options(cls))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_options_are_checked(name: str, options: dict[str, Any]) -> None:
    cls = find_method(name)
    assert check_options(cls, options) == options
    with pytest.raises(RecipeError, match=r"unknown key 'method\.no_such_option'"):
        check_options(cls, {**options, "no_such_option": 1})
    for option in list_options(cls):
        with pytest.raises(RecipeError, match=option.name):
            check_options(cls, {option.name: [object()]})


@pytest.mark.parametrize(("name", "options"), CASES)
@given(
    batch=st.sampled_from([1, 2, 5]),
    num_teachers=st.integers(1, 4),
    num_classes=st.sampled_from([2, 10, 1000]),
    scale=st.sampled_from([0.0, 1.0, 1000.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    num_unlabelled=st.integers(0, 5),
    progress=st.sampled_from([0.0, 0.3, 1.0]),
)
@settings(max_examples=25, deadline=None)
def test_finite_in_value_and_gradient(
    name: str,
    options: dict[str, Any],
    batch: int,
    num_teachers: int,
    num_classes: int,
    scale: float,
    dtype: torch.dtype,
    num_unlabelled: int,
    progress: float,
) -> None:
    """For one teacher or more, a batch of one, very sure and clueless teachers, with and without labels."""
    shapes = shapes_for(name, options, num_teachers, num_classes)
    method = build(name, options, shapes)
    step = make_step(
        shapes, batch, dtype=dtype, teacher_scale=scale, num_unlabelled=min(num_unlabelled, batch), progress=progress
    )
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        answer = method(step)
    assert answer.terms
    for term_name, term in answer.terms.items():
        assert term.value.shape == (), term_name
        assert term.value.dtype == torch.float32, term_name
        assert bool(term.value.isfinite()), term_name
        assert strength(term.weight) > 0, term_name
    total(answer).backward()  # type: ignore[no-untyped-call]
    tensors = [step.student.logits, *step.student.features.values(), *method.parameters()]
    assert all(bool(tensor.grad.isfinite().all()) for tensor in tensors if tensor.grad is not None)
    assert all(bool(value.isfinite().all()) and not value.requires_grad for value in answer.diagnostics.values())


@pytest.mark.parametrize(("name", "options"), CASES)
def test_every_parameter_has_learned_after_three_steps(name: str, options: dict[str, Any]) -> None:
    """Of the method and of the student, over the terms as they are weighted."""
    shapes = shapes_for(name, options)
    method = build(name, options, shapes)
    student = TinyStudent(3, 5)
    parameters = {**dict(student.named_parameters()), **{f"method.{n}": p for n, p in method.named_parameters()}}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.05)
    learned = set()
    for number in range(3):
        step = make_step(shapes, batch=8, seed=number)
        generator = torch.Generator().manual_seed(number)
        step = replace(step, student=student(torch.randn(8, 3, 16, 16, generator=generator)))
        optimizer.zero_grad()
        total(method(step)).backward()  # type: ignore[no-untyped-call]
        learned |= {n for n, p in parameters.items() if p.grad is not None and float(p.grad.abs().max()) > 0}
        optimizer.step()
    assert learned == parameters.keys()


@pytest.mark.parametrize(("name", "options"), CASES)
def test_unlabelled_images_count_in_every_term_that_needs_no_label(name: str, options: dict[str, Any]) -> None:
    shapes = shapes_for(name, options)
    method = build(name, options, shapes)
    for parameter in method.parameters():
        nn.init.normal_(parameter)
    step = make_step(shapes, batch=6, num_unlabelled=3)
    for term_name, term in method(step).terms.items():
        for gradient in student_gradients(term.value, step):
            unlabelled, labelled = gradient.abs().sum(1)[:3], gradient.abs().sum(1)[3:]
            assert bool((labelled > 0).all()), term_name
            assert bool((unlabelled == 0).all() if term_name in LABEL_TERMS else (unlabelled > 0).all()), term_name


@pytest.mark.parametrize(("name", "options"), CASES)
def test_only_the_label_terms_depend_on_labels(name: str, options: dict[str, Any]) -> None:
    shapes = shapes_for(name, options)
    method = build(name, options, shapes)
    step = make_step(shapes, batch=6)
    blind = make_step(shapes, batch=6, num_unlabelled=6)
    seen, unseen = method(step).terms, method(blind).terms
    for term_name in seen.keys() - LABEL_TERMS:
        torch.testing.assert_close(seen[term_name].value, unseen[term_name].value, msg=term_name)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_neither_the_step_nor_the_random_state_is_touched(name: str, options: dict[str, Any]) -> None:
    shapes = shapes_for(name, options)
    method = build(name, options, shapes)
    step, untouched = make_step(shapes, batch=130), make_step(shapes, batch=130)
    state = torch.get_rng_state()
    first, second = method(step), method(step)
    method.refit(method.reduce_heldout(step))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(step.student.logits, untouched.student.logits)
    if step.teachers is not None and untouched.teachers is not None:
        assert torch.equal(step.teachers.logits, untouched.teachers.logits)
    for term_name, term in first.terms.items():
        assert torch.equal(term.value, second.terms[term_name].value), term_name


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_state_is_all_there_is(name: str, options: dict[str, Any]) -> None:
    """A method made anew answers the same after `load_state_dict`, so a resumed run goes on as it was."""
    shapes = shapes_for(name, options)
    method = build(name, options, shapes)
    for parameter in method.parameters():
        nn.init.normal_(parameter)
    step = make_step(shapes, batch=100)
    method.refit(method.reduce_heldout(step))
    method(step)
    other = build(name, options, shapes)
    other.load_state_dict(method.state_dict())
    method.eval()
    other.eval()
    for term_name, term in method(step).terms.items():
        assert torch.equal(term.value, other(step).terms[term_name].value), term_name


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("num_classes", [10, 1000])
def test_classes_of_no_probability_do_not_change_the_soft_targets(
    name: str, options: dict[str, Any], num_classes: int
) -> None:
    """So the strength of the soft targets does not depend on the number of classes."""
    shapes = shapes_for(name, options, num_classes=5)
    step = make_step(shapes)
    few = build(name, options, shapes)(step).terms
    if "soft_targets" not in few or options.get("official_compat"):
        pytest.skip("no soft targets, or the released code's own scaling by the number of classes")
    assert step.teachers is not None
    wider = torch.nn.functional.pad(step.student.logits, (0, num_classes - 5), value=-1e4)
    many = Step(
        labels=step.labels,
        label_targets=torch.nn.functional.pad(step.label_targets, (0, num_classes - 5)),
        student=replace(step.student, logits=wider),
        teachers=replace(
            step.teachers, logits=torch.nn.functional.pad(step.teachers.logits, (0, num_classes - 5), value=-1e4)
        ),
    )
    value = build(name, options, replace(shapes, num_classes=num_classes))(many).terms["soft_targets"].value
    torch.testing.assert_close(value, few["soft_targets"].value)
