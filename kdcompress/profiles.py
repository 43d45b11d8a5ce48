"""What each runtime wants of a graph, as data; and which instructions this CPU has.

Sources: onnxruntime's quantization guide (U8S8 on x86, S8S8 on ARM, `reduce_range` only on x86 without VNNI, where the
16-bit sums of `vpmaddubsw` saturate); TensorRT's headers and the parser's docs/operators.md, release by release
(symmetric, int8, zero points of zero, no int32 bias behind DequantizeLinear); NVIDIA's Model-Optimizer for where Q/DQ
pairs go and which convolutions are too small to gain by INT8; JetPack's release notes.

The newest opset that TensorRT reads, by onnx-tensorrt's docs/operators.md: 8.5 and 8.6 "up to Opset 17"; 10.0 opset 9
to 20; 22 in mid 2025, between 10.9 and 10.13; 10.15 opset 9 to 24. Its change log has nothing on opsets between 10.0
and 10.6 (onnx 1.17), so 10.3 is at 20. For 11.x NVIDIA's opset guide says 25; which of its releases began with that is
not told, so 11.0 is taken to be at 24.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from kdcompress.errors import InputError, unknown_name

IntegerType: TypeAlias = Literal["int8", "uint8"]
Runtime: TypeAlias = Literal["onnxruntime", "tensorrt", "openvino"]
Number: TypeAlias = Literal["fp32", "fp16", "bf16", "int8", "fp8"]

VNNI = frozenset({"avx_vnni", "avx512_vnni", "amx_int8"})
"""Instructions that sum products of 8-bit numbers in 32 bits at once."""

_TOLD = (
    *("sse4_2", "avx", "avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "neon", "asimd", "asimddp", "fphp", "asimdhp", "i8mm", "bf16", "sve", "sve2"),
)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a graph must be like for one runtime on one kind of device.

    Args:
        name: as given to `--for`.
        runtime: what opens the file.
        version: the version of the runtime that this is about, or the oldest one.
        device: what it runs on.
        architectures: what `platform.machine()` calls it there, in lower case; empty: any.
        precisions: what runtime and device compute in.
        typed: every number's type stands in the graph, and no flag of a builder changes it (TensorRT from 10 on).
        opset: the opset that a graph is exported with; a higher one only where its operators need it.
        newest_opset: the newest opset that this version reads.
        activation_type: integer type of activations, one scale for a tensor.
        symmetric: zero points are zero, of activations as well; those of weights always are.
        weight_type: integer type of weights.
        per_channel: one scale for each output channel of a weight; otherwise one for a tensor.
        reduce_range: whether weights get 7 bits: never, or where the CPU that quantizes has no VNNI.
        float_bias: biases stay float; otherwise they are int32 with a DequantizeLinear.
        float_weights: weights stay float in the file, with QuantizeLinear and DequantizeLinear behind them.
        skip_only: Q/DQ pairs stand before what is computed in INT8 and on the skip input of a residual Add, so that
            convolution and Add fuse; otherwise on the inputs and outputs of every operator of `operators`.
        min_channels: below so many input or output channels a layer stays float, as INT8 does not pay (`quantizes`);
            0: all are quantized.
        pools_means: a mean over height and width must be a GlobalAveragePool to be fused or quantized.
        operators: the operators that are quantized; all others stay float.
        note: what else a user of it should know.
    """

    name: str
    runtime: Runtime
    version: str
    device: str
    architectures: tuple[str, ...] = ()
    precisions: tuple[Number, ...]
    typed: bool = False
    opset: int = 17
    newest_opset: int
    activation_type: IntegerType
    symmetric: bool = False
    weight_type: IntegerType = "int8"
    per_channel: bool = True
    reduce_range: Literal["never", "without-vnni"] = "never"
    float_bias: bool = False
    float_weights: bool = False
    skip_only: bool = False
    min_channels: int = 0
    pools_means: bool = True
    operators: tuple[str, ...]
    note: str = ""

    @property
    def version_parts(self) -> tuple[int, ...]:
        """ "10.3" → (10, 3)."""
        return tuple(map(int, self.version.split(".")))

    def reduces_range(self, instructions: frozenset[str]) -> bool:
        """Whether weights get 7 bits on a CPU with these instruction sets."""
        return self.reduce_range == "without-vnni" and not instructions & VNNI

    def quantizes(
        self, inputs: int, outputs: int, *, kernel: tuple[int, ...] = (), groups: int = 1, first: bool = False
    ) -> bool:
        """Whether a layer is large enough for INT8 to pay: NVIDIA's Model-Optimizer's rule, in channels.

        Below `min_channels`, a convolution is quantized with a square kernel, one side a multiple of 8, and either
        side large enough or the image as its input; a grouped one with outputs a multiple of 8 and a kernel of 3 or
        more each way; a matrix product never.

        Args:
            inputs: input channels of one group; rows of a matrix.
            outputs: output channels; columns of a matrix.
            kernel: height and width of a convolution's kernel; empty for a matrix product.
            groups: of a convolution.
            first: the layer reads the image itself.
        """
        if min(inputs, outputs) >= self.min_channels:
            return True
        if groups > 1:
            return outputs % 8 == 0 and min(kernel) >= 3
        reaches = first or max(inputs, outputs) >= self.min_channels
        return len(set(kernel)) == 1 and (inputs % 8 == 0 or outputs % 8 == 0) and reaches


