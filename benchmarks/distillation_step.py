"""What a distillation step costs, live and cached, in units of a plain student step in the same precision.

    python benchmarks/distillation_step.py --out step.json
    python benchmarks/distillation_step.py --num-teachers 1 3 8 --precision bf16 --device cuda --out step.json

All rows are steps of the trainer itself (`Run.advance`) on the same batches, made beforehand, in one process. They are
interleaved: in each round every row does a block of steps, in random order, and is divided by the plain student's
block of that round. Told are the median over the rounds and its quartiles. On a CPU the time is the process's CPU time,
which neighbours on the machine disturb less; give it one thread. The second plain student is the control: what differs
from 1 by no more than it does says nothing. Networks have random weights and images are noise: neither changes the
cost. Not in it: the data pipeline, and the gradients that a balanced term is measured by, every 100 steps.

Columns: images/s · ratio · quartiles of the ratio.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from kdcompress.bundle import Preprocess
from kdcompress.data import CropFlip, MemorySet, Split, TrainLoader
from kdcompress.discovery import check_options
from kdcompress.files import atomic_write
from kdcompress.latency import describe_machine, versions
from kdcompress.live_teachers import LiveTeachers
from kdcompress.methods.base import find_method
from kdcompress.models import build_network
from kdcompress.networks import Student, Teacher, TeacherEnsemble
from kdcompress.optim import Optimisation
from kdcompress.teacher_cache import CPU_BLOCK, open_cache
from kdcompress.training_step import Precision, Run
from kdcompress.types import Batch, NetworkShapes, TeacherSource

PLAIN, CONTROL = "plain student", "plain student, again"
CLASSES, SIZE = 10, 32
PREPROCESS = Preprocess(3, SIZE, SIZE, (0.5,) * 3, (0.25,) * 3)
METHODS = ("avg-kd", "amtml-kd hint_pool=pooled", "amtml-kd variant=paper hint_pool=pooled")
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Row:
    """One kind of step.

    Args:
        name: of the method, and where the answers come from.
        num_teachers: that answer.
        images_per_s: median over the rounds.
        ratio: to the plain student's block of the same round, median over the rounds.
        ratio_quartiles: the lower and the upper one.
    """

    name: str
    num_teachers: int
    images_per_s: float
    ratio: float
    ratio_quartiles: tuple[float, float]


def build_teachers(archs: list[str], count: int, device: torch.device) -> list[Teacher]:
    networks = [build_network(archs[index % len(archs)], num_classes=CLASSES) for index in range(count)]
    return [Teacher(network.to(device), PREPROCESS, name=f"teacher {n}") for n, network in enumerate(networks, start=1)]


def build_run(
    arch: str, words: str, teachers: list[Teacher], device: torch.device, precision: Precision
) -> tuple[Run, dict[str, str]]:
    """The trainer's state for one row, and the feature maps that its method asks for."""
    name, *options = words.split()
    found = find_method(name)
    checked = check_options(found, dict(option.split("=") for option in options))
    network = build_network(arch, num_classes=CLASSES)
    student = Student(network, PREPROCESS, arch=arch, arch_args={}, num_classes=CLASSES, in_channels=3)
    shapes = NetworkShapes(CLASSES, student.feature_shapes, tuple(teacher.feature_shapes for teacher in teachers))
    run = Run([student], [found(shapes, **checked)], Optimisation(lr=0.01), device, precision, 1000, 100_000, 0)
    run.train_mode()
    return run, dict(found.needs(**checked).teacher_features)


def measure(rows: dict[str, Callable[[], None]], *, rounds: int, cuda: bool) -> dict[str, list[float]]:
    """Seconds of a block of each row in each round."""

    def clock() -> float:
        if cuda:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    shuffle = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name in shuffle.sample(list(rows), len(rows)):
            begun = clock()
            rows[name]()
            seconds[name].append(clock() - begun)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="resnet20")
    parser.add_argument("--teachers", nargs="+", default=["resnet32", "resnet44", "resnet56"], help="taken in turn")
    parser.add_argument("--num-teachers", type=int, nargs="+", default=[3])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="each a name and its options, as one word")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3, help="of one block")
    parser.add_argument("--cached-only", action="store_true", help="leave out the live rows")
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    device = torch.device(chosen.device)

    images = torch.randint(0, 256, (8 * chosen.batch_size, 3, SIZE, SIZE), dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (len(images),))
    split = Split(MemorySet(images, labels, tuple(map(str, range(CLASSES)))), torch.arange(len(images)))
    loader = TrainLoader(
        split, CropFlip(4), num_classes=CLASSES, batch_size=chosen.batch_size, seed=0, num_fixed_views=1
    )
    batches = [batch.to(device) for batch in loader.epoch(0)]
    rows: dict[str, Callable[[], None]] = {}

    def add(name: str, run: Run, source: TeacherSource | None) -> None:
        def block(steps: int = chosen.steps) -> None:
            for _ in range(steps):
                batch: Batch = batches[run.step % len(batches)]
                run.advance(batch, source, None)

        block(WARM_UP_STEPS)
        rows[name] = block

    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in (PLAIN, CONTROL):
            add(name, build_run(chosen.student, "supervised", [], device, chosen.precision)[0], None)
            counts[name] = 0
        for count in chosen.num_teachers:
            teachers = build_teachers(chosen.teachers, count, device)
            for words in chosen.methods:
                run, features = build_run(chosen.student, words, teachers, device, chosen.precision)
                live = LiveTeachers(TeacherEnsemble(teachers), features)
                cache = open_cache(
                    Path(folder),
                    teachers=teachers,
                    features=features,
                    split=split,
                    views=loader.views,
                    data_name="noise",
                    device=device,
                    open_teachers=lambda live=live: live,
                    tell=print,
                )
                cache.fill(loader, 1, CPU_BLOCK)
                asked = cache.num_asked
                names = [f"{words} · {count} cached"] + ([] if chosen.cached_only else [f"{words} · {count} live"])
                add(names[0], run, cache)
                assert cache.num_asked == asked
                if not chosen.cached_only:
                    add(names[1], build_run(chosen.student, words, teachers, device, chosen.precision)[0], live)
                counts |= dict.fromkeys(names, count)
        seconds = measure(rows, rounds=chosen.rounds, cuda=device.type == "cuda")

    found = []
    for name, taken in seconds.items():
        ratios = [mine / plain for mine, plain in zip(taken, seconds[PLAIN], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)
        speed = chosen.steps * chosen.batch_size / statistics.median(taken)
        found.append(Row(name, counts[name], speed, statistics.median(ratios), (quartiles[0], quartiles[2])))
        print(f"{name:<62} {speed:9.0f} {found[-1].ratio:6.2f}  {quartiles[0]:.2f} to {quartiles[2]:.2f}")
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(chosen).items()}
    document = {"settings": settings, "machine": describe_machine(), "versions": versions()}
    with atomic_write(chosen.out, "w") as handle:
        json.dump(document | {"rows": [asdict(row) for row in found]}, handle, indent=2)


if __name__ == "__main__":
    main()
