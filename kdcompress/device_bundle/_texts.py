"""What is beside the runner: READMEs, trtexec lines, a Triton model repository, Dockerfiles; from `deploy/`."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from string import Template

from kdcompress.bundle import Bundle, Precision
from kdcompress.profiles import Profile

_MAX_BATCH = 32
_FLAGS_OF_8: Mapping[str, str] = {"fp32": "--noTF32", "fp16": "--noTF32 --fp16", "int8": "--noTF32 --fp16 --int8"}


def write_texts(folder: Path, deploy: Path, flavours: Mapping[Precision, Bundle], profile: Profile) -> None:
    """Writes all of them.

    Args:
        folder: the device bundle.
        deploy: where the templates are.
        flavours: the models in it.
        profile: what they are for.
    """
    first = next(iter(flavours.values()))
    name = re.sub(r"[^A-Za-z0-9_-]", "_", first.arch)
    fields = {
        "name": name,
        "profile": profile.name,
        "device": profile.device,
        "precisions": ", ".join(flavours),
        "best": list(flavours)[-1],
        "classes": str(first.num_classes),
        "dims": ", ".join(map(str, first.preprocess.image_shape)),
        "max_batch": str(_MAX_BATCH),
        "target": _target(profile),
    }

    def fill(source: Path, destination: Path) -> None:
        destination.parent.mkdir(parents=True, exist_ok=True)
        text = Template(source.read_text(encoding="utf-8")).substitute(fields)
        destination.write_text(text, encoding="utf-8")

    fill(deploy / "README.template.md", folder / "README.md")
    (folder / "targets").mkdir()
    for file in sorted((deploy / "targets").glob("*.md")):
        shutil.copyfile(file, folder / "targets" / file.name)
    for file in sorted(deploy.glob("Dockerfile.*")):
        shutil.copyfile(file, folder / file.name)
    fill(deploy / "triton" / "config.pbtxt", folder / "triton" / name / "config.pbtxt")
    fill(deploy / "triton" / "README.md", folder / "triton" / "README.md")
    shutil.copyfile(folder / "labels.txt", folder / "triton" / name / "labels.txt")
    (folder / "trtexec.md").write_text(trtexec_lines(flavours), encoding="utf-8")


def _target(profile: Profile) -> str:
    if profile.name.startswith("jetson"):
        return "jetson"
    if profile.runtime == "tensorrt":
        return "x86-gpu"
    return "arm-cpu" if profile.name == "ort-arm" else "x86-cpu"


def trtexec_lines(flavours: Mapping[Precision, Bundle]) -> str:
    """trtexec.md: how to build and time an engine of each model without Python, for each generation of TensorRT."""
    first = next(iter(flavours.values()))
    shape = "x".join(map(str, first.preprocess.image_shape))
    shapes = f"--minShapes=images:1x{shape} --optShapes=images:1x{shape} --maxShapes=images:{_MAX_BATCH}x{shape}"
    lines = [
        "# trtexec",
        "",
        "For those who have no Python on the device. Build there, on the GPU the engine is for. Defaults of trtexec "
        "changed in 11: these lines time the same thing in every version (no data transfers, CUDA graph, spin wait), "
        "and still figures of two versions do not belong into one table. `--dumpLayerInfo` tells what computes in "
        "which precision; `run.py measure` does all this by itself.",
    ]
    for title, flags, timing in (
        ("TensorRT 8.5, 8.6", _FLAGS_OF_8, "--useCudaGraph --useSpinWait --noDataTransfers"),
        (
            "TensorRT 10",
            dict.fromkeys(flavours, "--noTF32 --stronglyTyped"),
            "--useCudaGraph --useSpinWait --noDataTransfers",
        ),
        ("TensorRT 11", dict.fromkeys(flavours, "--noTF32"), ""),
    ):
        lines += ["", f"## {title}", "```"]
        for precision in flavours:
            head = f"trtexec --onnx=models/{precision}.onnx --saveEngine={precision}.engine {shapes} {flags[precision]}"
            tail = "--profilingVerbosity=detailed --dumpLayerInfo"
            lines.append(f"{head} {tail}")
            parts = f"trtexec --loadEngine={precision}.engine --shapes=images:1x{shape} {timing} --iterations=1000"
            lines.append(f"{parts} --percentile=50,90,99")
        lines += ["```"]
    return "\n".join(lines) + "\n"
