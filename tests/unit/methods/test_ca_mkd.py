"""CA-MKD against an independent float64 computation of each equation, and the defects of its released code."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kdcompress.errors import RecipeError, ShapeError
from kdcompress.methods.avg_kd import AverageKD
from kdcompress.methods.ca_mkd import CAMKD, resize
from kdcompress.types import UNLABELLED, EnsembleOutputs, Head, NetworkShapes, Step
from tests.made_steps import STAGES, make_heads, make_shapes, make_step, permute_teachers

Array = NDArray[np.float64]
T = 4.0


def array(tensor: torch.Tensor) -> Array:
    return tensor.detach().double().numpy()


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def confidence_oracle(logits: Array, labels: Sequence[int]) -> Array:
    """[image, teacher], image by image; `logits` is [image, teacher, class]."""
    rows = []
    for z, y in zip(logits, labels, strict=True):
        count = len(z)
        if y == UNLABELLED or count == 1:
            rows.append(np.full(count, 1 / count))
            continue
        errors = np.array([-np.log(softmax(one)[y]) for one in z])
        share = np.exp(errors) / np.exp(errors).sum()
        rows.append((1 - share) / (count - 1))
    return np.array(rows)


def kl(p: Array, q: Array) -> float:
    return float((p * np.log(p / q)).sum())


def regress(method: CAMKD, number: int, maps: Array) -> Array:
    """1×1 convolution, batch norm by the batch's statistics, ReLU."""
    r = np.einsum("oc,bchw->bohw", array(method.regressors[str(number)].convolution.weight)[:, :, 0, 0], maps)
    r = (r - r.mean((0, 2, 3), keepdims=True)) / np.sqrt(r.var((0, 2, 3), keepdims=True) + 1e-5)
    return np.maximum(r, 0)


def same_size_shapes(num_teachers: int = 3) -> NetworkShapes:
    """The student's last map is 2 × 2, the teachers' are 2 × 2 and 1 × 1 in turn."""
    stages = [{"stage1": (4, 8, 8), "stage2": (7 + t, 2 - t % 2, 2 - t % 2)} for t in range(num_teachers)]
    return NetworkShapes(5, STAGES, tuple(stages))


def hint_oracle(method: CAMKD, step: Step, matrices: list[Array]) -> float:
    assert step.teachers is not None
    maps = array(step.student.features["stage3"])
    errors, answers = [], []
    for number, features in enumerate(step.teachers.features):
        hint = array(features["stage2"])
        source = maps if hint.shape[2] == 2 else maps.mean((2, 3), keepdims=True)
        regressed = regress(method, number, source)
        errors.append(((regressed - hint) ** 2).mean((1, 2, 3)))
        answers.append(regressed.mean((2, 3)) @ matrices[number])
    v = confidence_oracle(np.stack(answers, 1), step.labels.tolist())
    labelled = [i for i, y in enumerate(step.labels.tolist()) if y != UNLABELLED]
    return float(np.mean([(v[i] * np.stack(errors, 1)[i]).sum() for i in labelled]))


@pytest.mark.parametrize("num_teachers", [1, 2, 3])
@pytest.mark.parametrize("normalise", ["sum", "official"])
def test_every_term_against_the_equations(num_teachers: int, normalise: Any) -> None:
    torch.manual_seed(0)
    shapes = same_size_shapes(num_teachers)
    heads = make_heads(shapes)
    matrices = [array(head(torch.eye(7 + t)[:, :, None, None])) for t, head in enumerate(heads)]
    method = CAMKD(shapes, heads, normalise=normalise)
    step = make_step(shapes, num_unlabelled=2)
    assert step.teachers is not None
    z, teachers, y = array(step.student.logits), array(step.teachers.logits), array(step.label_targets)
    w = confidence_oracle(teachers, step.labels.tolist())
    count = num_teachers if normalise == "official" else 1
    soft = [
        sum(w[i, k] * T**2 * kl(softmax(teachers[i, k] / T), softmax(z[i] / T)) for k in range(num_teachers))
        for i in range(6)
    ]
    answer = method(step)
    assert {name: float(term.value.detach()) for name, term in answer.terms.items()} == pytest.approx(
        {
            "soft_targets": np.mean(soft) / count,
            "labels": -(y * np.log(softmax(z))).sum() / 4,
            "hints": hint_oracle(method, step, matrices) / count,
        },
        rel=1e-4,
    )
    assert {name: term.weight for name, term in answer.terms.items()} == {
        "soft_targets": 1.0,
        "labels": 1.0,
        "hints": 50.0,
    }
    np.testing.assert_allclose(answer.diagnostics["teacher_weight_mean"], w.mean(0), rtol=1e-5)


