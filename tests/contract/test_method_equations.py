"""What methods have in common, computed anew in numpy: one teacher, teachers that count the same, labels, shares."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcompress.balance import Balancer
from kdcompress.discovery import list_options
from kdcompress.methods.base import find_method
from kdcompress.types import Share, Step
from kdcompress.weightings.uniform import Uniform
from tests.contract.test_methods import CASES, METHOD_TERMS, build, shapes_for, step_for
from tests.made_steps import TinyStudent

Array = NDArray[np.float64]
T = 2.5
BATCH = 6
CLASSES = 7
LOGIT_LOSSES = [(loss, standardise) for loss in ("kl", "dkd", "dist") for standardise in (False, True)]


def array(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def standardised(z: Array) -> Array:
    return np.asarray((z - z.mean(-1, keepdims=True)) / (z.std(-1, ddof=1, keepdims=True) + 1e-7))


def kl(q: Array, p: Array) -> float:
    return float((q * np.log(q / p)).sum())


def dkd(q: Array, p: Array, label: int) -> float:
    """The label's class against the rest, and 8 times the rest among themselves; the plain KL without a label."""
    if label < 0:
        return kl(q, p)
    rest = np.arange(len(q)) != label
    split = kl(np.array([q[label], q[rest].sum()]), np.array([p[label], p[rest].sum()]))
    return split + 8 * kl(q[rest] / q[rest].sum(), p[rest] / p[rest].sum())


def against_one(loss: str, teacher: Array, student: Array, labels: list[int]) -> float:
    """The loss at temperature T of a student with one teacher; [image, class] each."""
    q, p = softmax(teacher / T), softmax(student / T)
    if loss == "dist":
        images = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)])
        classes = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)])
        return float(T**2 * (images + classes))
    errors = [kl(a, b) if loss == "kl" else dkd(a, b, y) for a, b, y in zip(q, p, labels, strict=True)]
    return float(T**2 * np.mean(errors))


def with_choices(name: str, options: dict[str, Any], **choices: Any) -> dict[str, Any]:
    """The options with these choices; skipped where the method leaves no such choice."""
    if not find_method(name).needs(**options).teachers[1]:
        pytest.skip("no teachers")
    offered = {option.name for option in list_options(find_method(name))}
    defaults = {"loss": "kl", "standardise": False, "mix": "targets"}
    if any(choice not in offered and value != defaults.get(choice) for choice, value in choices.items()):
        pytest.skip("no choice of the loss at the logits")
    temperature = {"temperature": T} if "temperature" in offered else {}
    return {**options, **temperature, **{key: value for key, value in choices.items() if key in offered}}


def soft_targets(name: str, options: dict[str, Any], step: Step) -> Tensor:
    """The term, without the division by the number of classes that is one of the released code's scalings."""
    method = build(name, options, shapes_for(name, options, step.teachers.logits.shape[1], CLASSES))  # type: ignore[union-attr]
    if step.teachers.logits.shape[1] > 1:  # type: ignore[union-attr]
        if not hasattr(method, "weighting"):
            pytest.skip("no weighting")
        method.weighting = Uniform(method.shapes)
    terms = method(step).terms
    if "soft_targets" not in terms:
        pytest.skip("no soft targets")
    return terms["soft_targets"].value * (CLASSES if options.get("official_compat") else 1)


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize(("loss", "standardise"), LOGIT_LOSSES)
def test_one_teacher_is_classic_distillation(name: str, options: dict[str, Any], loss: str, standardise: bool) -> None:
    """From that teacher's scaled logits; for the KL the gradient is T (softmax(z_S / T) - softmax(z / T)) / batch."""
    options = with_choices(name, options, loss=loss, standardise=standardise)
    step = step_for(name, options, shapes_for(name, options, 1, CLASSES), BATCH, num_unlabelled=1)
    assert step.teachers is not None
    teacher, student = array(step.teachers.logits[:, 0]), array(step.student.logits)
    found = soft_targets(name, options, step)
    (gradient,) = torch.autograd.grad(found, step.student.logits)
    if standardise:
        teacher, student = standardised(teacher), standardised(student)
    elif loss == "kl":
        np.testing.assert_allclose(gradient, T * (softmax(student / T) - softmax(teacher / T)) / BATCH, atol=1e-6)
    assert float(found.detach()) == pytest.approx(against_one(loss, teacher, student, step.labels.tolist()), rel=1e-4)


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("mix", ["targets", "logits", "losses"])
def test_a_uniform_gate_is_averaging(name: str, options: dict[str, Any], mix: str) -> None:
    """Of probabilities, of logits or of losses."""
    others = {key: value for key, value in options.items() if key not in ("loss", "standardise")}
    options = with_choices(name, others, mix=mix)
    step = step_for(name, options, shapes_for(name, options, 3, CLASSES), BATCH)
    assert step.teachers is not None
    teachers, student = array(step.teachers.logits), array(step.student.logits)
    found = soft_targets(name, options, step) * (3 if options.get("normalise") == "official" else 1)
    (gradient,) = torch.autograd.grad(found, step.student.logits)
    target = softmax(teachers.mean(1) / T) if mix == "logits" else softmax(teachers / T).mean(1)
    np.testing.assert_allclose(gradient, T * (softmax(student / T) - target) / BATCH, atol=1e-6)
    expected = T**2 * kl(target, softmax(student / T)) / BATCH
    if mix == "losses":
        expected = T**2 * np.mean([kl(softmax(teachers[:, t] / T), softmax(student / T)) / BATCH for t in range(3)])
    assert float(found.detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_labels_are_cross_entropy_over_the_labelled_images(name: str, options: dict[str, Any]) -> None:
    shapes = shapes_for(name, options, 3, CLASSES)
    step = step_for(name, options, shapes, BATCH, num_unlabelled=2)
    method = build(name, options, shapes)
    temperature = getattr(method, "settings", {}).get("temperature", 1.0) if options.get("official_compat") else 1.0
    log_p = np.log(softmax(array(step.student.logits) / temperature))
    expected = -np.mean([log_p[image, int(step.labels[image])] for image in range(2, BATCH)])
    terms = method(step).terms
    if "labels" not in terms:
        pytest.skip("no labels")
    assert float(terms["labels"].value.detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_terms_have_the_share_of_the_gradient_that_they_ask_for(name: str, options: dict[str, Any]) -> None:
    """On the backbone's weights; a term of fixed weight is multiplied by that weight and nothing else."""
    shapes = shapes_for(name, options)
    method, student = build(name, options, shapes), TinyStudent(3, 5)
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    step = step_for(name, options, shapes, batch=8)
    terms = method(Step(**{**vars(step), "student": student(images)})).terms
    weights = {term_name: term.weight for term_name, term in terms.items()}
    backbone = list(student.stages.parameters())
    balancer = Balancer(backbone)
    balancer.measure(terms, torch.ones(()))
    factors = balancer.factors(weights)
    norms = {}
    for term_name, term in terms.items():
        student.zero_grad()
        (factors[term_name] * term.value).backward(retain_graph=True)  # type: ignore[no-untyped-call]
        gradients = [array(parameter.grad).ravel() for parameter in backbone if parameter.grad is not None]
        norms[term_name] = float(np.linalg.norm(np.concatenate(gradients))) if gradients else 0.0
    assert all(norm > 0 for term_name, norm in norms.items() if term_name not in METHOD_TERMS)
    for term_name, weight in weights.items():
        if isinstance(weight, Share):
            assert norms[term_name] / sum(norms.values()) == pytest.approx(weight.value, rel=1e-3), term_name
        else:
            assert factors[term_name] == weight, term_name
