"""Four methods on equal terms: the same teachers, images, views, batches, epochs and learning rate, several seeds.

    python benchmarks/carve_holdout.py cifar10.zip --every 5 --out data/
    python benchmarks/cifar10_methods.py --data data/cifar10.zip --holdout data/holdout --teachers a.th b.th c.th \\
        --init teacher --lr 0.01 --seeds 0 1 2 --out results.jsonl

The students of one seed are trained side by side on the same batches, so the teachers answer once for all of them; each
is what `kdcompress distill` would train alone. Accuracy is of the last epoch on the test images, which nothing else
looks at. One JSON line per student is appended to --out; a seed that is already there is left out.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import torch
import yaml

from kdcompress.bundle import Preprocess
from kdcompress.data import Split, Splits, TrainLoader, build_views, eval_batches, load_splits
from kdcompress.discovery import check_options
from kdcompress.display import open_display
from kdcompress.evaluate import evaluate
from kdcompress.execution import Execution
from kdcompress.init import Blocks, initialise, resolve_init
from kdcompress.latency import describe_machine, versions
from kdcompress.live_teachers import LiveTeachers
from kdcompress.methods.base import Method, find_method
from kdcompress.models import build_network
from kdcompress.networks import Student, Teacher, TeacherEnsemble
from kdcompress.optim import Optimisation
from kdcompress.pipeline._teachers import open_teacher, read_checkpoints, sample_of
from kdcompress.recipe import TeacherSection
from kdcompress.train import train
from kdcompress.types import NetworkShapes, Step

METHODS = ("supervised", "avg-kd", "amtml-kd variant=repaired", "amtml-kd variant=paper")
"""Each a name and its options, as one word on the command line."""


def open_teachers(paths: list[str], splits: Splits) -> list[Teacher]:
    """The teachers, their normalisation measured."""
    sections = [TeacherSection(path=path) for path in paths]
    return [
        open_teacher(section, checkpoint, number, splits.image_shape, partial(sample_of, splits)).teacher
        for number, (section, checkpoint) in enumerate(zip(sections, read_checkpoints(sections), strict=True), start=1)
    ]


def build_student(arch: str, init: str, blocks: Blocks, seed: int, splits: Splits, teachers: list[Teacher]) -> Student:
    """The student as `kdcompress distill --init` starts it."""
    torch.manual_seed(seed)
    channels, height, _ = splits.image_shape
    arguments = {"num_classes": len(splits.classes), "in_channels": channels, "image_size": height}
    network = build_network(arch, **arguments)
    networks = [teacher.network for teacher in teachers]
    decision = resolve_init(init, arch, network, networks)
    if decision.kind != "random":
        initialise(network, decision, arch=arch, arch_args={}, teachers=networks, blocks=blocks, **arguments)
    source = teachers[decision.teacher or 0].preprocess
    preprocess = Preprocess(*splits.image_shape, source.mean, source.std)
    return Student(network, preprocess, arch=arch, arch_args={}, num_classes=len(splits.classes), in_channels=channels)


def build_method(text: str, seed: int, student: Student, teachers: list[Teacher]) -> Method:
    """The method that "amtml-kd variant=paper" means."""
    name, *words = text.split()
    found = find_method(name)
    given = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in words)}
    options = check_options(found, given)
    asked = teachers if found.needs(**options).teachers[1] else []
    torch.manual_seed(seed)
    shapes = NetworkShapes(student.num_classes, student.feature_shapes, tuple(t.feature_shapes for t in asked))
    return found(shapes, **options)


@torch.no_grad()
def weight_on_best(method: Method, student: Student, teachers: list[Teacher], images: Split) -> float | None:
    """Mean weight, on some of these images, of the teacher that gives the label the most; None without weights."""
    if not hasattr(method, "weighting"):
        return None
    method.eval()
    student.eval()
    found = []
    for batch in eval_batches(images.take(2000), student.num_classes):
        answers = LiveTeachers(TeacherEnsemble(teachers))(batch)
        weights = method.weighting(Step(batch.labels, batch.label_targets, student(batch.images), answers))
        given = (answers.logits.log_softmax(2) * batch.label_targets[:, None]).sum(2)
        found.append(weights.gather(1, given.argmax(1, keepdim=True))[:, 0])
    return float(torch.cat(found).mean())


def main() -> None:
    """One training per seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--holdout", type=Path, required=True)
    parser.add_argument("--teachers", nargs="+", required=True)
    parser.add_argument("--student", default="resnet20")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--init", default="teacher")
    parser.add_argument("--init-blocks", default="even", choices=["even", "first-two-and-last"])
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--limit", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--on-holdout", action="store_true", help="score on the holdout: to choose a learning rate")
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"), help="one folder for each set of arguments")
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()

    splits = load_splits(chosen.data, holdout=chosen.holdout, limit=chosen.limit, val_fraction=0.02)
    assert splits.holdout is not None
    teachers = open_teachers(chosen.teachers, splits)
    judged = splits.holdout if chosen.on_holdout else splits.test
    setting = {
        name: getattr(chosen, name)
        for name in ("student", "init", "init_blocks", "lr", "limit", "epochs", "batch_size", "precision", "on_holdout")
    }
    setting["teachers"] = [Path(path).name for path in chosen.teachers]
    known = [json.loads(line) for line in chosen.out.read_text().splitlines()] if chosen.out.exists() else []
    for seed in chosen.seeds:
        if all(
            any((r["method"], r["seed"], r["setting"]) == (m, seed, setting) for r in known) for m in chosen.methods
        ):
            continue
        students = [
            build_student(chosen.student, chosen.init, chosen.init_blocks, seed, splits, teachers)
            for _ in chosen.methods
        ]
        methods = [build_method(name, seed, s, teachers) for name, s in zip(chosen.methods, students, strict=True)]
        views = build_views("crop-flip", image_shape=splits.image_shape, padding=4, num_images=len(splits.train))
        loader = TrainLoader(splits.train, views, num_classes=10, batch_size=chosen.batch_size, seed=seed)
        start = time.monotonic()
        result = train(
            students,
            methods,
            LiveTeachers(TeacherEnsemble(teachers)),
            loader,
            epochs=chosen.epochs,
            optimisation=Optimisation(lr=chosen.lr),
            out=chosen.runs / f"{chosen.init}-{chosen.init_blocks}-seed{seed}",
            display=open_display(),
            seed=seed,
            execution=Execution(chosen.precision),
            heldout=splits.holdout,
            resume=True,
        )
        for name, student, method in zip(chosen.methods, result.students, methods, strict=True):
            accuracy = evaluate(student.deployable(), eval_batches(judged, 10), 10)
            row = {"method": name, "seed": seed, "top1": accuracy.top1, "nll": accuracy.nll, "n": accuracy.n}
            row |= {"weight_on_best": weight_on_best(method, student, teachers, judged)}
            row |= {"setting": setting, "seconds": time.monotonic() - start}
            row |= {"instruction_sets": describe_machine()["instruction_sets"], "torch": versions()["torch"]}
            with chosen.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{name:<26} seed {seed} top-1 {accuracy.top1:.2%}", flush=True)


if __name__ == "__main__":
    main()
