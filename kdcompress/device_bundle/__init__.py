"""The device bundle: one folder that builds, checks, measures and runs a student where neither torch nor kdcompress is.

::

    run.py, runner/      what runs there: Python 3.8, numpy, Pillow, and tensorrt or onnxruntime
    models/              the ONNX file of each precision
    device.json          classes, preprocessing, the models' digests, what the golden test expects, provenance
    labels.txt           class names in the order of the logits
    golden/              pictures as JPEG files, the pixels and logits that must come out
    MODEL_CARD.md        what the student is, where every weight comes from and under which licence
    README.md, targets/  what to do, on which board
    trtexec.md, triton/, Dockerfile.*     for those who do without run.py
    MANIFEST.sha256      digests of all these, as `sha256sum -c` reads them; its own is the identity of the folder

The sources that come from kdcompress itself (`SHARED`) are copied, so that there is one way to build an engine and one
to read a picture. `deploy/` in the repository holds the rest.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import kdcompress
from kdcompress.bundle import Bundle, Precision
from kdcompress.device_bundle._card import Card, render_card, weights_of
from kdcompress.device_bundle._golden import write_golden
from kdcompress.device_bundle._texts import write_texts
from kdcompress.errors import InputError
from kdcompress.files import atomic_folder, file_digest
from kdcompress.profiles import Profile
from kdcompress.types import Images

__all__ = ["MANIFEST", "SHARED", "Card", "deploy_folder", "write_device_bundle"]

MANIFEST = "MANIFEST.sha256"
DEVICE_FILE = "device.json"
FORMAT = "kdcompress/device-bundle"
SCHEMA_VERSION = 1
SHARED = (
    "cuda_driver.py",
    "pictures.py",
    "resizing.py",
    "tensorrt_builder.py",
    "tensorrt_engine.py",
    "tensorrt_layers.py",
    "tensorrt_module.py",
)
"""Files of kdcompress that are part of the runner; each is Python 3.8 and imports none but one another."""

TOLERANCES: Mapping[Precision, float] = {"fp32": 1e-3, "fp16": 2e-2, "int8": 1e-1}
"""Largest difference of a logit on the device to ONNX Runtime's here, relative to the largest logit."""


def deploy_folder() -> Path:
    """The folder of what runs on the device."""
    package = Path(kdcompress.__file__).parent
    shipped = package / "_deploy"
    return shipped if shipped.is_dir() else package.parent / "deploy"


def write_device_bundle(
    out: Path,
    flavours: Mapping[Precision, Bundle],
    *,
    profile: Profile,
    card: Card,
    images: Images | None = None,
    replace: bool = False,
) -> Path:
    """Writes the folder.

    Args:
        out: the folder to make.
        flavours: ONNX bundles of one student by precision, of the same classes, preprocessing and interface.
        profile: what they are for.
        card: what is known of the student beyond its bundles.
        images: real images in [0, 1] for the golden test, beside the synthetic pictures; None: no image of the user's.
        replace: take the place of an existing folder.

    Raises:
        InputError: there is no flavour, or they are not of one student.
        OutputError: `out` is not empty or cannot be written to.
    """
    if not flavours:
        raise InputError("there is no ONNX file to put into a device bundle", fix="kdcompress export --onnx writes one")
    first = next(iter(flavours.values()))
    for bundle in flavours.values():
        same = all(getattr(bundle, name) == getattr(first, name) for name in ("classes", "preprocess", "interface"))
        if bundle.kind != "onnx" or not same:
            raise InputError("not an ONNX bundle of the same student", where=str(bundle.path))
    with atomic_folder(out, replace=MANIFEST if replace else None) as folder:
        (folder / "models").mkdir()
        for precision, bundle in flavours.items():
            shutil.copyfile(bundle.model_path, folder / "models" / f"{precision}.onnx")
        _copy_runner(folder)
        golden = write_golden(folder / "golden", flavours, images)
        document: dict[str, Any] = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "kdcompress": kdcompress.__version__,
            "arch": first.arch,
            "profile": profile.name,
            "runtime": profile.runtime if profile.runtime == "tensorrt" else "onnxruntime",
            "classes": list(first.classes),
            "preprocess": asdict(first.preprocess),
            "interface": asdict(first.interface),
            "best": best_of(flavours, profile, card),
            "models": {
                precision: {
                    "file": f"models/{precision}.onnx",
                    "bundle": bundle.digest,
                    "digest": bundle.model_digest,
                    "tolerance": TOLERANCES[precision],
                }
                for precision, bundle in flavours.items()
            },
            "golden": golden,
            "weights": weights_of(first, card),
            "provenance": {precision: list(bundle.provenance) for precision, bundle in flavours.items()},
        }
        (folder / DEVICE_FILE).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        real = 0 if images is None else len(images)
        labels = "".join(" ".join(name.split()) + "\n" for name in first.classes)
        (folder / "labels.txt").write_text(labels, encoding="utf-8")
        (folder / "MODEL_CARD.md").write_text(render_card(flavours, profile, card, real), encoding="utf-8")
        write_texts(folder, deploy_folder(), flavours, profile, best_of(flavours, profile, card), real)
        _write_manifest(folder)
    return out


def best_of(flavours: Mapping[Precision, Bundle], profile: Profile, card: Card) -> Precision:
    """The model to use where nobody says which: INT8 unless the gate refuses it; fp16 where that is fast."""
    refused = card.verdict is not None and card.verdict.answer == "fail"
    order: list[Precision] = ["fp16", "fp32", "int8"] if profile.runtime == "tensorrt" else ["fp32", "fp16", "int8"]
    if not refused:
        order.insert(0, "int8")
    return next(precision for precision in order if precision in flavours)


def _copy_runner(folder: Path) -> None:
    deploy, package = deploy_folder(), Path(kdcompress.__file__).parent
    shutil.copyfile(deploy / "run.py", folder / "run.py")
    (folder / "runner").mkdir()
    for file in (*sorted((deploy / "runner").glob("*.py")), *(package / name for name in SHARED)):
        shutil.copyfile(file, folder / "runner" / file.name)


def _write_manifest(folder: Path) -> None:
    """One line for each file, in the format of `sha256sum`."""
    files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    lines = [f"{file_digest(folder / name)}  {name}\n" for name in files]
    (folder / MANIFEST).write_text("".join(lines), encoding="utf-8")
