"""Every method, found by its file name, in each of its variants: what the trainer may rely on."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kdcompress.discovery import CARD_HEADINGS, list_options
from kdcompress.errors import RecipeError
from kdcompress.methods.base import Method, card, check_options, find_method, list_methods
from kdcompress.types import LossTerms, NetworkShapes, Outputs, Share, Step
from kdcompress.weightings.base import list_weightings
from tests.made_steps import TinyStudent, make_heads, make_shapes, make_step, permute_teachers

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "amtml-kd": [
        {},
        {"angle_share": 0.1, "hint_share": 0.2},
        {"angle_share": 0.1, "hint_share": 0.2, "hint_pool": "pooled"},
        {"variant": "paper", "hint_pool": "pooled"},
        {"variant": "paper"},
        {"variant": "paper", "official_compat": True},
        {"loss": "dist", "mix": "losses"},
        {"variant": "paper", "loss": "dkd", "mix": "losses"},
    ],
    "avg-kd": [
        {},
        {"loss": "dkd"},
        {"loss": "dist"},
        {"standardise": True},
        {"mix": "logits"},
        {"mix": "losses", "loss": "dkd", "standardise": True},
        {"mix": "losses", "loss": "dist"},
    ],
    "ctsl-mkt": [{}, {"relations": "features"}, {"distance_weight": 1.0, "angle_weight": 2.0}],
    "ca-mkd": [{}, {"hint_pool": "pooled"}, {"normalise": "official"}, {"loss": "dkd"}],
    "ae-kd": [{}, {"loss": "dkd"}],
    "fitnet-mkd": [{}, {"hint_pool": "pooled"}, {"loss": "dist"}],
    "rkd": [{}, {"relations": "logits"}, {"loss": "dkd", "mix": "losses"}],
    "weighted-kd": [{"weighting": name} for name in list_weightings()],
}
"""Options that make a method another one; only the defaults where nothing stands here."""
METHOD_TERMS = {"regulariser"}
"""Terms of a method's own parameters alone."""
CASES = [
    pytest.param(name, options, id="-".join([name, *map(str, options.values())]))
    for name in list_methods()
    for options in VARIANTS.get(name, [{}])
]


def label_terms(name: str, options: dict[str, Any]) -> set[str]:
    """Terms that ask the labels; no other may depend on them."""
    asks = {"labels"}
    if options.get("loss") == "dkd" or "confidence" in options.values() or name == "ca-mkd":
        asks.add("soft_targets")
    return asks | {"hints"} if name == "ca-mkd" else asks


def labelled_only(name: str) -> set[str]:
    """Terms that an image without a label has no part in."""
    return {"labels", "hints"} if name == "ca-mkd" else {"labels"}


def shapes_for(name: str, options: dict[str, Any], num_teachers: int = 3, num_classes: int = 5) -> NetworkShapes:
    least, most = find_method(name).needs(**options).teachers
    return make_shapes(min(max(num_teachers, least), most), num_classes)


def build(name: str, options: dict[str, Any], shapes: NetworkShapes) -> Method:
    torch.manual_seed(0)
    cls = find_method(name)
    return cls(shapes, make_heads(shapes) if cls.needs(**options).teacher_heads else (), **options)


def step_for(name: str, options: dict[str, Any], shapes: NetworkShapes, batch: int = 6, **changes: Any) -> Step:
    """A step with all that the method asks for."""
    needs = find_method(name).needs(**options)
    return make_step(shapes, batch, num_peers=needs.students[0] - 1, self_teacher=needs.self_teacher, **changes)


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