_CNN_OPERATORS = (
    *("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool"),
    *("Concat", "Split", "Slice", "Pad", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"),
)
_ARM = ("aarch64", "arm64")
_ORT_X86 = Profile(
    name="ort-x86",
    runtime="onnxruntime",
    version="1.30",
    device="x86-64 CPU",
    architectures=("x86_64", "amd64"),
    precisions=("fp32", "fp16", "int8"),
    newest_opset=26,
    activation_type="uint8",
    reduce_range="without-vnni",
    operators=_CNN_OPERATORS,
    note="runs fp16 by casting to fp32: smaller, not faster",
)
_TRT_86 = Profile(
    name="trt8.6",
    runtime="tensorrt",
    version="8.6",
    device="NVIDIA GPU; Jetson Orin with JetPack 6.0",
    precisions=("fp32", "fp16", "int8"),
    newest_opset=17,
    activation_type="int8",
    symmetric=True,
    float_bias=True,
    float_weights=True,
    skip_only=True,
    min_channels=16,
    operators=("Conv", "ConvTranspose", "Gemm", "MatMul", "Add"),
    note="precisions are flags of the builder: FP16 and INT8 must be set",
)
_TRT_103 = replace(
    _TRT_86,
    name="trt10.3",
    version="10.3",
    device="NVIDIA GPU",
    precisions=("fp32", "fp16", "bf16", "int8", "fp8"),
    typed=True,
    newest_opset=20,
    note="strongly typed: what is fp32 in the graph runs in fp32; FP8 needs compute capability 8.9 or later",
)
_TRT_1013 = replace(_TRT_103, name="trt10.13", version="10.13", newest_opset=22)

PROFILES: Mapping[str, Profile] = {
    profile.name: profile
    for profile in (
        _ORT_X86,
        replace(
            _ORT_X86,
            name="ort-arm",
            device="64-bit ARM CPU",
            architectures=_ARM,
            activation_type="int8",
            reduce_range="never",
            note="",
        ),
        replace(_TRT_86, name="trt8.5", version="8.5", device="NVIDIA GPU; Jetson Xavier, Orin with JetPack 5.1"),
        _TRT_86,
        _TRT_103,
        _TRT_1013,
        replace(_TRT_1013, name="trt11", version="11.0", newest_opset=24),
        replace(
            _TRT_103,
            name="jetson-orin",
            device="Jetson Orin with JetPack 6.1 or 6.2",
            architectures=_ARM,
            precisions=("fp32", "fp16", "bf16", "int8"),
            note="JetPack 6.0 has TensorRT 8.6 (--for trt8.6), 5.1 has 8.5, 7.2 has 10.16; Orin has no FP8",
        ),
        replace(
            _TRT_1013,
            name="jetson-thor",
            device="Jetson Thor with JetPack 7.0 or 7.1",
            architectures=_ARM,
            note="JetPack 7.2 has TensorRT 10.16; strongly typed: what is fp32 in the graph runs in fp32",
        ),
        replace(
            _ORT_X86,
            name="openvino",
            runtime="openvino",
            version="2026.4",
            device="Intel CPU",
            precisions=("fp32", "fp16", "bf16", "int8"),
            newest_opset=26,
            reduce_range="never",
            pools_means=False,
            note="runs bf16 where the CPU has it; fp16 files are computed in fp32 or bf16",
        ),
    )
}

ALIASES: Mapping[str, str] = {"trt": "trt11"}
"""Names for the newest of a kind."""


def get_profile(name: str) -> Profile:
    """The profile of that name.

    Raises:
        InputError: there is none; the nearest is named.
    """
    name = ALIASES.get(name, name)
    if name not in PROFILES:
        raise InputError(unknown_name("profile", name, [*PROFILES, *ALIASES]), where="--for")
    return PROFILES[name]


def tensorrt_profile(version: tuple[int, ...]) -> Profile:
    """The one of TensorRT's own profiles that is nearest to a version of it: of the same major version where there is
    one, and then not newer where there is one."""
    own = [profile for name, profile in PROFILES.items() if name.startswith("trt")]
    own = [profile for profile in own if profile.version_parts[0] == version[0]] or own
    older = [profile for profile in own if profile.version_parts <= version]
    return max(older, key=lambda profile: profile.version_parts) if older else min(own, key=lambda p: p.version_parts)


def default_profile() -> Profile:
    """The profile of the machine this runs on."""
    return PROFILES["ort-arm" if platform.machine().lower() in _ARM else "ort-x86"]


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
