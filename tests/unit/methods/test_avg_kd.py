from typing import Any

import pytest
import torch
from torch.nn import functional as F

from kdcompress.methods.avg_kd import AverageKD
from kdcompress.types import EnsembleOutputs, NetworkShapes, Outputs, Step
from tests.made_steps import make_shapes, make_step


def test_it_is_the_kl_to_the_mean_of_the_probabilities() -> None:
    shapes = make_shapes()
    step = make_step(shapes)
    assert step.teachers is not None
    terms = AverageKD(shapes, temperature=3.0, label_weight=0.2)(step).terms
    mean = (step.teachers.logits / 3).softmax(2).mean(1)
    expected = 9 * F.kl_div((step.student.logits / 3).log_softmax(1), mean, reduction="batchmean")
    torch.testing.assert_close(terms["soft_targets"].value, expected)
    torch.testing.assert_close(terms["labels"].value, F.cross_entropy(step.student.logits, step.labels))
    assert terms["soft_targets"].weight == 1.0
    assert terms["labels"].weight == 0.2


def test_one_teacher_is_classic_kd() -> None:
    shapes = make_shapes(num_teachers=1)
    step = make_step(shapes)
    assert step.teachers is not None
    value = AverageKD(shapes, temperature=4.0)(step).terms["soft_targets"].value
    teacher = (step.teachers.logits[:, 0] / 4).softmax(1)
    expected = 16 * F.kl_div((step.student.logits / 4).log_softmax(1), teacher, reduction="batchmean")
    torch.testing.assert_close(value, expected)


def test_without_a_label_loss_it_needs_no_labels() -> None:
    shapes = make_shapes()
    step = make_step(shapes, num_unlabelled=6)
    assert list(AverageKD(shapes, label_weight=0.0)(step).terms) == ["soft_targets"]
    assert torch.isfinite(AverageKD(shapes)(step).terms["labels"].value)


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({}, True),
        ({"mix": "losses"}, True),
        ({"mix": "logits"}, False),
        ({"loss": "dist", "mix": "losses"}, True),
        ({"loss": "dist"}, False),
        ({"standardise": True}, True),
    ],
)
def test_one_sampled_teacher_has_the_same_gradient_on_average_where_it_says_so(
    options: dict[str, Any], same: bool
) -> None:
    assert AverageKD.needs(**options).teachers_may_be_sampled == same
    torch.manual_seed(0)
    teachers, logits = 3 * torch.randn(6, 3, 5), torch.randn(6, 5)
    method = AverageKD(NetworkShapes(5, {}, ({}, {}, {})), label_weight=0.0, **options)

    def gradient(numbers: tuple[int, ...]) -> torch.Tensor:
        student = logits.clone().requires_grad_()
        answers = EnsembleOutputs(teachers[:, list(numbers)], tuple({} for _ in numbers), numbers)
        labels = torch.zeros(6, dtype=torch.int64)
        targets = F.one_hot(labels, 5).float()
        step = Step(labels=labels, label_targets=targets, student=Outputs(student), teachers=answers, progress=0.0)
        method(step).terms["soft_targets"].value.backward()
        assert student.grad is not None
        return student.grad

    mean = torch.stack([gradient((number,)) for number in range(3)]).mean(0)
    assert torch.allclose(mean, gradient((0, 1, 2)), atol=1e-6) == same
