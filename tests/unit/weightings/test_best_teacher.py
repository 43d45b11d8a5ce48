from dataclasses import replace

import torch

from kdcompress.weightings.best_teacher import BestTeacher
from tests.made_steps import make_shapes, make_step, permute_teachers


def test_the_teacher_that_is_right_most_often_is_taken() -> None:
    shapes = make_shapes(3)
    weighting, step = BestTeacher(shapes), make_step(shapes, batch=100)
    torch.testing.assert_close(weighting(step), torch.full((100, 3), 1 / 3))
    assert step.teachers is not None
    step.teachers.logits[:, 1] += 20 * step.label_targets
    found = weighting.refit(permute_teachers(step, [1, 2, 0], keep_ids=True))
    assert found == {"heldout_images": 100.0, "teacher": 2.0, "top1": 1.0}
    assert weighting(make_step(shapes)).tolist() == [[0.0, 1.0, 0.0]] * 6


def test_of_equals_the_one_with_the_lower_nll_and_without_labels_the_choice_stays() -> None:
    shapes = make_shapes(2)
    weighting, step = BestTeacher(shapes), make_step(shapes, batch=50)
    assert step.teachers is not None
    for teacher, sureness in ((0, 5.0), (1, 20.0)):
        step.teachers.logits[:, teacher] = sureness * step.label_targets
    assert weighting.refit(step)["teacher"] == 2.0
    assert weighting.refit(replace(step, labels=torch.full_like(step.labels, -1))) == {"heldout_images": 0.0}
    assert weighting(step)[0].tolist() == [0.0, 1.0]
