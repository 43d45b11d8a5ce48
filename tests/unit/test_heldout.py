"""Many held-out batches become one step for each method."""

import torch

from kdcompress.data import eval_batches
from kdcompress.execution import Execution
from kdcompress.heldout import HeldOut
from kdcompress.optim import Optimisation
from kdcompress.training_step import Run
from kdcompress.types import Step
from tests.unit.tiny import NUM_CLASSES, Everything, TinyTeachers, tiny_images, tiny_student


class Keeping(Everything):
    def reduce_heldout(self, step: Step) -> Step:
        return step


def test_each_method_gets_its_student_its_peers_and_its_own_copy_for_all_images() -> None:
    students, copies = [tiny_student(seed).eval() for seed in (0, 1)], [tiny_student(seed).eval() for seed in (2, 3)]
    methods = [Keeping(seed) for seed in (0, 1)]
    run = Run(students, methods, Optimisation(), torch.device("cpu"), Execution(), 5, 10, 0)
    split, teachers = tiny_images(600), TinyTeachers()
    exam = HeldOut(split, run, teachers, copies)
    stops: list[int] = []
    found = [exam.refit(lambda: stops.append(1)) for _ in range(2)]
    assert len(stops) == 6
    assert teachers.calls == 3
    assert [set(one) for one in found[0]] == [{"temperature"}, {"temperature"}]

    images = torch.cat([batch.images for batch in eval_batches(split, NUM_CLASSES)])
    with torch.no_grad():
        said, own = [student(images) for student in students], [copy(images) for copy in copies]
    for index, method in enumerate(methods):
        for step in method.refitted:
            assert step.student_index == index
            assert torch.equal(step.labels, split.labels)
            assert not step.student.logits.requires_grad
            pairs = [(step.student, said[index]), (step.peers[0], said[1 - index]), (step.self_teacher, own[index])]
            for given, expected in pairs:
                torch.testing.assert_close(given.logits, expected.logits, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(dict(given.features), dict(expected.features), rtol=1e-4, atol=1e-5)
