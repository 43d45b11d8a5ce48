import math

import pytest
import torch

from kdcompress.errors import InputError, ShapeError
from kdcompress.types import NetworkShapes
from kdcompress.weightings import base
from tests.made_steps import make_shapes, make_step


def test_find_weighting_names_the_nearest() -> None:
    assert base.find_weighting("heldout-gate") is base.find_weighting("heldout_gate")
    with pytest.raises(InputError, match="did you mean 'latent-factors'"):
        base.find_weighting("latent-factor")


def test_describe_weights() -> None:
    weights = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])
    figures = base.describe_weights(weights)
    entropies = [-sum(w * math.log(w) for w in row) for row in weights.tolist()]
    torch.testing.assert_close(figures["teacher_weight_mean"], torch.tensor([0.3, 0.225, 0.475]))
    torch.testing.assert_close(figures["teacher_weight_std"], torch.tensor([0.2, 0.025, 0.225]))
    assert float(figures["teacher_weight_entropy"]) == pytest.approx(sum(entropies) / 2 / math.log(3))


@pytest.mark.parametrize("num_teachers", [1, 3])
def test_entropy_of_certain_and_uniform_weights(num_teachers: int) -> None:
    certain = torch.eye(num_teachers)[[0, 0]]
    assert float(base.describe_weights(certain)["teacher_weight_entropy"]) == 0.0
    uniform = torch.full((2, 3), 1 / 3)
    assert float(base.describe_weights(uniform)["teacher_weight_entropy"]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ([[0.6, 0.4], [0.3, 0.7]], None),
        ([[0.6, 0.4], [0.6, 0.4]], "collapsed to fixed ones"),
        ([[0.999, 0.001], [0.992, 0.008]], "collapsed to one teacher"),
        ([[1.0], [1.0]], None),
    ],
)
def test_diagnose_a_learned_gate(weights: list[list[float]], sentence: str | None) -> None:
    said = base.diagnose(base.describe_weights(torch.tensor(weights)))
    assert (len(said) == 1 and sentence in said[0]) if sentence else said == ()


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        (base.UNFITTED, "--holdout"),
        (base.UNIFORM, "Averaging is best for these teachers"),
        (base.STATIC, "resnet32 0.500, resnet44 0.500"),
        (
            base.ANSWERS,
            "from what they answer, which is better than averaging (mean weights resnet32 0.500, resnet44 0",
        ),
        (base.STUDENT, "image by image from what the student sees, which"),
        (base.BOTH, "image by image from what they answer and what the student sees, which"),
    ],
)
def test_diagnose_a_fitted_gate_from_logged_numbers(choice: int, sentence: str) -> None:
    logged = {
        "teacher_weight_mean": [0.5, 0.5],
        "teacher_weight_std": [0.0, 0.0],
        "gate_choice": float(choice),
        "gate_gain": 0.01,
        "gate_gain_error": 0.02,
    }
    said = base.diagnose(logged, ("resnet32", "resnet44"))
    assert len(said) == 1
    assert sentence in said[0]


def test_weights_of_a_whole_batch_are_told_where_they_differ() -> None:
    logged = {"teacher_weight_mean": [0.7, 0.3], "teacher_weight_entropy": 0.9}
    (said,) = base.diagnose(logged, ("resnet32", "resnet44"))
    assert said == "The teachers count the same for all images of a batch (resnet32 0.700, resnet44 0.300)."
    assert base.diagnose({"teacher_weight_mean": [0.5, 0.5]}) == ()


def test_nothing_is_said_where_nothing_was_weighed() -> None:
    assert base.diagnose({"something": torch.tensor(1.0)}) == ()


def test_a_step_without_teachers_and_a_student_without_features_are_refused() -> None:
    with pytest.raises(ShapeError, match="has none"):
        base.teachers_of(make_step(make_shapes(num_teachers=0)))
    with pytest.raises(ShapeError, match="last feature map"):
        base.last_stage(NetworkShapes(2, {}, ({},)))
