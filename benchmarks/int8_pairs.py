"""For which (student, target) pairs does INT8 ship, and why not for the others?

    python benchmarks/int8_pairs.py cifar10.zip --holdout holdout/ --trained resnet20=runs/a/student --out pairs.json

Every student of the list is exported, quantized in the layouts that `kdcompress quantize` tries, and timed in turns
against fp32, fp16 and, where there are channels to fill up, fp32 with these filled up; five processes each. Trained
students are judged on the held-out images as well; the others have the weights that they start from (batch norm
statistics of real images), which says nothing of accuracy and all of speed. Targets that are not this machine are not
measured, so nothing ships for them: their column tells how many there are.
"""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcompress.bundle import Bundle, Preprocess, read_bundle
from kdcompress.data import Splits, load_splits
from kdcompress.export import find_target
from kdcompress.gate import Verdict, judge
from kdcompress.latency import describe_machine, versions
from kdcompress.models import build_network
from kdcompress.networks import Student, save_student
from kdcompress.pipeline._gate import find_drop, judged_images, load_images, race, speed_ups
from kdcompress.pipeline._int8_search import Search
from kdcompress.pipeline._verdict import half_precision
from kdcompress.profiles import PROFILES, default_profile
from kdcompress.quantize._fill import fill_channels, find_fillings
from kdcompress.quantize._prepare import name_nodes
from kdcompress.quantize.base import Scheme
from kdcompress.quantize.int8 import Int8Source
from kdcompress.runtimes import open_bundle

ZOO = (
    *((name, 32) for name in ("resnet20", "resnet32", "resnet56", "dscnn", "vgg8")),
    *(
        (f"torchvision/{name}", 224)
        for name in ("resnet18", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large")
    ),
    *((f"torchvision/{name}", 224) for name in ("mnasnet1_0", "shufflenet_v2_x1_0", "efficientnet_b0")),
)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def untrained(arch: str, size: int, images: Tensor, classes: tuple[str, ...], out: Path) -> Bundle:
    """A student with its first weights and the batch norm statistics of real images."""
    torch.manual_seed(0)
    network = build_network(arch, num_classes=len(classes), in_channels=3, image_size=size)
    student = Student(
        network, Preprocess(3, size, size, MEAN, STD), arch=arch, arch_args={}, num_classes=len(classes), in_channels=3
    )
    with torch.no_grad():
        student.train()
        for part in images[:96].split(32):
            student(part)
    return save_student(student.eval(), out, classes=classes)


def filled(source: Bundle, out: Path) -> dict[str, Bundle]:
    """The fp32 file with its channels filled up as in INT8, which makes some networks faster too; if there are any."""
    import onnx

    model = onnx.load(source.model_path)
    name_nodes(model)
    model = onnx.shape_inference.infer_shapes(model)
    fillings = find_fillings(model)
    if not fillings:
        return {}
    fill_channels(model, fillings)
    out.mkdir()
    made = replace(source, path=out)
    onnx.save(model, made.model_path)
    return {"fp32 filled up": made}


def examine(student: Bundle, images: Tensor, splits: Splits, trained: bool, scratch: Path) -> tuple[Verdict, Any]:
    """The gate's verdict on the fastest INT8 file, and all that was tried."""
    profile = default_profile()
    onnx = find_target("onnx").run(student, scratch / "onnx-fp32", profile=profile, images=images[:8])
    source = Int8Source(onnx, images, profile=profile)
    shown = images[:64]
    labels = source.answers(shown).argmax(1)
    search = Search(source, shown, labels, scratch, {"batch_size": 1, "threads": 1})
    chosen = search.laid_out(search.attempt(Scheme()))
    made = source.write(chosen.scheme, scratch / "int8", images=shown)
    judged = judged_images(splits, True, picks=True)
    drop = find_drop(open_bundle(onnx), open_bundle(made), judged, made.num_classes) if trained else None
    rivals = {"fp32": onnx, **filled(onnx, scratch / "filled")}
    if half := half_precision(onnx, profile, images, scratch / "fp16"):
        rivals["fp16"] = half
    latency = race({**rivals, "int8": made}, batch_size=1, threads=1, restarts=5)
    untold = "Accuracy: these weights are not trained."
    verdict = judge(drop, speed_ups(latency, "int8"), max_drop=0.01, measured_on=profile.device, unjudged=untold)
    return verdict, {
        "latency": {name: asdict(entry) for name, entry in latency.items()},
        "tried": search.document(),
        "chosen": chosen.scheme.layout,
        "agreement": chosen.agreement,
        "size_mb": {name: bundle.size_mb for name, bundle in {**rivals, "int8": made}.items()},
    }


def line(name: str, verdict: Verdict, found: Mapping[str, Any]) -> str:
    speed = min(verdict.speed_ups, key=lambda entry: entry.ratio)
    drop = f"{100 * verdict.drop.value:+.2f} [{100 * verdict.drop.low:+.2f}, {100 * verdict.drop.high:+.2f}]" if (
        verdict.drop
    ) else "untrained"  # fmt: skip
    times = {key: f"{entry['p50_ms']:.3g}" for key, entry in found["latency"].items()}
    ratio = f"{speed.ratio:.2f} [{speed.low:.2f}, {speed.high:.2f}] × {speed.rival}"
    return f"| {name} | {found['chosen']} | {times['fp32']} | {times['int8']} | {ratio} | {drop} | {verdict.answer} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--holdout", type=Path, required=True)
    parser.add_argument("--trained", nargs="*", default=[], metavar="ARCH=BUNDLE")
    parser.add_argument("--only", nargs="*", metavar="ARCH")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    splits = load_splits(options.data, holdout=options.holdout)
    given = dict(entry.split("=", 1) for entry in options.trained)
    images = load_images(splits.calibration, 128)
    document: dict[str, Any] = {"machine": describe_machine(), "versions": versions(), "students": {}}
    counts: Counter[str] = Counter()
    print("| student | layers | fp32 ms | INT8 ms | speed-up [95 %] | drop, points [95 %] | gate |", flush=True)
    print("| --- | --- | ---: | ---: | ---: | ---: | --- |", flush=True)
    for arch, size in ZOO:
        if options.only and arch not in options.only:
            continue
        large = F.interpolate(images, size, mode="bilinear", antialias=True) if size != images.shape[-1] else images
        with tempfile.TemporaryDirectory() as name:
            scratch = Path(name)
            if arch in given:
                student = read_bundle(Path(given[arch]))
            else:
                student = untrained(arch, size, large, splits.classes, scratch / "student")
            verdict, found = examine(student, large, splits, arch in given, scratch)
        faster = all(entry.low > 1 for entry in verdict.speed_ups)
        counts["ships" if verdict.answer == "pass" else "faster, not trained" if faster else "not faster or worse"] += 1
        document["students"][arch] = {"verdict": verdict.document(), **found}
        options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        print(line(f"{arch}, {size} px", verdict, found), flush=True)
    elsewhere = (len(PROFILES) - 1) * sum(counts.values())
    print(f"\n{dict(counts)} on {default_profile().name}; not measured on their target: {elsewhere} pairs")


if __name__ == "__main__":
    main()
