"""What each command does; each answers the exit code."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DeviceError
from .folder import DeviceBundle, Model, open_folder
from .golden import Agreement, compare, read_pictures
from .measure import measure as measure_models
from .measure import obey, require_place, write_document
from .pictures import SUFFIXES
from .sessions import Settings, choose_runtime, look_inside, open_model
from .tensorrt_builder import BuildOptions

_THREADS_A_CORE = 4
_WAITING = 0.8
"""Share of the time between the events, that handing over takes, above which trtexec, too, says so."""
_MARGIN = 0.025
"""Coefficient of variation above which trtexec, too, asks for locked clocks."""


def check(root: Path, arguments: argparse.Namespace) -> int:
    """Holds every model's answers against the golden test."""
    bundle, models, settings = _begin(root, arguments)
    agreements, _ = _check(bundle, models, settings)
    return 0 if all(one.passed for one in agreements.values()) else 1


def build(root: Path, arguments: argparse.Namespace) -> int:
    """Builds the engines."""
    bundle, models, settings = _begin(root, arguments)
    if settings.runtime != "tensorrt":
        raise DeviceError("only TensorRT has engines to build", "--runtime")
    for model in models:
        opened = open_model(model, settings)
        shares = look_inside(model, opened, _zeros(bundle, model, settings)) or {}
        parts = ", ".join(f"{share['share']:.0%} {name}" for name, share in shares.items()) or "not told"
        print(f"{model.precision}: {settings.engines / model.precision}.engine · layers: {parts}")
    return 0


def measure(root: Path, arguments: argparse.Namespace) -> int:
    """Measures, and writes the file that kdcompress joins."""
    bundle, models, settings = _begin(root, arguments)
    require_place(arguments.out)
    batch_sizes = _batch_sizes(models, settings, arguments.batch_sizes)
    agreements, inside = _check(bundle, models, settings)
    if not all(one.passed for one in agreements.values()):
        raise DeviceError("nothing is measured: the golden test failed", str(root), "see the lines above", 1)
    document = measure_models(
        bundle,
        models,
        settings,
        agreements,
        inside,
        batch_sizes=batch_sizes,
        warmup=arguments.warmup,
        iterations=arguments.iterations,
        restarts=arguments.restarts,
        sustained_s=arguments.sustained,
    )
    write_document(document, arguments.out)
    _tell(document)
    print(f"{arguments.out}: on the machine where the run is, kdcompress report RUN --merge {arguments.out.name}")
    return 0


def classify(root: Path, arguments: argparse.Namespace) -> int:
    """Names what is in pictures; one that cannot be read is told and passed over."""
    bundle, models, settings = _begin(root, arguments)
    model = models[-1] if arguments.precisions else bundle.models[bundle.best]
    opened = open_model(model, settings)
    failed = False
    for path in _pictures(arguments.paths):
        try:
            pixels = bundle.read(path, arguments.resize)
        except DeviceError as error:
            failed = True
            print(f"error: {error}", file=sys.stderr)
            continue
        logits = opened.answer(model.feed(pixels[None]))[0].astype(np.float64)
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        best = [(bundle.classes[index], float(shares[index])) for index in np.argsort(-shares)[: arguments.top]]
        if arguments.json:
            print(json.dumps({"file": str(path), "classes": dict(best)}, ensure_ascii=False))
        else:
            print(f"{path}: {', '.join(f'{name} {share:.1%}' for name, share in best)}")
    return 2 if failed else 0


def child(root: Path, arguments: argparse.Namespace) -> int:
    """One measuring process."""
    write_document(obey(open_folder(root), arguments.order), arguments.answer)
    return 0


def _begin(root: Path, arguments: argparse.Namespace) -> tuple[DeviceBundle, list[Model], Settings]:
    bundle = open_folder(root)
    runtime = choose_runtime(bundle, arguments.runtime)
    models = bundle.choose(arguments.precisions)
    cores = os.cpu_count() or 1
    if arguments.threads > _THREADS_A_CORE * cores:
        raise DeviceError(f"{arguments.threads} threads for {cores} cores", "--threads", "as many as there are cores")
    fixed, measured = models[0].batch, getattr(arguments, "batch_sizes", None) or (1,)
    sizes = arguments.batch or ((fixed, fixed, fixed) if fixed else (1, 1, max(32, *measured)))
    if len(sizes) != 3:
        raise DeviceError(f"{len(sizes)} batch sizes, three are needed", "--batch", "give MIN,OPT,MAX")
    options = BuildOptions(
        *sizes,
        workspace_mb=arguments.workspace_mb,
        builder_level=arguments.builder_level,
        version_compatible=arguments.version_compatible,
        hardware_compatible=arguments.hardware_compatible,
    )
    settings = Settings(runtime, arguments.threads, arguments.engines.absolute(), options)
    return bundle, models, settings


