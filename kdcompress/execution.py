"""How a network is run: number format, memory layout, compiled or not. What it computes does not change by it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, TypeAlias

import torch
import torch._dynamo.config
import torch._functorch.config
from torch import nn

Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Execution:
    """How one network, or each of several alike, is run.

    Args:
        precision: of its passes. A student's weights stay fp32 (autocast); a frozen teacher's are converted.
        channels_last: whether its weights and maps lie in memory with the channels innermost.
        compiled: whether `torch.compile` makes its kernels.
    """

    precision: Precision = "fp32"
    channels_last: bool = False
    compiled: bool = False

    def describe(self) -> str:
        """In words."""
        words: list[str] = [self.precision]
        words += ["channels-last"] if self.channels_last else []
        words += ["compiled"] if self.compiled else []
        return ", ".join(words)

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout as torch names it."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


PLAIN = Execution()
"""fp32, as torch has it."""


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The block in which a network with fp32 weights runs at `precision`; nothing is changed for fp32."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")


_MOST_COMPILED = 64


def compiled(network: nn.Module, *, frozen: bool = False) -> Callable[..., Any]:
    """The forward pass of a network, compiled; one kernel for each size of batch.

    Args:
        network: in training, a term's gradient is measured on the graph that is then differentiated (`balance`), so
            the graph has to outlive a backward pass: its buffers may not be given to the first one.
        frozen: its weights never change, so they may be laid out for the kernels once.
    """
    torch._functorch.config.donated_buffer = False
    # Teachers share a forward method, and each counts as a new version of it.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_COMPILED)
    forward: Callable[..., Any] = torch.compile(network, dynamic=False, options={"freezing": True} if frozen else None)
    return forward


def why_not_compiled(device: torch.device) -> str | None:
    """What `torch.compile` lacks on this machine for this device, in words; None where it has all it needs."""
    if device.type == "cuda":
        return None if find_spec("triton") else "triton is not installed"
    if not any(shutil.which(name) for name in ("g++", "c++", "clang++", "cl")):
        return "there is no C++ compiler"
    return None