def test_uniform_weights_are_averaged_kd() -> None:
    """On images without labels, and from teachers that say the same; the gradient too is that of averaged KD."""
    shapes = make_shapes()
    step = make_step(shapes, num_unlabelled=6)
    CAMKD(shapes)(step).terms["soft_targets"].value.backward()
    mine = step.student.logits.grad
    other = make_step(shapes, num_unlabelled=6)
    AverageKD(shapes)(other).terms["soft_targets"].value.backward()
    torch.testing.assert_close(mine, other.student.logits.grad)


def test_the_hints_reach_the_student_and_the_regressors_but_no_head() -> None:
    """Defects C1 and C4 of the released code."""
    shapes = make_shapes()
    head = torch.nn.Linear(7, 5)
    heads: list[Head | None] = [lambda features: head(features.mean((2, 3))), None, None]
    method, step = CAMKD(shapes, heads), make_step(shapes)
    method(step).terms["hints"].value.backward()
    assert float(step.student.features["stage3"].grad.abs().max()) > 0  # type: ignore[union-attr]
    assert all(float(p.grad.abs().max()) > 0 for p in method.parameters() if p.grad is not None)
    assert method.regressors["0"].convolution.weight.grad is not None
    assert head.weight.grad is None


def test_the_weights_of_the_hints_carry_no_gradient() -> None:
    """The gradient is that of the errors under fixed weights."""
    shapes = make_shapes(2)
    heads = make_heads(shapes)
    method, step = CAMKD(shapes, heads).eval(), make_step(shapes)
    (found,) = torch.autograd.grad(method(step).terms["hints"].value, step.student.features["stage3"])
    assert step.teachers is not None
    maps = step.student.features["stage3"].detach().requires_grad_()
    errors, answers = [], []
    for t in range(2):
        regressed = method.regressors[str(t)](torch.nn.functional.interpolate(maps, (4, 4), mode="bilinear"))
        errors.append((regressed - step.teachers.features[t]["stage3"]).square().mean((1, 2, 3)))
        answers.append(array(heads[t](regressed.detach())))
    v = torch.from_numpy(confidence_oracle(np.stack(answers, 1), step.labels.tolist())).float()
    (expected,) = torch.autograd.grad((v * torch.stack(errors, 1)).sum(1).mean(), maps)
    torch.testing.assert_close(found, expected)


def test_teachers_with_maps_of_different_size_in_any_order() -> None:
    """Defect C5: each teacher gets the student's own map."""
    shapes = same_size_shapes(3)
    method, step = CAMKD(shapes, make_heads(shapes)), make_step(shapes)
    one = method(step).terms["hints"].value
    torch.testing.assert_close(method(permute_teachers(step, [1, 2, 0], keep_ids=True)).terms["hints"].value, one)


def test_a_teacher_whose_head_cannot_be_split_off_has_no_part_in_the_hints() -> None:
    shapes = make_shapes()
    heads: list[Head | None] = [*make_heads(shapes)[:2], None]
    method, step = CAMKD(shapes, heads), make_step(shapes)
    assert list(method.regressors) == ["0", "1"]
    assert step.teachers is not None
    other = dict(step.teachers.features[2]) | {"stage3": torch.zeros(6, 9, 4, 4)}
    changed = replace(step.teachers, features=(*step.teachers.features[:2], other))
    assert torch.equal(method(step).terms["hints"].value, method(replace(step, teachers=changed)).terms["hints"].value)
    assert list(CAMKD(shapes, [None, None, None])(step).terms) == ["soft_targets", "labels"]


def test_with_no_label_in_a_batch_the_hints_are_zero() -> None:
    shapes = make_shapes()
    value = CAMKD(shapes, make_heads(shapes))(make_step(shapes, num_unlabelled=6)).terms["hints"].value
    assert float(value.detach()) == 0.0


def test_the_hints_may_begin_later() -> None:
    shapes = make_shapes()
    method = CAMKD(shapes, make_heads(shapes), hint_from=0.5)
    assert "hints" not in method(make_step(shapes, progress=0.49)).terms
    assert "hints" in method(make_step(shapes, progress=0.5)).terms


