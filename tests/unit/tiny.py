"""The smallest students, methods, teachers and images that the training loop can run on."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from kdcompress.bundle import Preprocess
from kdcompress.data import CropFlip, MemorySet, Split, TrainLoader
from kdcompress.display import LineDisplay
from kdcompress.methods.base import Method
from kdcompress.networks import Student
from kdcompress.optim import Optimisation
from kdcompress.train import TrainResult, train
from kdcompress.types import Batch, EnsembleOutputs, LossTerms, Needs, NetworkShapes, Share, Step, Term

NUM_CLASSES = 3
CPU = torch.device("cpu")
SHAPES = NetworkShapes(NUM_CLASSES, {"stage1": (4, 8, 8), "stage2": (6, 4, 4)}, ({"stage1": (4, 8, 8)},) * 2)


class TinyNetwork(nn.Module):
    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.stage_a = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.dropout = nn.Dropout(dropout)
        self.stage_b = nn.Sequential(nn.Conv2d(4, 6, 3, 2, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.linear = nn.Linear(6, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stage_b(self.dropout(self.stage_a(images)))
        logits: Tensor = self.linear(maps.mean((2, 3)))
        return logits


def tiny_student(seed: int = 0, dropout: float = 0.2) -> Student:
    torch.manual_seed(seed)
    return Student(
        TinyNetwork(dropout),
        Preprocess(1, 8, 8, (0.5,), (0.25,)),
        arch="tiny",
        arch_args={},
        num_classes=NUM_CLASSES,
        in_channels=1,
        stages=("stage_a", "stage_b"),
    )


class Labels(Method):
    """Cross entropy to the labels, nothing else."""

    def __init__(self) -> None:
        super().__init__(SHAPES)

    @classmethod
    def needs(cls, **options: Any) -> Needs:
        return Needs(teachers=(0, 8))

    def forward(self, step: Step) -> LossTerms:
        return LossTerms({"labels": Term(F.cross_entropy(step.student.logits, step.label_targets))})


class Everything(Method):
    """Uses all that the loop offers: a trained regressor, a share, random numbers, a refitted buffer, peers."""

    temperature: Tensor

    def __init__(self, seed: int = 0, interrupt_at: float = -1.0) -> None:
        super().__init__(SHAPES)
        self.interrupt_at = interrupt_at
        torch.manual_seed(100 + seed)
        self.regressor = nn.Conv2d(6, 4, 1)
        self.register_buffer("temperature", torch.ones(()))
        self.refitted: list[Step] = []

    @classmethod
    def needs(cls, **options: Any) -> Needs:
        return Needs(teachers=(0, 8), students=(1, 2))

    def forward(self, step: Step) -> LossTerms:
        if step.progress == self.interrupt_at:
            os.kill(os.getpid(), signal.SIGTERM)
        terms = {"labels": Term(F.cross_entropy(step.student.logits, step.label_targets))}
        if step.teachers is not None:
            noisy = step.teachers.logits.mean(1) + 0.1 * torch.rand_like(step.student.logits)
            answers = (noisy / self.temperature).softmax(1)
            terms["kl"] = Term(F.kl_div(step.student.logits.log_softmax(1), answers, reduction="batchmean"), 0.5)
            hint = F.adaptive_avg_pool2d(step.teachers.features[0]["stage1"], 4)
            error = F.mse_loss(self.regressor(step.student.features["stage2"]), hint)
            terms["hint"] = Term(error, Share(0.2 * (1 - step.progress)))
        for number, peer in enumerate(step.peers):
            terms[f"peer{number}"] = Term(F.mse_loss(step.student.logits, peer.logits), 0.1)
        return LossTerms(terms, {"largest": step.student.logits.detach().amax(0)})

    def refit(self, heldout: Step) -> Mapping[str, float]:
        self.refitted.append(heldout)
        with torch.no_grad():
            self.temperature.mul_(0.5).add_(0.5 * (1 + heldout.student.logits.std()))
        return {"temperature": float(self.temperature)}


class TinyTeachers:
    """Two fixed random networks."""

    def __init__(self, device: torch.device = CPU) -> None:
        torch.manual_seed(7)
        self.kernels = torch.randn(2, 4, 1, 3, 3).to(device)
        self.heads = torch.randn(2, 4, NUM_CLASSES).to(device)
        self.calls = 0

    def __call__(self, batch: Batch) -> EnsembleOutputs:
        self.calls += 1
        assert not torch.is_grad_enabled()
        maps = [F.conv2d(batch.images, kernel, padding=1).relu() for kernel in self.kernels]
        logits = [one.mean((2, 3)) @ head for one, head in zip(maps, self.heads, strict=True)]
        return EnsembleOutputs(torch.stack(logits, 1), tuple({"stage1": one} for one in maps), (0, 1))


def tiny_images(num_images: int, seed: int = 0) -> Split:
    """Noise with a bright third: which one is the class. Every tenth image has no label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, NUM_CLASSES, (num_images,), generator=generator)
    images = torch.randint(0, 120, (num_images, 1, 8, 8), generator=generator, dtype=torch.uint8)
    for image, label in zip(images, labels, strict=True):
        image[:, 3 * int(label) : 3 * int(label) + 2] += 100
    labels[::10] = -1
    return Split(MemorySet(images, labels, ("a", "b", "c")), torch.arange(num_images))


def tiny_loader(num_images: int = 200, batch_size: int = 32, seed: int = 0) -> TrainLoader:
    views = CropFlip(1, False, 0)
    return TrainLoader(tiny_images(num_images), views, num_classes=NUM_CLASSES, batch_size=batch_size, seed=seed)


def quiet() -> LineDisplay:
    return LineDisplay(Console(file=io.StringIO(), width=200))


def train_everything(out: Path, *, num_students: int = 2, epochs: int = 3, **changes: Any) -> TrainResult:
    """A run with all parts that have a state: two students, momentum, average, balancing, refits, dropout."""
    optimizer, interrupt_at = changes.pop("optimizer", "sgd"), changes.pop("interrupt_at", -1.0)
    arguments: dict[str, Any] = {
        "epochs": epochs,
        "optimisation": Optimisation(optimizer=optimizer, lr=0.05, ema=0.9, clip_norm=2.0, warmup_epochs=0.5),
        "display": quiet(),
        "heldout": tiny_images(60, seed=1),
        "val": tiny_images(50, seed=2),
        **changes,
    }
    students = [tiny_student(seed) for seed in range(num_students)]
    methods = [Everything(seed, interrupt_at if seed == 0 else -1.0) for seed in range(num_students)]
    return train(students, methods, TinyTeachers(), tiny_loader(), out=out, **arguments)


def run_in_process(out: Path, optimizer: str, epochs: int) -> None:
    """For a process that may be killed at any instant: starts or goes on, saving all the time."""
    torch.set_num_threads(1)
    train_everything(out, epochs=epochs, resume=True, optimizer=optimizer, checkpoint_every_seconds=0.02)
