"""What a distillation step costs, live and cached, in units of a plain student step run in the same way.

    python benchmarks/distillation_step.py --out step.json
    python benchmarks/distillation_step.py --modes fp32 fp32+channels_last bf16+channels_last --out modes.json
    python benchmarks/distillation_step.py --num-teachers 1 2 3 5 8 --memory --out teachers.json
    python benchmarks/distillation_step.py --device cuda --batch-size 1024 --out cuda.json

All rows are steps of the trainer itself (`Run.advance`) on the same batches, made beforehand, in one process. They are
interleaved: in each round every row does a block of steps, in random order, and is divided by the plain student's
block of that round and mode. Told are the median over the rounds and its quartiles. On a CPU the time is the process's
CPU time, which neighbours on the machine disturb less; give it one thread. The second plain student is the control:
what differs from 1 by no more than it does says nothing. Networks have random weights and images are noise: neither
changes the cost. Not in it: the data pipeline, which has a row of its own, and the gradients that a balanced term is
measured by, every 100 steps. "published" is the structure of the released notebooks (`published_step.py`).

With --memory each row is also run alone in a process of its own, whose peak of memory is told: on CUDA of tensors, on
a CPU of the whole process, torch included.

Columns: images/s · ratio in the same mode · its quartiles · ratio to the first mode's plain student · peak MB.
"""

import argparse
import gc
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from published_step import PublishedStep

from kdcompress.bundle import Preprocess
from kdcompress.data import CropFlip, MemorySet, Split, TrainLoader
from kdcompress.discovery import check_options
from kdcompress.execution import PLAIN, Execution
from kdcompress.files import atomic_write
from kdcompress.latency import describe_machine, versions
from kdcompress.live_teachers import LiveTeachers
from kdcompress.memory import PeakMemory
from kdcompress.methods.base import find_method
from kdcompress.models import build_network
from kdcompress.networks import Student, Teacher, TeacherEnsemble
from kdcompress.optim import Optimisation
from kdcompress.teacher_cache import CPU_BLOCK, open_cache
from kdcompress.training_step import Run
from kdcompress.types import Batch, NetworkShapes, TeacherSource

CLASSES, SIZE = 10, 32
PREPROCESS = Preprocess(3, SIZE, SIZE, (0.5,) * 3, (0.25,) * 3)
METHODS = (
    "avg-kd",
    "amtml-kd",
    "amtml-kd angle_share=0.1 hint_share=0.1 hint_pool=pooled",
    "amtml-kd variant=paper hint_pool=pooled",
    "ca-mkd hint_pool=pooled",
    "ae-kd",
)
WARM_UP_STEPS = 2
PLAIN_STUDENT, CONTROL = "plain student", "plain student, again"


@dataclass(frozen=True)
class Kind:
    """One kind of step.

    Args:
        mode: how the networks are run, e.g. "bf16+channels_last+compiled".
        method: its name and options; empty for the plain student.
        num_teachers: that answer.
        source: "none", "cached", "live", "one" (live, one teacher per step) or "published".
        again: the control.
    """

    mode: str
    method: str = ""
    num_teachers: int = 0
    source: str = "none"
    again: bool = False

    @property
    def name(self) -> str:
        """For the table."""
        if self.source == "none":
            return CONTROL if self.again else PLAIN_STUDENT
        if self.source == "published":
            return f"published structure · {self.num_teachers} live"
        told = f"1 of {self.num_teachers} live" if self.source == "one" else f"{self.num_teachers} {self.source}"
        return f"{self.method} · {told}"


@dataclass(frozen=True)
class Row:
    """What one kind of step costs.

    Args:
        name: of the kind.
        mode: how the networks are run.
        num_teachers: that answer.
        images_per_s: median over the rounds.
        ratio: to the plain student's block of the same round and mode, median over the rounds.
        ratio_quartiles: the lower and the upper one.
        ratio_to_first_mode: to the plain student of the first mode.
        peak_mb: of memory, run alone; None where not asked for.
    """

    name: str
    mode: str
    num_teachers: int
    images_per_s: float
    ratio: float
    ratio_quartiles: tuple[float, float]
    ratio_to_first_mode: float
    peak_mb: float | None


def execution_of(mode: str) -> Execution:
    precision, *more = mode.split("+")
    return Execution(precision, "channels_last" in more, "compiled" in more)  # type: ignore[arg-type]