def test_pooled_hints_are_those_of_the_mean_maps() -> None:
    shapes = make_shapes()
    method, step = CAMKD(shapes, make_heads(shapes), hint_pool="pooled"), make_step(shapes)
    assert CAMKD.needs(hint_pool="pooled").teacher_features == {"last": "pooled"}
    assert step.teachers is not None
    student = step.student.features["stage3"].mean((2, 3), keepdim=True)
    errors, answers = [], []
    for number, (features, head) in enumerate(zip(step.teachers.features, make_heads(shapes), strict=True)):
        mean = array(features["stage3"].mean((2, 3), keepdim=True))
        regressed = regress(method, number, array(student))
        errors.append(((regressed - mean) ** 2).mean((1, 2, 3)))
        answers.append(array(head(torch.from_numpy(regressed).float())))
    weights = confidence_oracle(np.stack(answers, 1), step.labels.tolist())
    expected = (weights * np.stack(errors, 1)).sum(1).mean()
    assert float(method(step).terms["hints"].value.detach()) == pytest.approx(expected, rel=1e-4)


def test_a_head_that_reads_positions_has_no_part_in_pooled_hints() -> None:
    shapes = make_shapes()
    heads: list[Head] = [*make_heads(shapes)[:2], lambda features: features.flatten(1)[:, :5]]
    pooled, whole = CAMKD(shapes, heads, hint_pool="pooled"), CAMKD(shapes, heads)
    assert list(pooled.regressors) == ["0", "1"]
    assert "the classifier of teacher 3 reads more than the mean" in " ".join(pooled.notes)
    assert (list(whole.regressors), whole.notes) == (["0", "1", "2"], ())


def test_needs() -> None:
    assert CAMKD.needs().teacher_heads
    assert not CAMKD.needs(hint_weight=0.0).teacher_heads
    assert not CAMKD.needs(loss="dkd").mixup_allowed


def test_a_student_without_maps_is_refused_unless_there_are_no_hints() -> None:
    shapes = NetworkShapes(5, {}, make_shapes().teachers)
    with pytest.raises(ShapeError, match="hint_weight=0"):
        CAMKD(shapes, make_heads(shapes))
    assert len(CAMKD(shapes, make_heads(shapes), hint_weight=0.0).regressors) == 0


def test_something_must_act_from_the_first_step_on() -> None:
    shapes = make_shapes()
    assert CAMKD(shapes, make_heads(shapes), label_weight=0.0, soft_target_weight=0.0).regressors
    for heads, options in (
        ([], {}),
        (make_heads(shapes), {"hint_from": 0.5}),
        (make_heads(shapes), {"hint_weight": 0.0}),
    ):
        with pytest.raises(RecipeError, match="are all 0"):
            CAMKD(shapes, heads, label_weight=0.0, soft_target_weight=0.0, **options)


def test_two_classes_cannot_be_standardised() -> None:
    with pytest.raises(RecipeError, match="standardise"):
        CAMKD(make_shapes(num_classes=2), standardise=True)


@pytest.mark.parametrize(("size", "expected"), [((2, 2), "mean"), ((8, 8), "bilinear"), ((4, 4), "same")])
def test_resize(size: tuple[int, int], expected: str) -> None:
    maps = torch.randn(2, 3, 4, 4)
    found = resize(maps, *size)
    if expected == "mean":
        np.testing.assert_allclose(found, maps.reshape(2, 3, 2, 2, 2, 2).mean((3, 5)), rtol=1e-5, atol=1e-6)
    elif expected == "same":
        assert found is maps
    else:
        torch.testing.assert_close(found[:, :, 0, 0], maps[:, :, 0, 0])
        torch.testing.assert_close(found[:, :, 1, 1], _blend(maps))


def _blend(maps: torch.Tensor) -> torch.Tensor:
    """Bilinear, half-pixel centres: output pixel 1 of 8 lies at 0.25 of 4."""
    a, b = 0.75, 0.25
    rows = a * maps[:, :, 0] + b * maps[:, :, 1]
    return a * rows[:, :, 0] + b * rows[:, :, 1]


def test_one_good_and_two_bad_teachers() -> None:
    """The published weights for that case: about a half and two quarters, where softmax(-CE) would give 1, 0, 0."""
    logits = torch.tensor([[[8.0, 0.0, 0.0], [0.0, 8.0, 0.0], [0.0, 0.0, 8.0]]])
    shapes = NetworkShapes(3, STAGES, ({},) * 3)
    step = make_step(NetworkShapes(3, STAGES), batch=1)
    labels, targets = torch.zeros(1, dtype=torch.int64), torch.eye(3)[:1]
    teachers = EnsembleOutputs(logits, ({}, {}, {}), (0, 1, 2))
    weights = CAMKD(shapes).weighting(replace(step, labels=labels, label_targets=targets, teachers=teachers))
    np.testing.assert_allclose(weights, [[0.5, 0.25, 0.25]], atol=1e-3)
