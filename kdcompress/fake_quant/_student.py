"""A student that is trained with the roundings of an INT8 file, and what it has learned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from kdcompress.equalization import Equalization
from kdcompress.errors import InputError
from kdcompress.fake_quant._graph import GraphNetwork, read_graph, tensors
from kdcompress.fake_quant._rounding import FakeQuantize
from kdcompress.folding import find_norms
from kdcompress.networks import Student
from kdcompress.onnx_normalisation import FOLDED, find_normalisation
from kdcompress.taps import eval_mode

ModelProto: TypeAlias = Any

_UNCHANGED = Equalization()
_TOLERANCE = 1e-3
"""Largest difference of a walked graph to the network it was exported from, relative to the largest value."""


def prepare_student(
    student: Student,
    exported: ModelProto,
    quantized: ModelProto,
    *,
    reduce_range: bool = False,
    equalization: Equalization = _UNCHANGED,
) -> Student:
    """A student that computes what the INT8 file computes, and can be trained.

    Its feature maps are those of `student`, rounded where the file rounds them. It normalises inside its network, as
    the files do.

    Args:
        student: as it was exported.
        exported: its fp32 file, an `onnx.ModelProto`.
        quantized: the INT8 file made of that.
        reduce_range: whether weights have 7 bits there.
        equalization: what was done to the fp32 file before the INT8 file was made of it.

    Returns:
        A student of the same architecture's name, on the CPU.

    Raises:
        InputError: the network has a layer that cannot be trained in its exported form, or its feature maps are not in
            the file.
    """
    floats = {name: value for name, value in tensors(exported).items() if value.is_floating_point()}
    images = torch.rand(2, *student.preprocess.image_shape, generator=torch.Generator().manual_seed(0))
    equalized = {name: torch.from_numpy(equalization.rescale(name, each.numpy())) for name, each in floats.items()}
    folds = any(FOLDED in node.output for node in quantized.graph.node)
    normalisation = find_normalisation(exported) if folds else None
    network = read_graph(quantized, equalized, 64 if reduce_range else 127, normalisation)
    _unfold(network, student, equalization)
    made = {name for step in network.steps for name in step.outputs}
    dropped = {node.input[0]: node.output[0] for node in exported.graph.node if node.op_type in ("Relu", "Clip")}
    for stage, tensor in _find_maps(student, read_graph(exported, floats), images).items():
        kept = tensor if tensor in made else dropped.get(tensor, tensor)
        factors = equalization.tensors.get(kept)
        network.show(network.rounded[kept][0] if kept in network.rounded else kept, stage, factors)
    channels = student.preprocess.channels
    return Student(
        network,
        replace(student.preprocess, mean=(0.0,) * channels, std=(1.0,) * channels),
        arch=student.arch,
        arch_args=student.arch_args,
        num_classes=student.num_classes,
        in_channels=student.in_channels,
        stages=tuple(student.feature_shapes),
    )


def count_fixed_norms(before: Student, student: Student) -> tuple[int, int]:
    """How many batch norms of a student keep their statistics when it is trained rounded, and how many it has.

    They have no convolution of their own right before them, or the export made something else of both.

    Args:
        before: as it was exported.
        student: what `prepare_student` made of it.
    """
    total = sum(isinstance(module, _BatchNorm) for module in before.network.modules())
    return total - sum(layer.norm is not None for layer in _network(student).layers()), total


def learned_ranges(student: Student) -> dict[str, tuple[float, int]]:
    """Tensor of the file → its scale, a 32-bit number, and its zero point; every tensor that the student rounds.

    Args:
        student: what `prepare_student` gave.
    """
    network = _network(student)
    found = {}
    for tensor, (_, name) in network.rounded.items():
        module = network.get_submodule(name)
        assert isinstance(module, FakeQuantize)
        found[tensor] = module.range
    return found


def learned_model(student: Student, exported: ModelProto) -> ModelProto:
    """The fp32 file with the weights and biases that were learned, not rounded.

    Args:
        student: what `prepare_student` gave.
        exported: the file that it was made from, its channels equalized if that one's were.
    """
    import onnx
    from onnx import numpy_helper

    learned = _network(student).learned()
    model = onnx.ModelProto()
    model.CopyFrom(exported)
    for item in model.graph.initializer:
        if item.name in learned:
            value = learned[item.name].detach().float().cpu().numpy()
            item.CopyFrom(numpy_helper.from_array(value, item.name))
    return model


def _network(student: Student) -> GraphNetwork:
    assert isinstance(student.network, GraphNetwork)
    return student.network


@torch.no_grad()
def _unfold(network: GraphNetwork, student: Student, equalization: Equalization) -> None:
    """Gives each layer back the batch norm that the export folded into it; weight and bias tell which it was."""
    layers = [layer for layer in network.layers() if layer.bias is not None]
    for conv_path, norm_path in find_norms(student.network, student.preprocess.image_shape):
        convolution, norm = student.network.get_submodule(conv_path), student.network.get_submodule(norm_path)
        assert isinstance(convolution, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        if not norm.affine:
            continue
        folded = [value.cpu().numpy() for value in _fold(convolution, norm)]
        for layer in layers:
            assert layer.bias is not None
            if layer.weight.shape != folded[0].shape:
                continue
            expected = [torch.from_numpy(each) for each in map(equalization.rescale, layer.names, folded)]
            if all(map(_same, (layer.weight, layer.bias), expected)):
                layer.unfold(convolution, norm, equalization)
                layers.remove(layer)
                break


def _fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    return fuse_conv_bn_weights(convolution.weight, convolution.bias, mean, variance, norm.eps, norm.weight, norm.bias)


def _same(value: Tensor, expected: Tensor) -> bool:
    if value.shape != expected.shape:
        return False
    return bool((value - expected).abs().max() <= _TOLERANCE * expected.abs().max().clamp(min=1e-6))


def _find_maps(student: Student, graph: GraphNetwork, images: Tensor) -> dict[str, str]:
    """Feature map of the student → the tensor of its file that has the same values."""
    with eval_mode(student), torch.no_grad():
        outputs = student(images.to(next(student.parameters()).device))
        values = graph.walk(images, everything=True)
    if not _agree(values[graph.ends[1]], outputs.logits.cpu()):
        raise InputError(
            f"{student.arch} cannot be trained in its exported form: that answers otherwise", where="--qat"
        )
    found = {}
    for name, expected in outputs.features.items():
        alike = (tensor for tensor, value in values.items() if _agree(value, expected.cpu()))
        match = next(alike, None)
        if match is None:
            what = f"{student.arch} cannot be trained in its exported form: its {name} is not in the file"
            raise InputError(what, where="--qat")
        found[name] = match
    return found


def _agree(value: Tensor, expected: Tensor) -> bool:
    """Whether two outputs or feature maps are the same; a pooled map may have height and width 1, or neither."""
    if value.ndim not in (2, 4) or value.shape[:2] != expected.shape[:2] or value.numel() != expected.numel():
        return False
    return _same(value.reshape(expected.shape), expected)
