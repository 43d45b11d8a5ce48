"""What each runtime wants of a quantized graph, as data; and which instructions this CPU has.

Source: onnxruntime's quantization guide: U8S8 on x86, S8S8 on ARM, `reduce_range` only on x86 without VNNI, where the
16-bit sums of `vpmaddubsw` saturate.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from kdcompress.errors import InputError, unknown_name

IntegerType: TypeAlias = Literal["int8", "uint8"]

VNNI = frozenset({"avx_vnni", "avx512_vnni", "amx_int8"})
"""Instructions that sum products of 8-bit numbers in 32 bits at once."""

_TOLD = (
    *("sse4_2", "avx", "avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "neon", "asimd", "asimddp", "fphp", "asimdhp", "i8mm", "bf16", "sve", "sve2"),
)


@dataclass(frozen=True)
class Profile:
    """How a graph is quantized for one runtime on one kind of CPU.

    Args:
        name: as given to `--for`.
        runtime: what opens the file.
        activation_type: integer type of activations; per tensor, asymmetric where unsigned.
        weight_type: integer type of weights, symmetric.
        per_channel: one scale for each output channel of a weight.
        reduce_range: whether weights get 7 bits: never, or where the CPU that quantizes has no VNNI.
        opset: the opset that a graph is exported with; a higher one only where its operators need it.
        operators: the operators that are quantized; all others stay in fp32.
    """

    name: str
    runtime: str
    activation_type: IntegerType
    weight_type: IntegerType
    per_channel: bool
    reduce_range: Literal["never", "without-vnni"]
    opset: int
    operators: tuple[str, ...]

    def reduces_range(self, instructions: frozenset[str]) -> bool:
        """Whether weights get 7 bits on a CPU with these instruction sets."""
        return self.reduce_range == "without-vnni" and not instructions & VNNI


_CNN_OPERATORS = (
    *("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool"),
    *("Concat", "Split", "Slice", "Pad", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"),
)

PROFILES: Mapping[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile("ort-x86", "onnxruntime", "uint8", "int8", True, "without-vnni", 17, _CNN_OPERATORS),
        Profile("ort-arm", "onnxruntime", "int8", "int8", True, "never", 17, _CNN_OPERATORS),
    )
}


def get_profile(name: str) -> Profile:
    """The profile of that name.

    Raises:
        InputError: there is none; the nearest is named.
    """
    if name not in PROFILES:
        raise InputError(unknown_name("profile", name, PROFILES), where="--for")
    return PROFILES[name]


def default_profile() -> Profile:
    """The profile of the machine this runs on."""
    return PROFILES["ort-arm" if platform.machine().lower() in ("aarch64", "arm64") else "ort-x86"]


def instruction_sets() -> frozenset[str]:
    """The instruction sets of this CPU that matter for networks, by Linux's names; empty where they cannot be read."""
    if platform.system() == "Darwin":
        return _macos_instruction_sets()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return parse_cpuinfo(lines)


def parse_cpuinfo(lines: list[str]) -> frozenset[str]:
    """The instruction sets named in Linux's /proc/cpuinfo ("flags" on x86, "Features" on ARM)."""
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split()) & frozenset(_TOLD)
    return frozenset()


def _macos_instruction_sets() -> frozenset[str]:
    names = {"FEAT_DotProd": "asimddp", "FEAT_I8MM": "i8mm", "FEAT_BF16": "bf16", "AdvSIMD": "asimd"}
    listing = subprocess.run(["/usr/sbin/sysctl", "hw.optional"], capture_output=True, text=True, check=False).stdout
    present = {line.split(":")[0].rsplit(".", 1)[-1] for line in listing.splitlines() if line.endswith(" 1")}
    intel = {"avx2_0": "avx2", "avx512f": "avx512f", "avx512vnni": "avx512_vnni"}
    return frozenset(linux for macos, linux in (names | intel).items() if macos in present)
