"""The one training loop, in the order in which things happen.

One step is `Run.advance` in `training_step.py`. The order of images, their views and everything drawn in a step are
functions of (seed, epoch, step), so a run goes on from `last.pt` exactly. Several processes (`ranks`) go through it
in step: each has its part of every batch and the same weights, and what one of them is asked to do, all do.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from kdcompress import ranks
from kdcompress.checkpoint import LAST, Setting, seed_step
from kdcompress.data import Split, TrainLoader, eval_batches
from kdcompress.display import Display, RunLog
from kdcompress.errors import InterruptedRunError, NonFiniteError, OutputError, VerificationError
from kdcompress.evaluate import evaluate
from kdcompress.execution import PLAIN, Execution
from kdcompress.heldout import HeldOut
from kdcompress.methods.base import Method
from kdcompress.networks import Student
from kdcompress.optim import Optimisation
from kdcompress.training_session import Interrupts, Session
from kdcompress.training_step import EpochResult, Run, SelfTeacher
from kdcompress.types import Batch, Images, Logits, Outputs, TeacherSource

LOG = "log.jsonl"
"""The log's name in a run folder."""


@dataclass(frozen=True)
class TrainResult:
    """What a training brought.

    Args:
        students: the trained students in eval mode; with their averaged weights if there is an average.
        history: every epoch, in order.
        seconds: spent in training, all sessions together.
    """

    students: tuple[Student, ...]
    history: tuple[EpochResult, ...]
    seconds: float


def train(
    students: Sequence[Student],
    methods: Sequence[Method],
    teachers: TeacherSource | None,
    loader: TrainLoader,
    *,
    epochs: int,
    optimisation: Optimisation,
    out: Path,
    display: Display,
    seed: int = 0,
    device: torch.device | str = "cpu",
    execution: Execution = PLAIN,
    heldout: Split | None = None,
    heldout_teachers: TeacherSource | None = None,
    val: Split | None = None,
    self_teachers: Sequence[SelfTeacher] | None = None,
    identity: Mapping[str, Setting] | None = None,
    resume: bool = False,
    checkpoint_every_seconds: float = 120.0,
) -> TrainResult:
    """Trains the students, each by its own method, and leaves `last.pt` and `log.jsonl` in `out`.

    Args:
        students: moved to `device` and trained in place; where they start is the caller's matter.
        methods: one for each student, each its own object.
        teachers: answers for training batches; None for methods without teachers.
        loader: the training images.
        epochs: passes over them.
        optimisation: how the weights are moved.
        out: the run folder; made if missing.
        display: where progress is shown; entered here.
        seed: of whatever is drawn in a step (dropout …).
        device: where to train. The teachers are where their source put them.
        execution: of the students; losses are always fp32. fp16 scales the loss.
        heldout: images for `Method.refit` at the start of each epoch; None for no refitting.
        heldout_teachers: answers for held-out batches, where those come from elsewhere than `teachers`.
        val: images whose accuracy is measured after each epoch.
        self_teachers: one for each student, where the methods need them.
        identity: what else a resumed run has to agree in, e.g. the digest of the data.
        resume: go on from `out/last.pt` if it is there; from the start if it is not.
        checkpoint_every_seconds: longest time between two saved states; one is saved after every epoch anyway.

    Raises:
        NonFiniteError: the loss or the weights are not finite; the last saved state is finite.
        InterruptedRunError: SIGINT or SIGTERM came; the state after the last whole step was saved.
        CheckpointError: `last.pt` is damaged or belongs to another run.
        OutputError: `out` cannot be written to, or holds a run already.
        InputError: a method's shares add up to 1 or more, or none of its terms has a weight.
    """
    device = torch.device(device)
    last = out / LAST
    (begun,) = ranks.largest(int(ranks.leads() and last.exists()))
    if begun and not resume:
        raise OutputError(f"{out} already holds a run", where=str(last), fix="--resume, or another folder")
    run = Run(students, methods, optimisation, device, execution, loader.num_steps, epochs * loader.num_steps, seed)
    settings: dict[str, Setting] = {
        "students": ", ".join(student.arch for student in students),
        "parameters": sum(parameter.numel() for student in students for parameter in student.parameters()),
        "methods": ", ".join(type(method).__name__ for method in methods),
        "seed": seed,
        "batch size": loader.batch_size,
        "steps per epoch": loader.num_steps,
        "execution": execution.describe(),
        **asdict(optimisation),
        **(identity or {}),
    }
    run.start_alike()
    log_file = out / LOG if ranks.leads() else Path(os.devnull)
    with contextlib.closing(RunLog(log_file)) as log, display, Interrupts() as interrupts:
        session = Session(run, epochs, settings, last, log, display)
        if begun:
            session.restore()
        else:
            session.save()
        session.started()

        def stop_if_asked() -> None:
            (received,) = ranks.largest(interrupts.received)
            if received:
                session.save()
                name = signal.Signals(received).name
                raise InterruptedRunError(
                    f"stopped by {name} after step {run.step} of {run.num_steps}; the state is saved",
                    where=str(last),
                    fix="run the same command with --resume to go on",
                )

        wanted = any(type(method).refit is not Method.refit for method in methods)
        exam = None
        if heldout is not None and wanted:
            exam = HeldOut(heldout, run, heldout_teachers or teachers, self_teachers)
        for epoch in range(len(run.history), epochs):
            start = run.step - epoch * loader.num_steps
            if exam is not None and start == 0:
                seed_step(seed, run.step, device)
                for index, found in enumerate(exam.refit(stop_if_asked)):
                    log.write("refit", epoch=epoch + 1, student=index, **found)

            run.train_mode()
            session.start_clock()
            with contextlib.closing(session.timed(loader.epoch(epoch, start))) as batches:
                for batch in batches:
                    run.advance(batch.to(device), teachers, self_teachers)
                    session.after_step(batch.global_size)
                    stop_if_asked()
                    (old,) = ranks.largest(int(time.monotonic() - session.saved_at >= checkpoint_every_seconds))
                    if old:
                        session.save()

            run.require_finite()
            top1, top1_ema = _validate(run, val, stop_if_asked) if val is not None else ((), ())
            session.finish_epoch(top1, top1_ema)
            session.save()
        run.share_statistics()
        run.finish()
    return TrainResult(tuple(run.students), tuple(run.history), run.seconds)


def _validate(run: Run, val: Split, stop_if_asked: Callable[[], None]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The accuracy of each student and of its averaged weights; of several processes each asks about its part."""
    run.share_statistics()
    run.eval_mode()
    num_classes = run.students[0].num_classes

    def accuracy(student: Student, batches: Iterable[Batch]) -> float:
        def predict(images: Images) -> Logits:
            with run.autocast():
                outputs: Outputs = student(images.to(run.device))
            return outputs.logits.float()

        try:
            found = evaluate(predict, batches, num_classes)
        except VerificationError as error:
            raise NonFiniteError(
                f"the student's answers on val are not finite after step {run.step}",
                fix="a lower train.lr, train.clip_norm=5, or train.precision=fp32",
            ) from error
        correct, count = ranks.total(round(found.top1 * found.n), found.n)
        return correct / count

    def stoppable() -> Iterator[Batch]:
        for batch in eval_batches(val, num_classes, divided=True):
            stop_if_asked()
            yield batch

    top1 = tuple(accuracy(student, stoppable()) for student in run.students)
    top1_ema = []
    for student, average in zip(run.students, run.averages, strict=False):
        with average.applied():  # nothing is saved in here
            top1_ema.append(accuracy(student, eval_batches(val, num_classes, divided=True)))
    return top1, tuple(top1_ema)
