"""A small trained network and the bundles made from it, shared by the tests of export, quantize and runtimes."""

from __future__ import annotations

import atexit
import copy
import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from kdcompress.bundle import Bundle, Preprocess, provenance_step
from kdcompress.export import find_target
from kdcompress.models import build_network
from kdcompress.networks import Student, save_student
from kdcompress.profiles import get_profile

PREPROCESS = Preprocess(1, 8, 8, (0.3,), (0.35,))
CLASSES = tuple(f"digit {number}" for number in range(10))


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits: images in [0, 1] and labels."""
    found = load_digits()
    return torch.from_numpy(found.images).float()[:, None] / 16, torch.from_numpy(found.target).long()


@functools.cache
@torch.enable_grad()
def trained_student() -> Student:
    """A resnet8 that knows most of the first 1,200 digits."""
    torch.manual_seed(0)
    network = build_network("resnet8", num_classes=10, in_channels=1, image_size=8)
    student = Student(network, PREPROCESS, arch="resnet8", arch_args={}, num_classes=10, in_channels=1)
    images, labels = digits()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    student.train()
    for epoch in range(4):
        for ids in torch.randperm(1200, generator=torch.Generator().manual_seed(epoch)).split(60):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(student(images[ids]).logits, labels[ids]).backward()
            optimizer.step()
    return student.eval()


@torch.no_grad()
def badly_scaled() -> Student:
    """The same function, but the channels between two convolutions have scales that lie far apart.

    As in trained MobileNets (Nagel et al. 2019, https://arxiv.org/abs/1906.04721, fig. 2): one scale for the tensor
    leaves few steps to most of its channels.
    """
    student = copy.deepcopy(trained_student())
    generator = torch.Generator().manual_seed(1)
    for block in student.network.modules():
        if all(hasattr(block, name) for name in ("conv1", "bn1", "conv2")):
            parts: Any = block
            scales = (1.5 * torch.randn(parts.bn1.num_features, generator=generator)).exp()
            parts.bn1.weight *= scales
            parts.bn1.bias *= scales
            parts.conv2.weight /= scales[:, None, None]
    return student.eval()


def student_bundle(path: Path) -> Bundle:
    """The student as a torch bundle."""
    return save_student(trained_student(), path, classes=CLASSES, provenance=(provenance_step("train", seed=0),))


@functools.cache
def onnx_bundle() -> Bundle:
    """The student as an ONNX bundle, exported once for all tests."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    source = student_bundle(Path(folder.name) / "student")
    profile, images = get_profile("ort-x86"), digits()[0][:40]
    return find_target("onnx").run(source, Path(folder.name) / "onnx-fp32", profile=profile, images=images)
