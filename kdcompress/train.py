"""The one training loop, in the order in which things happen.

Read `train` first, then `_Run.advance`, which is one step. Nothing inside a step waits for the device: what was
measured is noted there and read at log points (`ledger.py`). The order of images, their views and everything drawn in
a step are functions of (seed, epoch, step), so a run goes on from `last.pt` exactly.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from kdcompress.balance import Balancer, hardly_felt
from kdcompress.checkpoint import (
    LAST,
    Setting,
    environment,
    load_state,
    not_finite,
    require_same,
    save_state,
    seed_step,
)
from kdcompress.data import Split, TrainLoader, eval_batches
from kdcompress.display import Display, Progress, RunLog, format_seconds
from kdcompress.errors import CheckpointError, InputError, InterruptedRunError, NonFiniteError, OutputError
from kdcompress.evaluate import evaluate
from kdcompress.ledger import Ledger
from kdcompress.methods.base import Method
from kdcompress.networks import Student
from kdcompress.optim import Optimisation, WeightAverage, build_optimizer, learning_rate, parameter_groups
from kdcompress.types import Batch, EnsembleOutputs, Images, Logits, LossTerms, Outputs, Share, Step, TeacherSource

Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]
SelfTeacher: TypeAlias = Callable[[Images], Outputs]
"""A student's own pre-trained copy, frozen."""

LOG = "log.jsonl"
"""The log's name in a run folder."""
LOG_EVERY = 50
"""Steps between two log points."""


@dataclass(frozen=True)
class EpochResult:
    """What one epoch brought; tuples have one entry per student.

    Args:
        epoch: counted from 1.
        losses: mean of the weighted loss over the epoch's steps.
        val_top1: accuracy on val, a fraction of 1; empty without val.
        val_top1_ema: the same of the averaged weights; empty without val or average.
        seconds: of the training up to here, all sessions together.
    """

    epoch: int
    losses: tuple[float, ...]
    val_top1: tuple[float, ...]
    val_top1_ema: tuple[float, ...]
    seconds: float


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
    precision: Precision = "fp32",
    heldout: Split | None = None,
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
        teachers: answers for training batches and held-out batches; None for methods without teachers.
        loader: the training images.
        epochs: passes over them.
        optimisation: how the weights are moved.
        out: the run folder; made if missing.
        display: where progress is shown; entered here.
        seed: of whatever is drawn in a step (dropout …).
        device: where to train. The teachers are where their source put them.
        precision: of the networks' passes; losses are always fp32. fp16 scales the loss.
        heldout: images for `Method.refit` at the start of each epoch; None for no refitting.
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
    if last.exists() and not resume:
        raise OutputError(f"{out} already holds a run", where=str(last), fix="--resume, or another folder")
    run = _Run(students, methods, optimisation, device, precision, loader.num_steps, epochs * loader.num_steps, seed)
    settings: dict[str, Setting] = {
        "students": ", ".join(student.arch for student in students),
        "parameters": sum(parameter.numel() for student in students for parameter in student.parameters()),
        "methods": ", ".join(type(method).__name__ for method in methods),
        "seed": seed,
        "batch size": loader.batch_size,
        "steps per epoch": loader.num_steps,
        "precision": precision,
        **asdict(optimisation),
        **(identity or {}),
    }
    with contextlib.closing(RunLog(out / LOG)) as log, display, _Interrupts() as interrupts:
        session = _Session(run, epochs, settings, last, log, display)
        if last.exists():
            session.restore()
        else:
            session.save()
        session.started()

        def stop_if_asked() -> None:
            if interrupts.received is not None:
                session.save()
                raise InterruptedRunError(
                    f"stopped by {interrupts.received} after step {run.step} of {run.num_steps}; the state is saved",
                    where=str(last),
                    fix="run the same command with --resume to go on",
                )

        exam = _HeldOut(heldout, run, teachers, self_teachers) if heldout is not None else None
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
                    session.after_step(len(batch.ids))
                    stop_if_asked()
                    if time.monotonic() - session.saved_at >= checkpoint_every_seconds:
                        session.save()

            session.report_step()
            run.require_finite()
            top1, top1_ema = _validate(run, val, stop_if_asked) if val is not None else ((), ())
            session.finish_epoch(top1, top1_ema)
            session.save()
        run.finish()
    return TrainResult(tuple(run.students), tuple(run.history), run.seconds)


