"""Checkpoints of any format as what they say. Nothing in a file is ever executed.

One file here per format: how a foreign file becomes weights. `recognise.py` finds the network they belong to;
`preprocessing.py` measures the normalisation that a file does not state.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from kdcompress.errors import CheckpointError, InputError
from kdcompress.models import build_network, list_networks, load_weights
from kdcompress.models.torchvision_zoo import current_names
from kdcompress.teachers import bundle_folder, kdcompress_checkpoint, safetensors_file, state_dict, torch_file
from kdcompress.teachers.base import FileContent, LoadedCheckpoint
from kdcompress.teachers.kdcompress_checkpoint import save_checkpoint
from kdcompress.teachers.recognise import Architecture, mismatches, recognise, size_to

__all__ = ["LoadedCheckpoint", "build_from", "load_checkpoint", "read_weights", "save_checkpoint"]

_NAME_IT = "name the architecture: ARCH:PATH (see `kdcompress ls models`)"


def load_checkpoint(spec: str | Path) -> LoadedCheckpoint:
    """Reads a checkpoint and finds the network it belongs to.

    Args:
        spec: a path, or `ARCH:PATH` where the file does not name its architecture. An existing file whose whole name
            this is wins.

    Raises:
        CheckpointError: the file is missing, empty, damaged, foreign or unsafe, or fits no network or several.
        InputError: no network is called ARCH.
        BundleError: a bundle folder contradicts itself.
    """
    named, path = _split(spec)
    content = read_weights(path)
    if content.arch is not None and named in (None, content.arch):
        found = size_to(content.arch, content.state_dict)
        arguments = dict(content.arch_args)
        if content.preprocess is not None:  # vision transformers are made for one size
            arguments.setdefault("image_size", content.preprocess.height)
        architecture = found and Architecture(content.arch, arguments, found.num_classes, found.in_channels)
        wanted = content.arch
    else:
        wanted = named or ""
        architecture = size_to(named, content.state_dict) if named else _recognise(content, path)
    wrong = mismatches(architecture, content.state_dict) if architecture else ("its first layer or head is missing",)
    if architecture is None or wrong:
        more = f" ({len(wrong)} differences in all)" if len(wrong) > 1 else ""
        raise CheckpointError(f"the weights do not fit {wanted}: {wrong[0]}{more}", where=str(path), fix=_NAME_IT)
    if content.classes is not None and len(content.classes) != architecture.num_classes:
        what = f"the file names {len(content.classes)} classes, its head has {architecture.num_classes}"
        raise CheckpointError(what, where=str(path), fix="save it with the classes of its head")
    return LoadedCheckpoint(
        path=path,
        arch=architecture.name,
        arch_args=content.arch_args if content.arch == architecture.name else architecture.arch_args,
        state_dict=content.state_dict,
        num_classes=architecture.num_classes,
        in_channels=architecture.in_channels,
        classes=content.classes,
        preprocess=content.preprocess,
        training_digests=content.training_digests,
        licence=content.licence,
        format=content.format,
        metadata=content.metadata,
    )


def read_weights(path: Path) -> FileContent:
    """Reads a checkpoint of any format, without asking which network it belongs to.

    Raises:
        CheckpointError: the file is missing, empty, damaged, foreign or unsafe.
        BundleError: a bundle folder contradicts itself.
    """
    if path.is_dir():
        return bundle_folder.read(path)
    try:
        with path.open("rb") as file:
            head = file.read(256)
    except FileNotFoundError as error:
        raise CheckpointError("there is no such file", where=str(path), fix="check the path") from error
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    if torch_file.looks_like(head):
        content = torch_file.read(path)
        if kdcompress_checkpoint.is_ours(content):
            return kdcompress_checkpoint.parse(content, path)
        if isinstance(content, dict) and content.get("format") == "kdcompress/training-state":
            what = "the state of a training, to resume it from"
            raise CheckpointError(
                what, where=str(path), fix="give the student/ beside it, or the model.pt of a train run"
            )
        read = state_dict.parse(content, path)
    elif safetensors_file.looks_like(head):
        read = safetensors_file.read(path)
    else:
        if path.suffix in (".onnx", ".engine", ".plan"):
            what, fix = (
                f"a {path.suffix} file, which holds no weights to load",
                "give the bundle: the folder it lies in",
            )
            raise CheckpointError(what, where=str(path), fix=fix)
        raise CheckpointError(
            f"not a checkpoint: {_guess(head)}", where=str(path), fix="give a .pt, .pth or .safetensors"
        )
    return FileContent(
        format=read.format,
        state_dict=current_names(read.state_dict),
        classes=read.classes,
        metadata=read.metadata,
    )


def build_from(checkpoint: LoadedCheckpoint) -> nn.Module:
    """The network with the checkpoint's weights in it, in eval mode.

    Raises:
        CheckpointError: the weights do not fit.
        MissingExtraError: the network is one of timm's, which is not installed.
    """
    arguments = dict(checkpoint.arch_args)
    if checkpoint.preprocess is not None:
        arguments.setdefault("image_size", checkpoint.preprocess.height)
    arguments |= {"num_classes": checkpoint.num_classes, "in_channels": checkpoint.in_channels}
    network = build_network(checkpoint.arch, **arguments)
    weights = dict(checkpoint.state_dict)
    weights |= {
        name: tensor
        for name, tensor in network.state_dict().items()
        if name.endswith("num_batches_tracked") and name not in weights
    }
    try:
        load_weights(network, weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        what = f"the weights do not fit {checkpoint.arch}: {first}"
        raise CheckpointError(what, where=str(checkpoint.path), fix=_NAME_IT) from error
    return network.eval()


def _split(spec: str | Path) -> tuple[str | None, Path]:
    """`ARCH:PATH` as its parts; an existing file of that whole name has no ARCH."""
    if isinstance(spec, Path) or Path(spec).exists() or ":" not in spec:
        return None, Path(spec)
    name, _, path = spec.partition(":")
    return name, Path(path)


def _recognise(content: FileContent, path: Path) -> Architecture:
    found = recognise(content.state_dict)
    if len(found) == 1:
        return found[0]
    hint = content.metadata.get("arch")
    if found:
        names = [architecture.name for architecture in found]
        if hint in names:
            return found[names.index(hint)]
        what = f"its weights fit several networks: {', '.join(names)}"
        raise CheckpointError(what, where=str(path), fix=_NAME_IT)
    for name in (hint, f"timm/{hint}") if isinstance(hint, str) else ():
        try:
            architecture = size_to(name, content.state_dict)
        except InputError:
            continue
        if architecture is not None and not mismatches(architecture, content.state_dict):
            return architecture
    first = ", ".join(list(content.state_dict)[:3])
    what = (
        f"its {len(content.state_dict)} tensors ({first} …) fit none of the {len(list_networks())} networks known here"
    )
    raise CheckpointError(what, where=str(path), fix=_NAME_IT)


def _guess(head: bytes) -> str:
    start = head.lstrip().lower()
    if not head:
        return "the file is empty"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page (a download that failed)"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (fetch the file itself: git lfs pull)"
    return f"it starts with {head[:12]!r}"