def _check(
    bundle: DeviceBundle, models: list[Model], settings: Settings
) -> tuple[dict[str, Agreement], dict[str, Any]]:
    pixels, off = read_pictures(bundle)
    allowed = bundle.golden["pixel_tolerance"]
    if off > allowed:
        what = f"pictures are decoded otherwise here: a pixel differs by {off} of 255, at most {allowed} is allowed"
        raise DeviceError(what, "golden/", "pip install --upgrade Pillow", 1)
    print(f"golden test: {len(pixels)} pictures, pixels within {off} of 255")
    agreements, inside = {}, {}
    for model in models:
        opened = open_model(model, settings)
        found = agreements[model.precision] = compare(bundle, model, opened, pixels)
        inside[model.precision] = look_inside(model, opened, _zeros(bundle, model, settings))
        print(
            f"{model.precision} · {opened.runtime} · largest difference of a logit {found.difference:.1e} of the "
            f"largest, {model.tolerance:.0e} allowed · same class {found.same_class:.0%} · "
            f"{'ok' if found.passed else 'FAILED'}"
        )
        if not found.passed and model.precision == "int8" and _rounds_halves_wrongly(opened.runtime):
            print("  onnxruntime before 1.30 rounds INT8 with fp16 scales wrongly: pip install --upgrade onnxruntime")
    return agreements, inside


def _rounds_halves_wrongly(runtime: str) -> bool:
    name, _, version = runtime.partition(" ")
    numbers = version.split(".")[:2]
    return name == "onnxruntime" and all(n.isdigit() for n in numbers) and [int(n) for n in numbers] < [1, 30]


def _zeros(bundle: DeviceBundle, model: Model, settings: Settings) -> np.ndarray:
    return model.feed(np.zeros((settings.least_batch(model), *bundle.image_shape), np.uint8))


def _batch_sizes(models: list[Model], settings: Settings, asked: tuple[int, ...] | None) -> list[int]:
    """The batch sizes to measure: those asked for, or the least that the models and their engines take.

    Raises:
        DeviceError: they do not take one that was asked for.
    """
    sizes = sorted(set(asked or (settings.least_batch(models[0]),)))
    fixed, options = models[0].batch, settings.options
    if fixed is not None and sizes != [fixed]:
        raise DeviceError(f"these models take {fixed} images at once", "--batch-sizes", "give that number")
    if settings.runtime == "tensorrt" and not options.min_batch <= sizes[0] <= sizes[-1] <= options.max_batch:
        what = f"{sizes[0]} to {sizes[-1]} images, the engines take {options.min_batch} to {options.max_batch}"
        raise DeviceError(what, "--batch-sizes", "give --batch MIN,OPT,MAX that holds them")
    return sizes


def _pictures(paths: list[Path]) -> Iterator[Path]:
    for path in paths:
        if path.exists() and not path.is_dir() and not path.is_file():
            raise DeviceError(f"{path} is no picture and no folder", "classify", "name pictures, or folders of them")
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not found:
                raise DeviceError(
                    "no pictures in this folder", str(path), f"files that end in {', '.join(sorted(SUFFIXES))}"
                )
            yield from found
        else:
            yield path


def _tell(document: dict[str, Any]) -> None:
    for entry in document["models"]:
        call = entry["extras"]["call_ms"]
        gpu = entry["extras"].get("gpu_ms")
        parts = [f"{entry['precision']}, batch {entry['batch_size']}: p50 {call['p50']:.3f} ms, p99 {call['p99']:.3f}"]
        parts += [f"n = {call['n']}"] + ([f"between CUDA events p50 {gpu['p50']:.3f}"] if gpu else [])
        print(", ".join(parts))
        if gpu and entry["extras"]["enqueue_ms"]["p50"] > _WAITING * gpu["p50"]:
            print("  the GPU waits for the CPU, which hands over layer by layer: a CUDA graph (trtexec.md) is faster")
        if call["cv"] > _MARGIN:
            print(f"  the calls vary by {call['cv']:.1%}: hold the clocks (targets/ says how), and run nothing else")
        if call["n"] < 1000:
            print(f"  {call['n']} calls are few for a p99: 1,000 are meant")
