import numpy as np
import pytest
import torch

from kdcompress.errors import ShapeError
from kdcompress.methods.fitnet_mkd import FitNetMKD, middle_stage
from kdcompress.types import FeatureForm, NetworkShapes
from tests.made_steps import STAGES, make_shapes, make_step


@pytest.mark.parametrize("hint_pool", ["map", "pooled"])
def test_the_hints_against_the_equation(hint_pool: FeatureForm) -> None:
    shapes = make_shapes(2)
    method, step = FitNetMKD(shapes, hint_pool=hint_pool), make_step(shapes)
    assert step.teachers is not None

    def seen(maps: torch.Tensor) -> np.ndarray:
        array = maps.detach().double().numpy()
        return np.asarray(array.mean((2, 3), keepdims=True) if hint_pool == "pooled" else array)

    maps, errors = seen(step.student.features["stage2"]), []
    for regressor, features in zip(method.regressors, step.teachers.features, strict=True):
        kernel = regressor.convolution.weight.detach().double().numpy()[:, :, 0, 0]  # type: ignore[union-attr,operator]
        r = np.einsum("oc,bchw->bohw", kernel, maps)
        r = (r - r.mean((0, 2, 3), keepdims=True)) / np.sqrt(r.var((0, 2, 3), keepdims=True) + 1e-5)
        errors.append(((np.maximum(r, 0) - seen(features["stage2"])) ** 2).mean())
    term = method(step).terms["hints"]
    assert float(term.value.detach()) == pytest.approx(np.mean(errors), rel=1e-5)
    assert term.weight == 100.0


def test_the_hints_have_a_gradient() -> None:
    """They have none in the released code (defect C1)."""
    shapes = make_shapes(2)
    method, step = FitNetMKD(shapes), make_step(shapes)
    method(step).terms["hints"].value.backward()
    assert float(step.student.features["stage2"].grad.abs().min()) > 0  # type: ignore[union-attr]
    assert all(parameter.grad is not None for parameter in method.parameters())


def test_the_larger_of_two_maps_is_pooled_to_the_size_of_the_smaller() -> None:
    """The student's from 4 × 4 to 2 × 2 for the first teacher, the second teacher's from 8 × 8 to 4 × 4."""
    shapes = NetworkShapes(5, STAGES, ({"stage1": (3, 2, 2)}, {"stage1": (3, 8, 8)}))
    method, step = FitNetMKD(shapes), make_step(shapes)
    assert step.teachers is not None
    method.eval()
    errors = []
    for number, features in enumerate(step.teachers.features):
        hint, maps = features["stage1"], step.student.features["stage2"].detach()
        small = hint.reshape(6, 3, 4, 2, 4, 2).mean((3, 5)) if number else hint
        student = maps if number else maps.reshape(6, 6, 2, 2, 2, 2).mean((3, 5))
        errors.append((method.regressors[number](student) - small).square().mean())
    torch.testing.assert_close(method(step).terms["hints"].value, torch.stack(errors).mean())


@pytest.mark.parametrize(("count", "expected"), [(1, "stage1"), (2, "stage1"), (3, "stage2"), (4, "stage2")])
def test_the_middle(count: int, expected: str) -> None:
    assert middle_stage({f"stage{n}": (3, 4, 4) for n in range(1, count + 1)}, "x") == expected


def test_a_teacher_without_maps_is_named() -> None:
    with pytest.raises(ShapeError, match="teacher 2 has no feature maps"):
        FitNetMKD(NetworkShapes(5, STAGES, (STAGES, {})))