class FrozenHead(nn.Module):
    """A classifier with weights that could be trained by mistake."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.linear(features.mean((2, 3)))
        return logits


def test_the_known_ones_are_found() -> None:
    assert {"ae-kd", "fitnet-mkd", "rkd"} <= set(list_methods())
    assert {"amtml-kd", "avg-kd", "ca-mkd", "ctsl-mkt", "dml", "supervised", "weighted-kd"} <= set(list_methods())


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
    assume(num_classes > 2 or not options.get("standardise"))
    shapes = shapes_for(name, options, num_teachers, num_classes)
    method = build(name, options, shapes)
    step = step_for(
        name,
        options,
        shapes,
        batch,
        dtype=dtype,
        teacher_scale=scale,
        num_unlabelled=min(num_unlabelled, batch),
        progress=progress,
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
        step = step_for(name, options, shapes, batch=8, seed=number)
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
    method.eval()  # the statistics of a batch would tie its images together
    step = step_for(name, options, shapes, batch=6, num_unlabelled=3)
    for term_name, term in method(step).terms.items():
        found = student_gradients(term.value, step)
        assert found or term_name in METHOD_TERMS, f"{term_name} teaches the student nothing"
        for gradient in found:
            unlabelled, labelled = gradient.abs().sum(1)[:3], gradient.abs().sum(1)[3:]
            assert bool((labelled > 0).all()), term_name
            assert bool((unlabelled == 0).all() if term_name in labelled_only(name) else (unlabelled > 0).all()), (
                term_name
            )


@pytest.mark.parametrize(("name", "options"), CASES)
def test_only_the_label_terms_depend_on_labels(name: str, options: dict[str, Any]) -> None:
    shapes = shapes_for(name, options)
    method = build(name, options, shapes)
    step = step_for(name, options, shapes, batch=6)
    blind = step_for(name, options, shapes, batch=6, num_unlabelled=6)
    seen, unseen = method(step).terms, method(blind).terms
    for term_name in seen.keys() - label_terms(name, options):
        torch.testing.assert_close(seen[term_name].value, unseen[term_name].value, msg=term_name)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_neither_the_step_nor_the_random_state_is_touched(name: str, options: dict[str, Any]) -> None:
    shapes = shapes_for(name, options)
    method = build(name, options, shapes)
    step, untouched = step_for(name, options, shapes, batch=130), step_for(name, options, shapes, batch=130)
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
    step = step_for(name, options, shapes, batch=100)
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
    step = step_for(name, options, shapes)
    few = build(name, options, shapes)(step).terms
    if "soft_targets" not in few or options.get("official_compat"):
        pytest.skip("no soft targets, or the released code's own scaling by the number of classes")
    if options.get("standardise") or options.get("loss") == "dist":
        pytest.skip("the mean over the classes is part of this loss")
    if step.teachers is None:
        pytest.skip("no teachers")

    def padded(outputs: Outputs) -> Outputs:
        return replace(outputs, logits=F.pad(outputs.logits, (0, num_classes - 5), value=-1e4))

    many = Step(
        labels=step.labels,
        label_targets=F.pad(step.label_targets, (0, num_classes - 5)),
        student=padded(step.student),
        teachers=replace(step.teachers, logits=F.pad(step.teachers.logits, (0, num_classes - 5), value=-1e4)),
        peers=tuple(padded(peer) for peer in step.peers),
        self_teacher=None if step.self_teacher is None else padded(step.self_teacher),
    )
    value = build(name, options, replace(shapes, num_classes=num_classes))(many).terms["soft_targets"].value
    torch.testing.assert_close(value, few["soft_targets"].value)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_order_of_the_teachers_does_not_matter(name: str, options: dict[str, Any]) -> None:
    shapes = shapes_for(name, options)
    step = step_for(name, options, shapes)
    if step.teachers is None:
        pytest.skip("no teachers")
    method = build(name, options, shapes)
    permuted = permute_teachers(step, [2, 0, 1], keep_ids=True)
    for term_name, term in method(step).terms.items():
        torch.testing.assert_close(method(permuted).terms[term_name].value, term.value, msg=term_name)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_nothing_of_the_teachers_is_trained_or_saved(name: str, options: dict[str, Any]) -> None:
    """Their classifiers are used, but are no part of the method."""
    shapes = shapes_for(name, options)
    cls = find_method(name)
    heads = [FrozenHead(list(stages.values())[-1][0], shapes.num_classes) for stages in shapes.teachers]
    method = cls(shapes, heads if cls.needs(**options).teacher_heads else (), **options)
    owned = {id(tensor) for head in heads for tensor in head.parameters()}
    assert owned.isdisjoint(id(tensor) for tensor in method.state_dict(keep_vars=True).values())
    assert owned.isdisjoint(id(parameter) for parameter in method.parameters())
    step = step_for(name, options, shapes)
    total(method(step)).backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for head in heads for parameter in head.parameters())
    if step.teachers is not None:
        assert not step.teachers.logits.requires_grad


@pytest.mark.parametrize(
    ("name", "options"), [case for case in CASES if find_method(str(case.values[0])).needs().teachers[0] == 0]
)
def test_teachers_may_be_missing(name: str, options: dict[str, Any]) -> None:
    shapes = make_shapes(0)
    step = step_for(name, options, shapes)
    value = total(build(name, options, shapes)(step))
    value.backward()  # type: ignore[no-untyped-call]
    assert bool(value.isfinite())
    assert step.student.logits.grad is not None
