"""What is beside the runner: READMEs, trtexec lines, a Triton model repository, Dockerfiles; from `deploy/`."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from string import Template

from kdcompress.bundle import Bundle, Precision
from kdcompress.onnx_graph import opset_of
from kdcompress.profiles import Profile

_MAX_BATCH = 32
_TIMING = " --useCudaGraph --useSpinWait --noDataTransfers"
_CONTAINERS: Mapping[str, str] = {"trt8.5": "22.12", "trt8.6": "23.12", "trt10.3": "24.08", "trt10.13": "25.09"}
"""Profile → the NGC image that comes with that TensorRT; there is none to name for the others."""
_ENGINES = """A TensorRT engine belongs to one version of TensorRT and one GPU. `run.py` builds it here, keeps it in
`engines/`, and builds it again where either has changed. It refuses an engine in which nothing computes in the
precision asked for.
"""
_OPSET_OF_8 = 17
_FLAGS_OF_8: Mapping[str, str] = {"fp32": "--noTF32", "fp16": "--noTF32 --fp16", "int8": "--noTF32 --fp16 --int8"}


def write_texts(
    folder: Path, deploy: Path, flavours: Mapping[Precision, Bundle], profile: Profile, best: Precision, real: int
) -> None:
    """Writes all of them.

    Args:
        folder: the device bundle.
        deploy: where the templates are.
        flavours: the models in it.
        profile: what they are for.
        best: which of them to use.
        real: how many of the golden pictures are images of the user's.
    """
    first = next(iter(flavours.values()))
    name = re.sub(r"[^A-Za-z0-9_-]", "_", first.arch)
    fields = {
        "name": name,
        "profile": profile.name,
        "device": profile.device,
        "precisions": ", ".join(flavours),
        "classes": str(first.num_classes),
        "dims": " × ".join(map(str, _shape(first))),
        "pictures": f"synthetic pictures{f' and {real} of the calibration images (`image-N.png`)' if real else ''}",
        "engines": _ENGINES if profile.runtime == "tensorrt" else "",
        "type": "8 bits, 0 to 255" if first.interface.input == "uint8-nhwc" else "float32 in [0, 1]",
        "order": "last" if first.interface.input == "uint8-nhwc" else "first",
        "scaling": "leave 0 to 255" if first.interface.input == "uint8-nhwc" else "divide by 255",
        "batch": str(first.interface.batch or "batch"),
        "output": first.interface.output,
        "best": best,
        **_triton_fields(flavours, profile, best),
        "target": _target(profile),
        "base": f"=nvcr.io/nvidia/tensorrt:{tag}-py3" if (tag := _CONTAINERS.get(profile.name)) else "",
        "given": "" if tag else "--build-arg BASE=IMAGE ",
        "version": profile.version,
    }

    def fill(source: Path, destination: Path) -> None:
        destination.parent.mkdir(parents=True, exist_ok=True)
        text = Template(source.read_text(encoding="utf-8")).substitute(fields)
        destination.write_text(text, encoding="utf-8")

    fill(deploy / "README.template.md", folder / "README.md")
    (folder / "targets").mkdir()
    for file in sorted((deploy / "targets").glob("*.md")):
        shutil.copyfile(file, folder / "targets" / file.name)
    container = deploy / f"Dockerfile.{'tensorrt' if profile.runtime == 'tensorrt' else 'onnxruntime'}"
    text = Template(container.read_text(encoding="utf-8")).safe_substitute(fields)  # Docker's own variables stay
    (folder / container.name).write_text(text, encoding="utf-8")
    fill(deploy / "triton" / "config.pbtxt", folder / "triton" / name / "config.pbtxt")
    fill(deploy / "triton" / "README.md", folder / "triton" / "README.md")
    shutil.copyfile(folder / "labels.txt", folder / "triton" / name / "labels.txt")
    (folder / "trtexec.md").write_text(trtexec_lines(flavours, profile), encoding="utf-8")


def _shape(bundle: Bundle) -> tuple[int, int, int]:
    """Of one image as the models take it."""
    channels, height, width = bundle.preprocess.image_shape
    return (height, width, channels) if bundle.interface.input == "uint8-nhwc" else (channels, height, width)


def _triton_fields(flavours: Mapping[Precision, Bundle], profile: Profile, best: Precision) -> dict[str, str]:
    """Triton counts the batch among the dimensions where it is fixed. Its ONNX Runtime computes INT8 on a CPU only."""
    bundle = next(iter(flavours.values()))
    fixed = bundle.interface.batch
    first = [str(fixed)] if fixed else []
    on_cpu = profile.runtime != "tensorrt"
    return {
        "served": best if on_cpu else next(name for name in ("fp16", "fp32", "int8") if name in flavours),
        "triton_gpus": "" if on_cpu else "--gpus all ",
        "triton_group": "instance_group [ { kind: KIND_CPU } ]" if on_cpu else "instance_group [ { kind: KIND_GPU } ]",
        "triton_type": "TYPE_UINT8" if bundle.interface.input == "uint8-nhwc" else "TYPE_FP32",
        "triton_dims": ", ".join([*first, *map(str, _shape(bundle))]),
        "triton_classes": ", ".join([*first, str(bundle.num_classes)]),
        "triton_batching": "max_batch_size: 0" if fixed else f"max_batch_size: {_MAX_BATCH}\ndynamic_batching {{ }}",
    }


def _target(profile: Profile) -> str:
    if profile.name.startswith("jetson"):
        return "jetson"
    if profile.runtime == "tensorrt":
        return "x86-gpu"
    return "arm-cpu" if profile.name == "ort-arm" else "x86-cpu"


def _opset(bundle: Bundle) -> int:
    import onnx

    return opset_of(onnx.load(str(bundle.model_path), load_external_data=False))


def trtexec_lines(flavours: Mapping[Precision, Bundle], profile: Profile) -> str:
    """trtexec.md: how to build and time an engine of each model without Python, for each generation of TensorRT.

    An INT8 file that was made for another runtime is left out, since TensorRT refuses it.
    """
    first = next(iter(flavours.values()))
    shape = "x".join(map(str, _shape(first)))
    built, timed = "", ""
    if first.interface.batch is None:  # trtexec refuses shapes for a graph that has fixed ones
        sizes = {"minShapes": 1, "optShapes": 1, "maxShapes": _MAX_BATCH}
        built = "".join(f" --{name}=images:{size}x{shape}" for name, size in sizes.items())
        timed = f" --shapes=images:1x{shape}"
    lines = [
        "# trtexec",
        "",
        "For those who have no Python on the device. Build there, on the GPU the engine is for. Defaults of trtexec "
        "changed in 11: these lines time the same thing in every version (no data transfers, CUDA graph, spin wait), "
        "and still figures of two versions do not belong into one table. `--dumpLayerInfo` tells what computes in "
        "which precision; `run.py measure` does all this by itself.",
    ]
    if profile.runtime != "tensorrt" and "int8" in flavours:
        lines += [
            "",
            f"The INT8 file is for {profile.name}, TensorRT refuses it: `kdcompress quantize --for trt` makes one.",
        ]
        flavours = {precision: bundle for precision, bundle in flavours.items() if precision != "int8"}
    for title, flags, timing in (
        ("TensorRT 8.5, 8.6", _FLAGS_OF_8, _TIMING),
        ("TensorRT 10", dict.fromkeys(flavours, "--noTF32 --stronglyTyped"), _TIMING),
        ("TensorRT 11", dict.fromkeys(flavours, "--noTF32"), ""),  # there _TIMING is the default
    ):
        read = [
            name for name in flavours if not title.startswith("TensorRT 8") or _opset(flavours[name]) <= _OPSET_OF_8
        ]
        if not read:
            continue
        lines += ["", f"## {title}", "```"]
        for precision in read:
            head = f"trtexec --onnx=models/{precision}.onnx --saveEngine={precision}.engine{built} {flags[precision]}"
            lines.append(f"{head} --profilingVerbosity=detailed --dumpLayerInfo")
            head = f"trtexec --loadEngine={precision}.engine{timed}{timing}"
            lines.append(f"{head} --iterations=1000 --percentile=50,90,99")
        lines += ["```"]
    return "\n".join(lines) + "\n"
