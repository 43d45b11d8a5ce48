"""Which way to run a network is fastest on this machine: measured, since no other machine tells."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from kdcompress.errors import InputError
from kdcompress.execution import Execution, Precision, autocast, compiled, why_not_compiled
from kdcompress.live_teachers import LiveTeachers
from kdcompress.networks import Student, TeacherEnsemble
from kdcompress.types import Batch, FeatureForm, Images

WORTH_PROBING_SECONDS = 60.0
"""Of a training or a filling in plain fp32; shorter ones are run plainly, and alike on every machine."""
WORTH_COMPILING_SECONDS = 600.0
"""Of what would be left without compiling."""
CLEARLY_FASTER = 1.15
"""By this factor a way has to be faster to be taken in the place of a plainer one."""
ROUNDS = 3


@dataclass(frozen=True)
class Wanted:
    """What may be chosen from; a choice of one is no choice.

    Args:
        precisions: the plainest first.
        channels_last: None for whichever is faster.
        compiled: None for whichever is faster.
    """

    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    channels_last: bool | None = None
    compiled: bool | None = None

    @property
    def plain(self) -> Execution:
        """The plainest way that is allowed."""
        return Execution(self.precisions[0], bool(self.channels_last), bool(self.compiled))

    def not_compiled(self) -> list[Execution]:
        """Every way that is allowed, before compiling; the plainest first."""
        layouts = (False, True) if self.channels_last is None else (self.channels_last,)
        return [Execution(precision, layout) for precision in self.precisions for layout in layouts]


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why.

    Args:
        execution: the way to run it.
        seconds: of one call, of the ways that were timed.
        note: a sentence on what could not be tried; empty where nothing was.
    """

    execution: Execution
    seconds: Mapping[Execution, float]
    note: str = ""

    def describe(self) -> str:
        """In words: the way, how it compares with the plainest, and the note."""
        plain = next(iter(self.seconds), self.execution)
        faster = ""
        if self.execution != plain and self.execution in self.seconds:
            ratio = self.seconds[plain] / self.seconds[self.execution]
            faster = f" ({ratio:.1f} × as fast as {plain.describe()} here)"
        return f"{self.execution.describe()}{faster}{'; ' + self.note if self.note else ''}"


def choose(
    wanted: Wanted, build: Callable[[Execution], Callable[[], None]], num_calls: int, device: torch.device
) -> Choice:
    """Times the ways that are allowed, interleaved, and takes the fastest if it is clearly faster.

    Args:
        wanted: what is allowed.
        build: makes the call that is timed, for one way to run it.
        num_calls: that the work will take; what is short is not probed, and only what is long is compiled.
        device: where it runs.

    Raises:
        InputError: compiling is asked for, and cannot be done on this machine.
    """
    missing = why_not_compiled(device)
    if wanted.compiled and missing:
        raise InputError(f"cannot compile: {missing}", where="compile=true", fix="compile=auto")
    ways = wanted.not_compiled()
    if len(ways) == 1 and wanted.compiled is not None:
        return Choice(replace(ways[0], compiled=wanted.compiled), {})
    plain = build(ways[0])
    seconds = {ways[0]: min(_time([plain], device, rounds=2)[0])}
    if seconds[ways[0]] * num_calls < WORTH_PROBING_SECONDS:
        return Choice(wanted.plain, {})
    calls = [plain, *(build(way) for way in ways[1:])]
    seconds = {way: min(taken) for way, taken in zip(ways, _time(calls, device, ROUNDS), strict=True)}
    best = _clearly_fastest(seconds)
    note = ""
    if wanted.compiled:
        best = replace(best, compiled=True)
    elif wanted.compiled is None and seconds[best] * num_calls >= WORTH_COMPILING_SECONDS:
        note = f"not compiled: {missing}" if missing else ""
        if not missing:
            layout = ways[-1].channels_last  # kernels that are compiled like the channels innermost
            way = Execution(best.precision, layout, compiled=True)
            begun = time.perf_counter()
            call = build(way)
            call()
            compiling = time.perf_counter() - begun
            mine, other = _time([call, calls[ways.index(best)]], device, ROUNDS)
            seconds[way] = min(mine)
            saved = (min(other) - min(mine)) * num_calls
            if saved > compiling and min(other) > CLEARLY_FASTER * min(mine):
                best = way
    return Choice(best, seconds, note)


def student_step(student: Student, images: Images, device: torch.device) -> Callable[[Execution], Callable[[], None]]:
    """For `choose`: one forward and backward pass of a copy of the student in training mode.

    Args:
        student: not changed.
        images: one training batch.
        device: where it is trained.
    """

    def build(execution: Execution) -> Callable[[], None]:
        own = copy.deepcopy(student).to(device).to(memory_format=execution.memory_format).train()
        forward = compiled(own) if execution.compiled else own
        batch = images.to(device)
        labels = torch.zeros(len(batch), dtype=torch.long, device=device)

        def step() -> None:
            with autocast(device, execution.precision):
                outputs = forward(batch)
            torch.autograd.backward(F.cross_entropy(outputs.logits.float(), labels))
            own.zero_grad(set_to_none=True)

        return step

    return build


def teachers_answer(
    ensemble: TeacherEnsemble, features: Mapping[str, FeatureForm], batch: Batch, per_step: int | None = None
) -> Callable[[Execution], Callable[[], None]]:
    """For `choose`: what all teachers say of one batch.

    Args:
        ensemble: on its device; not changed.
        features: `Needs.teacher_features`.
        batch: on the same device.
        per_step: as for `LiveTeachers`.
    """

    def build(execution: Execution) -> Callable[[], None]:
        live = LiveTeachers(ensemble, features, execution, per_step=per_step, block=len(batch.ids))

        def ask() -> None:
            live(batch)

        return ask

    return build


def _time(calls: Sequence[Callable[[], None]], device: torch.device, rounds: int) -> list[list[float]]:
    """Seconds of each call in each round, interleaved, after one round that does not count."""
    taken: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 1):
        for call, mine in zip(calls, taken, strict=True):
            _wait(device)
            begun = time.perf_counter()
            call()
            _wait(device)
            if number:
                mine.append(time.perf_counter() - begun)
    return taken


def _clearly_fastest(seconds: Mapping[Execution, float]) -> Execution:
    """The fastest; a plainer one, which comes before it, where that is nearly as fast."""
    fastest = min(seconds.values())
    return next(way for way, taken in seconds.items() if taken <= CLEARLY_FASTER * fastest)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