class Bench:
    """The batches, and the steps that are made of them."""

    def __init__(self, chosen: argparse.Namespace, folder: Path) -> None:
        torch.set_num_threads(chosen.threads)
        torch.manual_seed(0)
        self.chosen = chosen
        self.folder = folder
        self.device = torch.device(chosen.device)
        images = torch.randint(0, 256, (8 * chosen.batch_size, 3, SIZE, SIZE), dtype=torch.uint8)
        labels = torch.randint(0, CLASSES, (len(images),))
        self.split = Split(MemorySet(images, labels, tuple(map(str, range(CLASSES)))), torch.arange(len(images)))
        self.loader = TrainLoader(
            self.split, CropFlip(4), num_classes=CLASSES, batch_size=chosen.batch_size, seed=0, num_fixed_views=1
        )
        self.batches = [batch.to(self.device) for batch in self.loader.epoch(0)]

    def teachers(self, count: int) -> list[Teacher]:
        archs = self.chosen.teachers
        networks = [build_network(archs[index % len(archs)], num_classes=CLASSES) for index in range(count)]
        placed = enumerate(networks, start=1)
        return [Teacher(network.to(self.device), PREPROCESS, name=f"teacher {n}") for n, network in placed]

    def student(self) -> Student:
        arch = self.chosen.student
        network = build_network(arch, num_classes=CLASSES)
        return Student(network, PREPROCESS, arch=arch, arch_args={}, num_classes=CLASSES, in_channels=3)

    def block(self, kind: Kind) -> Callable[[], None]:
        """A block of steps of one kind; its first steps are done already."""
        execution = execution_of(kind.mode)
        teachers = self.teachers(kind.num_teachers)
        if kind.source == "published":
            published = PublishedStep(self.student().to(self.device), TeacherEnsemble(teachers), CLASSES)
            return self._repeat(lambda number: published(self.batches[number % len(self.batches)]))
        words = kind.method or "supervised"
        name, *options = words.split()
        found = find_method(name)
        checked = check_options(found, dict(option.split("=") for option in options))
        needs = found.needs(**checked)
        student = self.student()
        shapes = NetworkShapes(CLASSES, student.feature_shapes, tuple(one.feature_shapes for one in teachers))
        heads = [one.head for one in teachers] if needs.teacher_heads else []
        method = found(shapes, heads, **checked)
        run = Run([student], [method], Optimisation(lr=0.01), self.device, execution, 1000, 100_000, 0)
        run.train_mode()
        source = self._source(kind, teachers, dict(needs.teacher_features), execution)

        def step(_number: int) -> None:
            batch: Batch = self.batches[run.step % len(self.batches)]
            run.advance(batch, source, None)

        return self._repeat(step)

    def _source(
        self, kind: Kind, teachers: list[Teacher], features: dict[str, Any], execution: Execution
    ) -> TeacherSource | None:
        if kind.source == "none":
            return None
        ensemble = TeacherEnsemble(teachers)
        block = self.chosen.batch_size
        if kind.source != "cached":
            per_step = 1 if kind.source == "one" else None
            return LiveTeachers(ensemble, features, execution, per_step=per_step, block=block)
        cache = open_cache(
            self.folder,
            teachers=teachers,
            features=features,
            split=self.split,
            views=self.loader.views,
            data_name="noise",
            device=self.device,
            open_teachers=lambda: LiveTeachers(ensemble, features, PLAIN, block=block),
            tell=print,
        )
        cache.fill(self.loader, 1, CPU_BLOCK)
        return cache

    def _repeat(self, step: Callable[[int], Any]) -> Callable[[], None]:
        done = 0

        def block(steps: int = self.chosen.steps) -> None:
            nonlocal done
            for _ in range(steps):
                step(done)
                done += 1

        block(WARM_UP_STEPS)
        return block

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def data_pipeline(self) -> float:
        """Images per second that the loader makes on its own, one epoch of 50,000 images."""
        images = torch.randint(0, 256, (50_000, 3, SIZE, SIZE), dtype=torch.uint8)
        labels = torch.randint(0, CLASSES, (len(images),))
        split = Split(MemorySet(images, labels, tuple(map(str, range(CLASSES)))), torch.arange(len(images)))
        size = self.chosen.batch_size
        loader = TrainLoader(split, CropFlip(4), num_classes=CLASSES, batch_size=size, seed=0)
        begun = time.perf_counter()
        seen = sum(len(batch.ids) for batch in loader.epoch(0))
        return seen / (time.perf_counter() - begun)


