"""Teachers made to differ, from one that is good at everything: specialists of some classes, and one that is broken.

    python benchmarks/teacher_sets.py --data data/cifar10.zip --teacher resnet20.th --out sets/

writes `sets/specialist-1.pt` … (each trained on for a short while on images of its classes alone, which is enough to
forget the others) and `sets/inverted.pt` (trained on for as long on images of inverted colours, so that ordinary ones
are a domain that it has left). All are kdcompress checkpoints that name the training images of the teacher they come
from. What weights are worth for such sets:

    kdcompress compare --headroom --teachers sets/specialist-*.pt --data data/cifar10.zip --holdout data/holdout
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch

from kdcompress.data import MemorySet, Split, Splits, TrainLoader, build_views, load_splits
from kdcompress.display import open_display
from kdcompress.methods.supervised import Supervised
from kdcompress.networks import Student
from kdcompress.optim import Optimisation
from kdcompress.pipeline._teachers import OpenedTeacher, open_teacher, read_checkpoints, sample_of
from kdcompress.recipe import TeacherSection
from kdcompress.teachers import build_from, save_checkpoint
from kdcompress.train import train
from kdcompress.types import NetworkShapes


def some_classes(split: Split, classes: range, limit: int) -> Split:
    """Images of these classes alone."""
    inside = torch.isin(split.labels, torch.tensor(list(classes)))
    return Split(split.images, split.ids[inside]).take(limit)


def inverted(split: Split, limit: int) -> Split:
    """Some images with every colour turned into its opposite."""
    taken = split.take(limit)
    pixels = 255 - taken.images.load(taken.ids)
    return Split(MemorySet(pixels, taken.labels, taken.images.classes), torch.arange(len(pixels)))


def train_on(one: OpenedTeacher, images: Split, splits: Splits, out: Path, epochs: int, lr: float) -> None:
    """The teacher after some more epochs on these images, as a checkpoint."""
    checkpoint = one.checkpoint
    student = Student(
        build_from(checkpoint),
        one.teacher.preprocess,
        arch=checkpoint.arch,
        arch_args=checkpoint.arch_args,
        num_classes=checkpoint.num_classes,
        in_channels=checkpoint.in_channels,
    )
    views = build_views("crop-flip", image_shape=splits.image_shape, padding=4, num_images=len(images))
    loader = TrainLoader(images, views, num_classes=len(splits.classes), batch_size=64, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        train(
            [student],
            [Supervised(NetworkShapes(len(splits.classes), student.feature_shapes))],
            None,
            loader,
            epochs=epochs,
            optimisation=Optimisation(lr=lr),
            out=Path(folder),
            display=open_display(),
            precision="bf16",
        )
    seen = torch.cat([splits.train.digests(), splits.val.digests()])
    save_checkpoint(
        out,
        student.network,
        arch=checkpoint.arch,
        arch_args=checkpoint.arch_args,
        num_classes=checkpoint.num_classes,
        in_channels=checkpoint.in_channels,
        classes=splits.classes,
        preprocess=one.teacher.preprocess,
        training_digests=torch.unique(seen),
    )
    print(out, flush=True)


def main() -> None:
    """Makes the sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--specialists", type=int, default=3, help="the classes are dealt out among so many")
    parser.add_argument("--limit", type=int, default=3000, help="images that each is trained on")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()

    splits = load_splits(chosen.data)
    section = TeacherSection(path=chosen.teacher)
    (checkpoint,) = read_checkpoints([section])
    one = open_teacher(section, checkpoint, 1, splits.image_shape, partial(sample_of, splits))
    chosen.out.mkdir(parents=True, exist_ok=True)
    count, num_classes = chosen.specialists, len(splits.classes)
    jobs = {
        f"specialist-{number + 1}.pt": some_classes(
            splits.train, range(number * num_classes // count, (number + 1) * num_classes // count), chosen.limit
        )
        for number in range(count)
    }
    jobs["inverted.pt"] = inverted(splits.train, chosen.limit)
    for name, images in jobs.items():
        train_on(one, images, splits, chosen.out / name, chosen.epochs, chosen.lr)


if __name__ == "__main__":
    main()
