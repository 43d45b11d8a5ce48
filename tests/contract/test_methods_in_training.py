"""Every method in the real loop, with real networks: it learns, and leaves the teachers as they are."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdcompress.bundle import Preprocess
from kdcompress.data import Splits, TrainLoader, build_views, load_splits
from kdcompress.live_teachers import LiveTeachers
from kdcompress.methods.base import Method, find_method, list_methods
from kdcompress.models import build_network
from kdcompress.networks import Student, Teacher, TeacherEnsemble
from kdcompress.optim import Optimisation
from kdcompress.train import train
from kdcompress.types import NetworkShapes, Share, Step, Term
from tests.unit.tiny import quiet

DIGITS = Preprocess(1, 8, 8, (0.5,), (0.25,))


@dataclass(frozen=True)
class Parts:
    """All that a training of one method is made of."""

    splits: Splits
    loader: TrainLoader
    teachers: list[Teacher]
    students: list[Student]
    methods: list[Method]
    self_teachers: list[Any] | None

    def train(self, out: Path, epochs: int, optimisation: Optimisation) -> None:
        train(
            self.students,
            self.methods,
            LiveTeachers(TeacherEnsemble(self.teachers)) if self.teachers else None,
            self.loader,
            epochs=epochs,
            optimisation=optimisation,
            out=out,
            display=quiet(),
            heldout=self.splits.holdout,
            self_teachers=self.self_teachers,
        )


def prepare(name: str, num_images: int) -> Parts:
    """Real networks on so many digits, in batches of 32."""
    torch.manual_seed(0)
    splits = load_splits("digits", limit=num_images, test_limit=10)
    cls = find_method(name)
    needs = cls.needs()
    teachers = [
        Teacher(build_network(arch, num_classes=10, in_channels=1, image_size=8, **arguments), DIGITS, name=arch)
        for arch, arguments in (("resnet8", {}), ("vgg8", {"width": 16}))
    ][: needs.teachers[1]]
    students = [
        Student(
            build_network("resnet8", num_classes=10, in_channels=1, image_size=8),
            DIGITS,
            arch="resnet8",
            arch_args={},
            num_classes=10,
            in_channels=1,
        )
        for _ in range(needs.students[0])
    ]
    shapes = NetworkShapes(10, students[0].feature_shapes, tuple(teacher.feature_shapes for teacher in teachers))
    heads = [teacher.head for teacher in teachers] if needs.teacher_heads else []
    assert None not in heads
    views = build_views("auto", image_shape=(1, 8, 8), num_images=len(splits.train))
    return Parts(
        splits,
        TrainLoader(splits.train, views, num_classes=10, batch_size=32, seed=0),
        teachers,
        students,
        [cls(shapes, heads) for _ in students],
        [student.frozen_copy("own") for student in students] if needs.self_teacher else None,
    )


@pytest.mark.parametrize("name", list_methods())
def test_it_trains_and_the_teachers_stay_as_they_are(name: str, tmp_path: Path) -> None:
    """Batch norm's statistics and all, with classifiers that were split off."""
    parts = prepare(name, 96)
    teachers = parts.teachers
    before = [copy.deepcopy(teacher.state_dict()) for teacher in teachers]
    parts.train(tmp_path, 2, Optimisation(lr=0.01, warmup_epochs=0.5))
    for teacher, state in zip(teachers, before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in teacher.state_dict().items())
        assert all(parameter.grad is None for parameter in teacher.parameters())
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step"]
    for student in steps[-1]["students"]:
        for term, share in {"rkd": {"distances": 0.1, "angles": 0.2}, "ctsl-mkt": {"angles": 0.1}}.get(
            name, {}
        ).items():
            assert student["shares"][term] == pytest.approx(share, rel=1e-3)
    epochs = [line for line in lines if line["event"] == "epoch"]
    assert epochs[-1]["losses"] < epochs[0]["losses"]


def gradients_of(terms: dict[str, Term], parameters: list[nn.Parameter]) -> dict[str, list[Tensor]]:
    """Of each term before its weight, on each parameter."""
    return {
        name: list(torch.autograd.grad(term.value, parameters, retain_graph=True, materialize_grads=True))
        for name, term in terms.items()
        if term.value.requires_grad
    }


@pytest.mark.parametrize("name", list_methods())
def test_what_is_differentiated_is_the_weighted_sum_of_the_terms(name: str, tmp_path: Path) -> None:
    """One step of plain descent moves every parameter of student and method by the rate times that sum's gradient,
    with s_k Σ |w_f| ‖g_f‖ / ((1 - Σ s) ‖g_k‖) in the place of a share s_k, the norms being those on the backbone."""
    parts = prepare(name, 32)
    students, methods = copy.deepcopy(parts.students), copy.deepcopy(parts.methods)
    (batch,) = parts.loader.epoch(0)
    plain = Optimisation(
        lr=0.01, momentum=0.0, nesterov=False, weight_decay=0.0, schedule="constant", warmup_epochs=0.0
    )
    parts.train(tmp_path, 1, plain)

    for method in methods if methods[0].needs().heldout else ():
        method.load_state_dict(parts.methods[0].state_dict() | dict(method.named_parameters()))  # its refitted gate
    with torch.no_grad():
        teachers = TeacherEnsemble(parts.teachers)(batch.images) if parts.teachers else None
        own = [copied(batch.images) for copied in parts.self_teachers or ()]
    outputs = [student.train()(batch.images) for student in students]
    for index, (student, method) in enumerate(zip(students, methods, strict=True)):
        step = Step(
            batch.labels,
            batch.label_targets,
            outputs[index],
            teachers,
            peers=tuple(other.detach() for number, other in enumerate(outputs) if number != index),
            self_teacher=own[index] if own else None,
            student_index=index,
        )
        terms = dict(method.train()(step).terms)
        backbone = list(student.backbone_parameters())
        norms = {
            term: float(np.sqrt(sum(float(gradient.double().square().sum()) for gradient in found)))
            for term, found in gradients_of(terms, backbone).items()
        }
        fixed = {term: one.weight for term, one in terms.items() if not isinstance(one.weight, Share)}
        shares = {term: one.weight.value for term, one in terms.items() if isinstance(one.weight, Share)}
        whole = sum(abs(weight) * norms[term] for term, weight in fixed.items())
        factors = fixed | {
            term: share * whole / ((1 - sum(shares.values())) * norms[term]) for term, share in shares.items()
        }
        parameters = [*student.parameters(), *method.parameters()]
        found = gradients_of(terms, parameters)
        moved = [*parts.students[index].parameters(), *parts.methods[index].parameters()]
        for number, (before, after) in enumerate(zip(parameters, moved, strict=True)):
            gradient = sum(factors[term] * found[term][number] for term in found)
            torch.testing.assert_close(after - before, -0.01 * gradient, rtol=5e-3, atol=2e-6)