def kinds_of(chosen: argparse.Namespace) -> list[Kind]:
    kinds = []
    for mode in chosen.modes:
        kinds += [Kind(mode), Kind(mode, again=True)]
        for count in chosen.num_teachers:
            for method in chosen.methods:
                kinds += [Kind(mode, method, count, source) for source in chosen.sources]
            if "live" in chosen.sources:
                kinds.append(Kind(mode, "avg-kd", count, "one"))
        if mode == "fp32" and 3 in chosen.num_teachers and "live" in chosen.sources:
            kinds.append(Kind(mode, "", 3, "published"))
    return kinds


def measure(blocks: dict[Kind, Callable[[], None]], rounds: int, clock: Callable[[], float]) -> dict[Kind, list[float]]:
    """Seconds of a block of each kind in each round."""
    shuffle = random.Random(0)
    seconds: dict[Kind, list[float]] = {kind: [] for kind in blocks}
    for _ in range(rounds):
        for kind in shuffle.sample(list(blocks), len(blocks)):
            begun = clock()
            blocks[kind]()
            seconds[kind].append(clock() - begun)
    return seconds


def peak_of(kind: Kind, chosen: argparse.Namespace, answer: Any) -> None:
    """The peak of memory of some steps, in a process of its own; the teachers of a cached run are gone by then."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(chosen, Path(folder))
        block = bench.block(kind)
        gc.collect()
        peak = PeakMemory(bench.device)
        block()
        answer.put(peak.read_mb())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="resnet20")
    parser.add_argument("--teachers", nargs="+", default=["resnet32", "resnet44", "resnet56"], help="taken in turn")
    parser.add_argument("--num-teachers", type=int, nargs="+", default=[3])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="each a name and its options, as one word")
    parser.add_argument("--modes", nargs="+", default=["fp32"], help="fp32 or bf16, with +channels_last and +compiled")
    parser.add_argument("--sources", nargs="+", choices=["cached", "live"], default=["cached", "live"])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3, help="of one block")
    parser.add_argument("--memory", action="store_true", help="measure each kind's peak of memory as well")
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(chosen, Path(folder))
        loaded = bench.data_pipeline()
        print(f"data pipeline alone: {loaded:,.0f} images/s")
        blocks = {kind: bench.block(kind) for kind in kinds_of(chosen)}
        seconds = measure(blocks, chosen.rounds, bench.clock)

    found = []
    first = seconds[Kind(chosen.modes[0])]
    spawn = multiprocessing.get_context("spawn")
    for kind, taken in seconds.items():
        ratios = [mine / plain for mine, plain in zip(taken, seconds[Kind(kind.mode)], strict=True)]
        to_first = statistics.median(mine / plain for mine, plain in zip(taken, first, strict=True))
        quartiles = statistics.quantiles(ratios, n=4)
        speed = chosen.steps * chosen.batch_size / statistics.median(taken)
        peak = None
        if chosen.memory and kind.source in ("none", "cached", "live"):
            answer: Any = spawn.Queue()
            process = spawn.Process(target=peak_of, args=(kind, chosen, answer))
            process.start()
            peak = answer.get()
            process.join()
        middle = statistics.median(ratios)
        row = Row(kind.name, kind.mode, kind.num_teachers, speed, middle, (quartiles[0], quartiles[2]), to_first, peak)
        found.append(row)
        told = f"{quartiles[0]:.2f} to {quartiles[2]:.2f} {to_first:6.2f}" + (f" {peak:8.0f}" if peak else "")
        print(f"{kind.mode:<24} {kind.name:<58} {speed:8.0f} {middle:6.2f}  {told}")
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(chosen).items()}
    document = {"settings": settings, "machine": describe_machine(), "versions": versions()}
    with atomic_write(chosen.out, "w") as handle:
        rows = [asdict(row) for row in found]
        json.dump(document | {"data_pipeline_images_per_s": loaded, "rows": rows}, handle, indent=2)


if __name__ == "__main__":
    main()