class _Run:
    """Everything that changes while training, all of it in `last.pt`."""

    def __init__(
        self,
        students: Sequence[Student],
        methods: Sequence[Method],
        optimisation: Optimisation,
        device: torch.device,
        precision: Precision,
        steps_per_epoch: int,
        num_steps: int,
        seed: int,
    ) -> None:
        self.students = [student.to(device) for student in students]
        self.methods = [method.to(device) for method in methods]
        self.optimisation = optimisation
        self.device = device
        self.steps_per_epoch = steps_per_epoch
        self.precision = precision
        self.num_steps = num_steps
        self.num_warmup_steps = min(round(optimisation.warmup_epochs * steps_per_epoch), num_steps // 2)
        self.seed = seed
        self.optimizers = [
            build_optimizer(parameter_groups(student, method, optimisation.weight_decay), optimisation, device)
            for student, method in zip(self.students, self.methods, strict=True)
        ]
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.balancers = [Balancer(student.backbone_parameters()) for student in self.students]
        decay = optimisation.ema
        self.averages = [WeightAverage(student, decay) for student in self.students] if decay else []
        self.ledger = Ledger()
        self.weights: list[dict[str, float | Share]] = [{} for _ in self.students]
        self.step = 0
        self.seconds = 0.0
        self.history: list[EpochResult] = []
        self.warned: list[str] = []

    def rate(self, step: int) -> float:
        """The learning rate of one step."""
        settings = self.optimisation
        return learning_rate(
            step,
            self.num_steps,
            base=settings.lr,
            schedule=settings.schedule,
            num_warmup_steps=self.num_warmup_steps,
            milestones=settings.milestones,
            decay=settings.decay,
        )

    def train_mode(self) -> None:
        for module in (*self.students, *self.methods):
            module.train()

    def eval_mode(self) -> None:
        for module in (*self.students, *self.methods):
            module.eval()

    def autocast(self) -> torch.autocast:
        """Where the networks run; the losses do not."""
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.precision != "fp32")

    def ask(self, images: Images) -> list[Outputs]:
        """What each student says."""
        with self.autocast():
            return [_full_precision(student(images)) for student in self.students]

    @torch.no_grad()
    def ask_teachers(self, batch: Batch, teachers: TeacherSource | None) -> EnsembleOutputs | None:
        """What the teachers say."""
        if teachers is None:
            return None
        with self.autocast():
            answer = teachers(batch)
        features = tuple({name: value.float() for name, value in maps.items()} for maps in answer.features)
        return EnsembleOutputs(answer.logits.float(), features, answer.teacher_ids)

    @torch.no_grad()
    def ask_self_teachers(
        self, images: Images, self_teachers: Sequence[SelfTeacher] | None
    ) -> Sequence[Outputs | None]:
        """What each student's own pre-trained copy says."""
        if self_teachers is None:
            return [None] * len(self.students)
        with self.autocast():
            return [_full_precision(self_teacher(images)) for self_teacher in self_teachers]

    def steps(
        self,
        batch: Batch,
        outputs: Sequence[Outputs],
        answers: EnsembleOutputs | None,
        own: Sequence[Outputs | None],
    ) -> Iterator[Step]:
        """What each method gets to see: its student with gradient, the others without."""
        for index, output in enumerate(outputs):
            yield Step(
                labels=batch.labels,
                label_targets=batch.label_targets,
                student=output,
                teachers=answers,
                peers=tuple(peer.detach() for other, peer in enumerate(outputs) if other != index),
                self_teacher=own[index],
                student_index=index,
                progress=self.step / self.num_steps,
            )

    def advance(
        self, batch: Batch, teachers: TeacherSource | None, self_teachers: Sequence[SelfTeacher] | None
    ) -> None:
        """One training step on a batch that is on the device."""
        seed_step(self.seed, self.step, self.device)
        answers = self.ask_teachers(batch, teachers)
        own = self.ask_self_teachers(batch.images, self_teachers)
        outputs = self.ask(batch.images)

        measured: dict[str, Tensor] = {}
        for index, step in enumerate(self.steps(batch, outputs, answers, own)):
            losses: LossTerms = self.methods[index](step)
            loss = self._weigh(index, losses)
            torch.autograd.backward(self.scaler.scale(loss))
            measured[f"{index}/loss"] = loss.detach()
            measured |= {f"{index}/terms/{name}": term.value.detach() for name, term in losses.terms.items()}
            measured |= {f"{index}/diagnostics/{name}": value for name, value in losses.diagnostics.items()}

        rate = self.rate(self.step)
        for index, optimizer in enumerate(self.optimizers):
            for group in optimizer.param_groups:
                group["lr"] = rate
            if self.optimisation.clip_norm is not None:
                self.scaler.unscale_(optimizer)
                bound = self.optimisation.clip_norm
                norm = nn.utils.clip_grad_norm_(self.students[index].parameters(), bound)
                nn.utils.clip_grad_norm_(self.methods[index].parameters(), bound)
                measured[f"{index}/gradient_norm"] = norm
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        for average in self.averages:
            average.update(self.step)

        self.ledger.note(self.step, measured)
        self.step += 1

    def _weigh(self, index: int, losses: LossTerms) -> Tensor:
        """The sum of the terms under their factors; the terms are measured first if it is time."""
        balancer = self.balancers[index]
        weights = {name: term.weight for name, term in losses.terms.items()}
        self.weights[index] = weights
        if balancer.due(self.step, weights):
            balancer.measure(losses.terms, scale=self.scaler.scale(torch.ones((), device=self.device)))
        factors = balancer.factors(weights)
        acting = [
            losses.terms[name].value * factor
            for name, factor in factors.items()
            if isinstance(factor, Tensor) or factor != 0
        ]
        if not acting:
            raise InputError(f"every term of the loss has weight 0: {', '.join(weights)}", where="the method's weights")
        return torch.stack(acting).sum()

    def require_finite(self) -> None:
        """Waits for the device.

        Raises:
            NonFiniteError: a loss since the last time, or a weight, is not finite.
        """
        self.ledger.settle()
        weights = {
            "student": [student.state_dict() for student in self.students],
            "method": [dict(method.named_parameters()) for method in self.methods],
            "optimizer": [optimizer.state_dict()["state"] for optimizer in self.optimizers],
            "average": [average.state_dict() for average in self.averages],
        }
        name = not_finite(weights)
        if name is not None:
            raise NonFiniteError(
                f"after step {self.step} {name} is not finite, though every loss was",
                where=f"the last losses: {self.ledger.describe_last()}",
                fix="a lower train.lr, train.clip_norm=5, or train.precision=fp32",
            )

    def state_dict(self) -> dict[str, Any]:
        return {
            "students": [student.state_dict() for student in self.students],
            "methods": [method.state_dict() for method in self.methods],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "balancers": [balancer.state_dict() for balancer in self.balancers],
            "averages": [average.state_dict() for average in self.averages],
            "ledger": self.ledger.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "history": [asdict(epoch) for epoch in self.history],
            "warned": self.warned,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for modules, states in ((self.students, state["students"]), (self.methods, state["methods"])):
            for module, saved in zip(modules, states, strict=True):
                module.load_state_dict(saved)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.scaler.load_state_dict(state["scaler"])
        for balancer, saved in zip(self.balancers, state["balancers"], strict=True):
            balancer.load_state_dict(saved, self.device)
        for average, saved in zip(self.averages, state["averages"], strict=True):
            average.load_state_dict(saved)
        self.ledger.load_state_dict(state["ledger"])
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.history = [EpochResult(**epoch) for epoch in state["history"]]
        self.warned = list(state["warned"])

    def finish(self) -> None:
        """Gives the students the weights that are exported."""
        for average in self.averages:
            average.apply()
        self.eval_mode()


class _Session:
    """This process's part of a run: its clock, what it shows and logs, what it saves."""

    def __init__(
        self, run: _Run, epochs: int, settings: Mapping[str, Setting], last: Path, log: RunLog, display: Display
    ) -> None:
        self.run = run
        self.epochs = epochs
        self.settings = settings
        self.last = last
        self.log = log
        self.display = display
        self.saved_at = self.begun = time.monotonic()
        self.seconds_before = 0.0
        self.first_step = 0
        self.waited = 0.0
        self.num_images = 0
        self.clock = time.monotonic()
        self.progress = Progress(1, epochs, 0, run.steps_per_epoch)

    def save(self) -> None:
        """Writes `last.pt`.

        Raises:
            NonFiniteError: the state is not finite; the old file stays.
        """
        self.run.require_finite()
        self.run.seconds = self.seconds
        state = {
            "epochs": self.epochs,
            "settings": dict(self.settings),
            "environment": environment(self.run.device),
            "log_bytes": self.log.position(),
            "run": self.run.state_dict(),
        }
        save_state(self.last, state)
        self.saved_at = time.monotonic()

    def restore(self) -> None:
        """Goes on from `last.pt`; what the log says of later steps is forgotten.

        Raises:
            CheckpointError: damaged, or of another run.
        """
        state = load_state(self.last)
        if state["epochs"] != self.epochs:
            raise CheckpointError(
                f"{self.last} is of a training of {state['epochs']} epochs, not {self.epochs}",
                where="train.epochs",
                fix="the learning rate depends on it: resume with the same number, or start anew in another folder",
            )
        require_same(state["settings"], self.settings, self.last)
        try:
            self.run.load_state_dict(state["run"])
        except (KeyError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{self.last} does not fit this run: {reason}", where="--resume") from error
        self.log.truncate(state["log_bytes"])
        self.seconds_before = self.run.seconds
        self.first_step = self.run.step
        here = environment(self.run.device)
        for name, value in state["environment"].items():
            if here.get(name) != value:
                self.warn(f"{name} was {value} and is now {here.get(name)}: the last bits of the result may differ")

    def started(self) -> None:
        """Tells where this session begins."""
        if self.first_step:
            self.display.note(f"resumed after step {self.first_step} of {self.run.num_steps}")
        self.log.write("session", step=self.first_step, settings=dict(self.settings), **environment(self.run.device))

    def warn(self, text: str) -> None:
        """A warning, shown and logged."""
        self.display.warn(text)
        self.log.write("warning", step=self.run.step, text=text)

    @property
    def seconds(self) -> float:
        """Spent in this training, all sessions together."""
        return self.seconds_before + time.monotonic() - self.begun

    def start_clock(self) -> None:
        """Starts to measure the speed anew."""
        self.waited, self.num_images, self.clock = 0.0, 0, time.monotonic()

    def timed(self, batches: Iterator[Batch]) -> Generator[Batch, None, None]:
        """The batches, the time that each was waited for taken down; they are let go of at the end."""
        try:
            while True:
                asked = time.monotonic()
                batch = next(batches, None)
                self.waited += time.monotonic() - asked
                if batch is None:
                    return
                yield batch
        finally:
            if isinstance(batches, Generator):
                batches.close()

    def after_step(self, num_images: int) -> None:
        """Shows where the run is, and logs if it is time."""
        run = self.run
        self.num_images += num_images
        if run.step % LOG_EVERY == 0:
            self.report_step()
        done = run.step - self.first_step
        left = (run.num_steps - run.step) * (time.monotonic() - self.begun) / done
        epoch, step = divmod(run.step - 1, run.steps_per_epoch)
        self.progress = replace(self.progress, epoch=epoch + 1, step=step + 1, seconds_left=left)
        self.display.show(self.progress)

    def report_step(self) -> None:
        """Reads what was measured since the last time, logs it and warns of terms that are hardly felt.

        Raises:
            NonFiniteError: a loss was not finite.
        """
        run = self.run
        run.ledger.settle()
        means = _nested(run.ledger.window.take())
        if not means:
            return
        elapsed = time.monotonic() - self.clock
        images_per_s, data_wait = self.num_images / elapsed, self.waited / elapsed
        self.start_clock()
        students = []
        for index, weights in enumerate(run.weights):
            shares = _numbers(run.balancers[index].shares(weights))
            factors = _numbers(run.balancers[index].factors(weights))
            students.append({**means[str(index)], "shares": shares, "factors": factors})
            for name, share in shares.items():
                if hardly_felt(share, weights[name]) and f"{index}/{name}" not in run.warned:
                    run.warned.append(f"{index}/{name}")
                    self.warn(f"the term {name} makes {share:.2%} of the gradient on the backbone: it is hardly felt")
        self.log.write(
            "step",
            epoch=(run.step - 1) // run.steps_per_epoch + 1,
            step=run.step,
            lr=run.rate(run.step - 1),
            students=students,
            images_per_s=images_per_s,
            data_wait=data_wait,
            seconds=self.seconds,
        )
        terms: dict[str, float] = {}
        felt: dict[str, float] = {}
        for index, student in enumerate(students):
            prefix = f"{index}:" if len(students) > 1 else ""
            terms |= {f"{prefix}loss": student["loss"]}
            terms |= {f"{prefix}{name}": value for name, value in student["terms"].items()}
            felt |= {f"{prefix}{name}": value for name, value in student["shares"].items()}
        self.progress = replace(self.progress, terms=terms, shares=felt, images_per_s=images_per_s, data_wait=data_wait)

    def finish_epoch(self, top1: tuple[float, ...], top1_ema: tuple[float, ...]) -> None:
        """Logs the epoch and adds it to the history."""
        run = self.run
        means = _nested(run.ledger.epoch.take())
        students = [means[str(index)] for index in range(len(run.students))]
        losses = tuple(student["loss"] for student in students)
        result = EpochResult(len(run.history) + 1, losses, top1, top1_ema, self.seconds)
        run.history.append(result)
        self.log.write("epoch", **asdict(result), step=run.step, students=students)
        parts = [f"epoch {result.epoch}/{self.epochs}", f"loss {_listing(losses, '.4g')}"]
        if top1:
            parts.append(f"val {_listing([value * 100 for value in top1], '.2f')} %")
        if top1_ema:
            parts.append(f"average {_listing([value * 100 for value in top1_ema], '.2f')} %")
        parts.append(format_seconds(result.seconds))
        self.display.note(" · ".join(parts))


class _HeldOut:
    """The held-out images as the methods want them; what the teachers say of them is asked for once."""

    def __init__(
        self,
        split: Split,
        run: _Run,
        teachers: TeacherSource | None,
        self_teachers: Sequence[SelfTeacher] | None,
    ) -> None:
        self._split = split
        self._run = run
        self._teachers = teachers
        self._self_teachers = self_teachers
        self._kept: list[list[Step]] = []

    def refit(self, stop_if_asked: Callable[[], None]) -> list[Mapping[str, float]]:
        """Refits every method on all held-out images in eval mode; what each found."""
        run = self._run
        run.eval_mode()
        steps: list[list[Step]] = [[] for _ in run.students]
        for number, batch in enumerate(eval_batches(self._split, run.students[0].num_classes)):
            stop_if_asked()
            for index, step in enumerate(self._steps(number, batch.to(run.device))):
                steps[index].append(step)
        return [method.refit(_join(parts)) for method, parts in zip(run.methods, steps, strict=True)]

    @torch.no_grad()
    def _steps(self, number: int, batch: Batch) -> list[Step]:
        """One batch for each method, reduced; the teachers' part comes from the first time."""
        run = self._run
        outputs = run.ask(batch.images)
        if number < len(self._kept):
            own: Sequence[Outputs | None] = [kept.self_teacher for kept in self._kept[number]]
            fresh = run.steps(batch, outputs, None, own)
            steps = [
                replace(step, teachers=kept.teachers) for step, kept in zip(fresh, self._kept[number], strict=True)
            ]
        else:
            answers = run.ask_teachers(batch, self._teachers)
            own = run.ask_self_teachers(batch.images, self._self_teachers)
            steps = list(run.steps(batch, outputs, answers, own))
        reduced = [method.reduce_heldout(step) for method, step in zip(run.methods, steps, strict=True)]
        if number == len(self._kept):
            self._kept.append([replace(step, student=Outputs(step.student.logits), peers=()) for step in reduced])
        return reduced


class _Interrupts:
    """Takes down the first SIGINT or SIGTERM inside the block; a second one acts as it did outside."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._take_down)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take_down(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self.__exit__()


def _validate(run: _Run, val: Split, stop_if_asked: Callable[[], None]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The accuracy of each student and of its averaged weights."""
    run.eval_mode()
    num_classes = run.students[0].num_classes

    def accuracy(student: Student, batches: Iterable[Batch]) -> float:
        def predict(images: Images) -> Logits:
            with run.autocast():
                outputs: Outputs = student(images.to(run.device))
            return outputs.logits.float()

        return evaluate(predict, batches, num_classes).top1

    def stoppable() -> Iterator[Batch]:
        for batch in eval_batches(val, num_classes):
            stop_if_asked()
            yield batch

    top1 = tuple(accuracy(student, stoppable()) for student in run.students)
    top1_ema = []
    for student, average in zip(run.students, run.averages, strict=False):
        with average.applied():  # nothing is saved in here
            top1_ema.append(accuracy(student, eval_batches(val, num_classes)))
    return top1, tuple(top1_ema)


def _full_precision(outputs: Outputs) -> Outputs:
    return Outputs(outputs.logits.float(), {name: value.float() for name, value in outputs.features.items()})


def _join(steps: Sequence[Step]) -> Step:
    """Several batches as one."""
    first = steps[0]
    return replace(
        first,
        labels=torch.cat([step.labels for step in steps]),
        label_targets=torch.cat([step.label_targets for step in steps]),
        student=_join_outputs([step.student for step in steps]),
        teachers=_join_answers([step.teachers for step in steps if step.teachers is not None]),
        peers=tuple(_join_outputs(peer) for peer in zip(*(step.peers for step in steps), strict=True)),
        self_teacher=_join_outputs([step.self_teacher for step in steps if step.self_teacher is not None])
        if first.self_teacher is not None
        else None,
    )


def _join_outputs(parts: Sequence[Outputs]) -> Outputs:
    return Outputs(torch.cat([part.logits for part in parts]), _join_features([part.features for part in parts]))


def _join_answers(parts: Sequence[EnsembleOutputs]) -> EnsembleOutputs | None:
    if not parts:
        return None
    features = tuple(_join_features(maps) for maps in zip(*(part.features for part in parts), strict=True))
    return EnsembleOutputs(torch.cat([part.logits for part in parts]), features, parts[0].teacher_ids)


def _join_features(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _numbers(values: Mapping[str, Tensor | float]) -> dict[str, float]:
    """All of them read at once."""
    tensors = [value for value in values.values() if isinstance(value, Tensor)]
    read = iter(torch.stack(tensors).tolist() if tensors else [])
    return {name: next(read) if isinstance(value, Tensor) else value for name, value in values.items()}


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """`{"0/terms/kl": 1.2}` as `{"0": {"terms": {"kl": 1.2}}}`."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        *path, last = name.split("/", 2)
        place = result
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return result


def _listing(values: Iterable[float], form: str) -> str:
    return " / ".join(format(value, form) for value in values)
