"""What training with roundings is for: a student that quantization breaks, and its accuracy back in the file."""

from __future__ import annotations

import math
from pathlib import Path

import onnx
import torch
from torch.nn import functional as F

from kdcompress.export.onnx import write_onnx
from kdcompress.fake_quant import learned_model, learned_ranges, prepare_student
from kdcompress.networks import Student
from kdcompress.profiles import get_profile
from kdcompress.quantize.int8 import quantize_model
from kdcompress.runtimes.onnxruntime_runtime import open_session
from tests.unit.deployed import badly_scaled, digits

PROFILE = get_profile("trt10.3")
TRAINED = slice(0, 1200)
TESTED = slice(1200, None)


def train(student: Student, teacher: Student, *, rate: float, epochs: int) -> None:
    """Distillation with labels, T = 4, under SGD with Nesterov's momentum and the cosine schedule, as in a run."""
    images, labels = digits()
    with torch.no_grad():
        soft = (teacher(images[TRAINED]).logits / 4).softmax(1)
    optimizer = torch.optim.SGD(student.parameters(), lr=rate, momentum=0.9, nesterov=True)
    steps = [(epoch, number) for epoch in range(epochs) for number in range(20)]
    orders = [torch.randperm(1200, generator=torch.Generator().manual_seed(epoch)).split(60) for epoch in range(epochs)]
    student.train()
    for step, (epoch, number) in enumerate(steps):
        optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / len(steps)))
        ids = orders[epoch][number]
        logits = student(images[ids]).logits
        divergence = F.kl_div((logits / 4).log_softmax(1), soft[ids], reduction="batchmean")
        optimizer.zero_grad()
        (16 * divergence + F.cross_entropy(logits, labels[ids])).backward()
        optimizer.step()
    student.eval()


def right(logits: torch.Tensor) -> float:
    """Percent."""
    return 100 * float((logits.argmax(1) == digits()[1][TESTED]).double().mean())


def test_most_of_what_quantization_loses_comes_back_at_a_tenth_of_the_runs_rate(tmp_path: Path) -> None:
    """trained_student learned at 0.1; with batch norm folded away, 0.01 throws this one back to guessing."""
    float_student, images, file = badly_scaled(), digits()[0], tmp_path / "model.onnx"
    write_onnx(float_student.deployable(), (1, 8, 8), file, opset=PROFILE.opset, metadata={})
    exported = onnx.load(file)
    before = quantize_model(file, images[:300], PROFILE, reduce_range=False)
    student = prepare_student(float_student, exported, before).eval()
    with torch.no_grad():
        fp32, untrained = right(float_student(images[TESTED]).logits), right(student(images[TESTED]).logits)
    assert fp32 - untrained > 3, "there is something to recover"

    train(student, float_student, rate=0.01, epochs=6)
    file.write_bytes(learned_model(student, exported).SerializeToString())
    after = quantize_model(file, images[:300], PROFILE, reduce_range=False, ranges=learned_ranges(student))
    file.write_bytes(after.SerializeToString())
    with torch.no_grad():
        mine = student(images[TESTED]).logits
    theirs = torch.from_numpy(open_session(file, as_written=True).run(None, {"images": images[TESTED].numpy()})[0])
    assert float((mine.argmax(1) == theirs.argmax(1)).double().mean()) >= 0.995
    assert right(theirs) - untrained >= 0.75 * (fp32 - untrained)
