"""Trainings that are run in one process and in several, for `test_many_ranks.py`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdcompress import ranks
from kdcompress.errors import InputError, RunError
from kdcompress.global_batch import gather
from kdcompress.live_teachers import LiveTeachers
from kdcompress.methods.base import find_method
from kdcompress.networks import Student, TeacherEnsemble
from kdcompress.optim import Optimisation
from kdcompress.train import TrainResult, train
from kdcompress.types import NetworkShapes, TeacherSource
from tests.unit.teacher_cache.made import Opener, make_cache, make_teachers
from tests.unit.tiny import NUM_CLASSES, quiet, tiny_images, tiny_loader, tiny_student


def without_batch_statistics(student: Student) -> Student:
    """Group norms in place of batch norms."""
    for name, module in list(student.network.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, last = name.rpartition(".")
            setattr(student.network.get_submodule(parent), last, nn.GroupNorm(2, module.num_features))
    return student


def distil(
    folder: Path,
    name: str,
    *,
    cached: bool = False,
    per_step: int | None = None,
    batch_norm: bool = False,
    lr: float = 0.01,
    **options: Any,
) -> TrainResult:
    """One small run with shares, refits, clipping, an average, images without labels and batches of unequal size.

    At large rates rounding grows until nothing can be compared: 10⁵ times at 0.05.
    """
    cls = find_method(name)
    needs = cls.needs(**options)
    teachers = make_teachers((0, 1, 2)) if needs.teachers[0] else []
    students = [tiny_student(seed, dropout=0.0) for seed in range(needs.students[0])]
    if not batch_norm:
        students = [without_batch_statistics(student) for student in students]
    loader = tiny_loader()
    source: TeacherSource | None = None
    if cached:
        cache = make_cache(folder / "cache", Opener(teachers), split=loader.split, views=loader.views)
        cache.fill(loader, loader.views.num_views, 64)
        source = cache
    elif teachers:
        source = LiveTeachers(TeacherEnsemble(teachers), needs.teacher_features, per_step=per_step)
    shapes = NetworkShapes(
        NUM_CLASSES, students[0].feature_shapes, tuple(teacher.feature_shapes for teacher in teachers)
    )
    heads = [teacher.head for teacher in teachers] if needs.teacher_heads else []
    torch.manual_seed(5)
    return train(
        students,
        [cls(shapes, heads, **options) for _ in students],
        source,
        loader,
        epochs=2,
        optimisation=Optimisation(lr=lr, ema=0.9, clip_norm=2.0, warmup_epochs=0.5),
        out=folder,
        display=quiet(),
        heldout=tiny_images(61, seed=1),
        heldout_teachers=LiveTeachers(TeacherEnsemble(teachers), needs.teacher_features) if teachers else None,
        val=tiny_images(50, seed=2),
        self_teachers=[student.frozen_copy("own") for student in students] if needs.self_teacher else None,
    )


RUNS: dict[str, Callable[[Path], TrainResult]] = {
    "avg-kd": partial(distil, name="avg-kd"),
    "avg-kd by DIST": partial(distil, name="avg-kd", loss="dist"),
    "avg-kd, one teacher a step": partial(distil, name="avg-kd", per_step=1),
    "avg-kd cached": partial(distil, name="avg-kd", cached=True),
    "amtml-kd": partial(distil, name="amtml-kd", angle_share=0.1, hint_share=0.1),
    "amtml-kd cached": partial(
        distil, name="amtml-kd", cached=True, angle_share=0.1, hint_share=0.1, hint_pool="pooled"
    ),
    "amtml-kd paper": partial(distil, name="amtml-kd", variant="paper", lr=0.002),
    "ca-mkd": partial(distil, name="ca-mkd"),
    "ae-kd": partial(distil, name="ae-kd"),
    "rkd": partial(distil, name="rkd"),
    "ctsl-mkt": partial(distil, name="ctsl-mkt", relations="features"),
    "batch norm": partial(distil, name="rkd", batch_norm=True),
}


def main(folder: str) -> None:
    """Runs all and keeps what came out of them."""
    torch.set_num_threads(1)
    with ranks.joined():
        for name, run in RUNS.items():
            result = run(Path(folder) / name)
            kept = {
                "students": [student.state_dict() for student in result.students],
                "losses": [epoch.losses for epoch in result.history],
                "val": [epoch.val_top1 for epoch in result.history],
            }
            torch.save(kept, Path(folder) / f"{name} {ranks.rank()}.pt")


def talk(folder: str) -> None:
    """Everything that ranks can say to each other, held against what each of them knows."""
    with ranks.joined():
        me, size = ranks.rank(), ranks.size()
        assert (size, ranks.local_rank(), ranks.local_size(), ranks.leads()) == (3, me, 3, me == 0)
        assert [ranks.part(8, number) for number in range(3)] == [slice(0, 2), slice(2, 5), slice(5, 8)]
        assert ranks.largest(me, -me) == (2, 0)
        assert ranks.total(me, 1) == (3, 3)

        whole = torch.arange(16.0).view(8, 2)
        mine = whole[ranks.part(8)].clone().requires_grad_()
        gathered = gather(mine, 8)
        assert torch.equal(gathered.detach(), whole)
        gathered.square().sum().backward()
        assert mine.grad is not None
        assert torch.equal(mine.grad, 2 * whole[ranks.part(8)])
        assert torch.equal(gather(torch.arange(3)[ranks.part(3)], 3), torch.arange(3))

        values = [torch.tensor([0.1, 0.7]), torch.tensor(float(me))]
        before = values[0].clone()
        ranks.average(values)
        assert torch.equal(values[0], before)
        assert float(values[1]) == 1.0
        ranks.add_up(values)
        torch.testing.assert_close(values[0], 3 * before)
        grid = torch.full((2, 2), float(me)).t()
        ranks.take_over([grid])
        assert torch.equal(grid, torch.zeros(2, 2))
        assert ranks.share(b"from 0" if me == 0 else b"") == b"from 0"
        assert ranks.share(b"" if me == 0 else b"lost") == b""
        with ranks.joined():  # within itself it is nothing
            assert ranks.size() == 3
        Path(folder, f"{me}").touch()
        ranks.barrier()
        assert len(list(Path(folder).iterdir())) == 3
    assert ranks.size() == 1


def say(line: str) -> None:
    """In one piece, whoever else is saying something."""
    os.write(1, f"{line}\n".encode())


def lose_one(how: str) -> None:
    """The last rank dies or hangs; the other says what it makes of it."""
    with ranks.joined(answer_seconds=2.0):
        if ranks.leads():
            try:
                ranks.barrier()
            except RunError as error:
                say(error.what)
                os._exit(0)
        if how == "hang":
            time.sleep(6)
        os._exit(0)


def disagree() -> None:
    """One of them has other data; one of them says so."""
    try:
        with ranks.joined():
            ranks.require_same({"recipe": "same", "data": "other" if ranks.rank() == 1 else "this"})
    except InputError as error:
        say(error.what)
    except SystemExit as end:
        say(f"silently {end.code}")
    time.sleep(1.5)  # the store is rank 0's here, torchrun's elsewhere
