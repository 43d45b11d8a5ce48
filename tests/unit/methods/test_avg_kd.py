import torch
from torch.nn import functional as F

from kdcompress.methods.avg_kd import AverageKD
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
    assert AverageKD.needs(label_weight=0.0).labels == "none"
    assert AverageKD.needs().labels == "soft"
    assert list(AverageKD(shapes, label_weight=0.0)(step).terms) == ["soft_targets"]
    assert torch.isfinite(AverageKD(shapes)(step).terms["labels"].value)
