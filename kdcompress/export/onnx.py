"""ONNX: one self-contained file, `images` (float, [0, 1], NCHW, any batch size) in, `logits` out.

Normalisation is inside; resizing is not (`bundle.json` says how). Class names, preprocessing and digests stand in the
file's metadata, so that it can be used without its bundle. Written by torch's `dynamo` exporter, then made such that
every runtime takes it (`onnx_graph`), then checked: by onnx's checker, by shape inference, and against torch on real
images in several batch sizes.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdcompress import onnx_graph, onnx_opset
from kdcompress.bundle import Bundle, Kind, model_metadata, provenance_step, write_bundle
from kdcompress.errors import InputError, RunError, ShapeError, VerificationError
from kdcompress.networks import load_student
from kdcompress.profiles import Profile
from kdcompress.runtimes.onnxruntime_runtime import first_line, open_session
from kdcompress.types import FeatureShape, Images

_EXPORTER_OPSET = 18
"""What the exporter writes natively; it is lowered to the profile's where nothing changes by that."""
_BATCH_SIZES = (1, 2, 7, 32)
_TOLERANCE = 1e-4
"""Largest difference of a logit to torch's, relative to the largest logit."""


class _OnnxTarget:
    """See the module."""

    takes: Kind = "torch"
    makes: Kind = "onnx"

    def run(self, bundle: Bundle, out: Path, *, profile: Profile, images: Images, replace: bool = False) -> Bundle:
        """See `Target.run`."""
        if bundle.kind != self.takes:
            raise InputError(f"a {bundle.kind} bundle cannot be exported to ONNX", where=str(bundle.path))
        network = load_student(bundle).deployable().cpu().eval()
        step = provenance_step("export-onnx", bundle, opset=profile.opset, torch=torch.__version__)
        provenance = (*bundle.provenance, step)

        def write_model(path: Path) -> None:
            metadata = model_metadata(bundle, provenance)
            made = write_onnx(network, bundle.preprocess.image_shape, path, opset=profile.opset, metadata=metadata)
            if made > profile.newest_opset:
                what = f"this network needs opset {made}, {profile.newest_opset} is the newest wanted"
                raise VerificationError(what, where=str(bundle.path), fix="another student, or a newer runtime")
            verify(path, network, images)

        return write_bundle(
            out,
            write_model,
            kind="onnx",
            precision="fp32",
            classes=bundle.classes,
            preprocess=bundle.preprocess,
            arch=bundle.arch,
            arch_args=bundle.arch_args,
            num_params=bundle.num_params,
            provenance=provenance,
            replace=replace,
        )


TARGET = _OnnxTarget()


def write_onnx(
    network: nn.Module, image_shape: FeatureShape, path: Path, *, opset: int, metadata: Mapping[str, str]
) -> int:
    """Writes a module as one ONNX file and checks it by onnx's checker and by shape inference; answers its opset.

    Args:
        network: images in [0, 1] → logits, in eval mode, on the CPU.
        image_shape: channels, height, width.
        path: the file to write.
        opset: the opset wanted; a higher one is kept where an operator needs it.
        metadata: what to put into the file's metadata.

    Raises:
        RunError: torch cannot export this network.
        VerificationError: the graph that came out is not valid.
    """
    import onnx

    model = _export(network, image_shape, max(opset, _EXPORTER_OPSET))
    onnx_graph.keep_global_pooling(model)
    onnx_graph.shortcuts_as_convolutions(model)
    onnx_graph.drop_unused_initializers(model)
    onnx_graph.strip_traces(model)
    for older in range(opset, onnx_graph.opset_of(model)):
        if onnx_opset.lower_opset(model, older):
            break
    model.producer_name, model.producer_version = "kdcompress", ""
    onnx_graph.set_metadata(model, metadata)
    try:
        onnx.checker.check_model(model, full_check=True)
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise VerificationError(f"the exported graph is not valid: {first_line(error)}") from error
    for value in (*inferred.graph.input, *inferred.graph.output):
        if value.type.tensor_type.shape.dim[0].dim_value:
            raise VerificationError(f"the batch size of {value.name} became fixed during export")
    path.write_bytes(model.SerializeToString(deterministic=True))
    return onnx_graph.opset_of(model)


def _export(network: nn.Module, image_shape: FeatureShape, opset: int) -> Any:
    example = torch.rand(2, *image_shape, generator=torch.Generator().manual_seed(0))
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter's own, about itself
        logger.setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                opset_version=opset,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=False,
                verbose=False,
            )
        except Exception as error:  # the exporter raises what any part of it raises
            raise RunError(f"torch cannot export this network to ONNX: {first_line(error)}") from error
        finally:
            logger.setLevel(level)
    if program is None:
        raise RunError("torch cannot export this network to ONNX")
    return program.model_proto


@torch.no_grad()
def verify(path: Path, network: nn.Module, images: Images) -> float:
    """Compares an ONNX file with the module it was made from; answers the largest relative difference of a logit.

    Args:
        path: the ONNX file.
        network: images in [0, 1] → logits, in eval mode, on the CPU.
        images: real images at the network's size; used in batches of 1, 2, 7 and 32, as far as they go.

    Raises:
        VerificationError: a logit differs by more than 10⁻⁴ of the largest, or is not finite.
        ShapeError: there are no images.
    """
    if len(images) == 0:
        raise ShapeError("no images to compare the exported graph with torch on")
    session = open_session(path)
    worst = 0.0
    for size in sorted({min(size, len(images)) for size in _BATCH_SIZES}):
        batch = images[:size].float().cpu().contiguous()
        expected = network(batch)
        (answer,) = session.run(["logits"], {"images": batch.numpy()})
        found = torch.from_numpy(answer)
        if found.shape != expected.shape:
            raise VerificationError(f"ONNX answers {tuple(found.shape)}, torch {tuple(expected.shape)}")
        difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1.0))
        if not difference <= _TOLERANCE:  # also where it is NaN
            what = f"logits of the ONNX file differ from torch's by {difference:.1e} of the largest logit"
            raise VerificationError(f"{what}, at most {_TOLERANCE:.0e} is allowed", where=f"batch size {size}")
        worst = max(worst, difference)
    return worst
