"""One process's part of a training: what it shows, logs and saves, and how it is interrupted."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from kdcompress import ranks
from kdcompress.balance import hardly_felt
from kdcompress.checkpoint import Setting, environment, load_state, require_same, save_state
from kdcompress.display import Display, Progress, RunLog, format_seconds
from kdcompress.errors import CheckpointError
from kdcompress.memory import PeakMemory
from kdcompress.training_step import EpochResult, Run
from kdcompress.types import Batch
from kdcompress.weightings.base import diagnose

LOG_EVERY = 50
"""Steps between two log points; the end of an epoch is one as well."""


class Session:
    """This process's part of a run: its clock, what it shows and logs, what it saves."""

    def __init__(
        self, run: Run, epochs: int, settings: Mapping[str, Setting], last: Path, log: RunLog, display: Display
    ) -> None:
        self.run = run
        self.epochs = epochs
        self.settings = settings
        self.last = last
        self.log = log
        self.display = display
        self.saved_at = self.begun = time.monotonic()
        self.warm_at: float | None = None
        self.seconds_before = 0.0
        self.first_step = 0
        self.waited = 0.0
        self.num_images = 0
        self.clock = time.monotonic()
        self.progress = Progress(1, epochs, 0, run.steps_per_epoch)
        self.memory = PeakMemory(run.device)

    def save(self) -> None:
        """Writes `last.pt`; of several processes the leading one does, and the others wait for it.

        Raises:
            NonFiniteError: the state is not finite; the old file stays.
        """
        self.run.share_statistics()
        self.run.require_finite()
        self.run.seconds = self.seconds
        if ranks.leads():
            state = {
                "epochs": self.epochs,
                "settings": dict(self.settings),
                "environment": environment(self.run.device),
                "log_bytes": self.log.position(),
                "run": self.run.state_dict(),
            }
            save_state(self.last, state)
        ranks.barrier()
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
        if run.step % LOG_EVERY == 0 or run.step % run.steps_per_epoch == 0:
            self.report_step()
        if self.warm_at is None:  # the first step also loads kernels, or compiles them
            self.warm_at = time.monotonic()
        done = run.step - self.first_step - 1
        left = (run.num_steps - run.step) * (time.monotonic() - self.warm_at) / done if done else None
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
        peak = self.memory.read_mb()
        self.log.write("epoch", **asdict(result), step=run.step, students=students, peak_memory_mb=peak)
        parts = [f"epoch {result.epoch}/{self.epochs}", f"loss {_listing(losses, '.4g')}"]
        if top1:
            parts.append(f"val {_listing([value * 100 for value in top1], '.2f')} %")
        if top1_ema:
            parts.append(f"average {_listing([value * 100 for value in top1_ema], '.2f')} %")
        parts.append(format_seconds(result.seconds))
        self.display.note(" · ".join(parts))
        for index, student in enumerate(students):
            self.tell_weights(index, diagnose(student.get("diagnostics", {})))

    def tell_weights(self, index: int, sentences: Sequence[str]) -> None:
        """Shows and logs what is to be said of the teachers' weights, whenever it is another thing than before."""
        for sentence in sentences:
            claim = sentence.partition(" (")[0]
            if self.run.claims.get(str(index)) != claim:
                self.run.claims[str(index)] = claim
                self.display.note(sentence)
                self.log.write("weights", epoch=len(self.run.history), student=index, text=sentence)


class Interrupts:
    """Takes down the first SIGINT and the first SIGTERM inside the block; a second of a kind acts as it did outside.

    Both may come at once, from a terminal and from what watches over the run: that is one request to stop.

    Of several processes each may be signalled more than once, by the terminal and by torchrun, so all later ones are
    left to torchrun, which kills what has not ended after 30 seconds.

    Attributes:
        received: the number of the first signal; 0 if there was none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._take_down)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take_down(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        if ranks.size() == 1:
            handler = self._before[signal.Signals(number)]
            signal.signal(number, handler)  # of this kind alone: the other may be on its way


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
