"""Every method in the real loop, with real networks: it learns, and leaves the teachers as they are."""

import copy
import json
from pathlib import Path

import pytest
import torch

from kdcompress.bundle import Preprocess
from kdcompress.data import TrainLoader, build_views, load_splits
from kdcompress.live_teachers import LiveTeachers
from kdcompress.methods.base import find_method, list_methods
from kdcompress.models import build_network
from kdcompress.networks import Student, Teacher, TeacherEnsemble
from kdcompress.optim import Optimisation
from kdcompress.train import train
from kdcompress.types import NetworkShapes
from tests.unit.tiny import quiet

DIGITS = Preprocess(1, 8, 8, (0.5,), (0.25,))


@pytest.mark.parametrize("name", list_methods())
def test_it_trains_and_the_teachers_stay_as_they_are(name: str, tmp_path: Path) -> None:
    """Batch norm's statistics and all, with classifiers that were split off."""
    torch.manual_seed(0)
    splits = load_splits("digits", limit=96, test_limit=10)
    cls = find_method(name)
    needs = cls.needs()
    teachers = [
        Teacher(build_network(arch, num_classes=10, in_channels=1, image_size=8, **arguments), DIGITS, name=arch)
        for arch, arguments in (("resnet8", {}), ("vgg8", {"width": 16}))
    ][: needs.teachers[1]]
    before = [copy.deepcopy(teacher.state_dict()) for teacher in teachers]
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
    train(
        students,
        [cls(shapes, heads) for _ in students],
        LiveTeachers(TeacherEnsemble(teachers)) if teachers else None,
        TrainLoader(splits.train, views, num_classes=10, batch_size=32, seed=0),
        epochs=2,
        optimisation=Optimisation(lr=0.01, warmup_epochs=0.5),
        out=tmp_path,
        display=quiet(),
        heldout=splits.holdout,
        self_teachers=[student.frozen_copy("own") for student in students] if needs.self_teacher else None,
    )
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
