"""An ONNX bundle with another interface: camera layout, probabilities, a fixed batch size; or of another opset."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from kdcompress import onnx_graph, onnx_interface, onnx_opset
from kdcompress.bundle import PLAIN, Bundle, Interface, fit_images, model_metadata, provenance_step, write_bundle
from kdcompress.errors import InputError, ShapeError, VerificationError
from kdcompress.onnx_file import one_line, read_onnx
from kdcompress.runtimes.onnxruntime_runtime import open_session, run_session
from kdcompress.types import Images

_TOLERANCE = 1e-4
"""Largest difference of a log-probability to the source's; twenty times that below fp32, where kernels may differ."""


def change_interface(
    bundle: Bundle,
    out: Path,
    interface: Interface,
    *,
    images: Images,
    replace: bool = False,
    opset: int | None = None,
) -> Bundle:
    """Writes an ONNX bundle with another interface, checked on real images against the one that it comes from.

    Args:
        bundle: an ONNX bundle that takes float NCHW and gives logits; a batch size that it is fixed to stays.
        out: the folder to make.
        interface: how the new file is to be spoken to; `PLAIN` changes nothing of any bundle.
        images: real images in [0, 1]; taken as 8-bit values.
        replace: take the place of an existing bundle.
        opset: of the new file; by default that of the old one.

    Raises:
        InputError: the bundle is no ONNX bundle, or its interface is not the default, but for the batch size.
        VerificationError: the new file does not answer as the old one does, or has no such opset.
    """
    import onnx

    if bundle.kind != "onnx":
        raise InputError(f"a {bundle.kind} bundle has no such interface", where=str(bundle.path))
    fixed = bundle.interface.batch
    wanted = interface.batch or fixed
    changed = interface != PLAIN
    if changed and (dataclasses.replace(bundle.interface, batch=None) != PLAIN or fixed not in (None, wanted)):
        what = f"this file is {bundle.interface.changes[1:]} already"
        raise InputError(what, where=str(bundle.path), fix="start from the plain one")
    if len(images) == 0:
        raise ShapeError("no images to compare on")
    interface = dataclasses.replace(interface, batch=wanted) if changed else bundle.interface
    model = read_onnx(bundle.model_path)
    if opset is not None:
        try:
            model = onnx_opset.at_opset(model, opset)
        except Exception as error:  # the converter has kinds of its own
            what = f"this graph cannot be written in opset {opset}: {one_line(error)}"
            raise VerificationError(what, where=str(bundle.path)) from error
    step = provenance_step(
        "change-interface", bundle, **dataclasses.asdict(interface), opset=onnx_graph.opset_of(model)
    )
    provenance = (*bundle.provenance, step)
    if changed:
        onnx_interface.set_interface(model, interface)
    onnx_graph.set_metadata(model, model_metadata(dataclasses.replace(bundle, interface=interface), provenance))
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # the checker has kinds of its own
        raise VerificationError(f"the graph does not allow this: {one_line(error)}", where=str(bundle.path)) from error
    fitted = (fit_images(images, bundle.preprocess) * 255).round() / 255

    def write_model(path: Path) -> None:
        path.write_bytes(model.SerializeToString(deterministic=True))
        before, after = (
            torch.log_softmax(run_session(open_session(file), fitted, spoken).double(), 1)
            for file, spoken in ((bundle.model_path, bundle.interface), (path, interface))
        )
        # The least likely classes have logarithms that a probability of 32 bits cannot hold.
        difference = float((before.clamp(min=-15) - after.clamp(min=-15)).abs().max())
        allowed = _TOLERANCE if bundle.precision == "fp32" else 20 * _TOLERANCE
        same = bool((before.argmax(1) == after.argmax(1)).all()) if bundle.precision == "int8" else difference < allowed
        if not same:
            raise VerificationError(f"log-probabilities differ by {difference:.1e} from the source's")

    return write_bundle(
        out,
        write_model,
        kind="onnx",
        precision=bundle.precision,
        classes=bundle.classes,
        preprocess=bundle.preprocess,
        arch=bundle.arch,
        arch_args=bundle.arch_args,
        num_params=bundle.num_params,
        provenance=provenance,
        interface=interface,
        replace=replace,
    )
