"""A torch bundle, or a run folder with one inside, as a teacher."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from kdcompress.bundle import BUNDLE_FILE, read_bundle
from kdcompress.errors import CheckpointError
from kdcompress.teachers.base import FileContent, as_float32


def read(path: Path) -> FileContent:
    """The weights of the bundle at `path`, or of `path/student`.

    Raises:
        CheckpointError: the folder holds no bundle, or one without torch weights.
        BundleError: the bundle contradicts itself.
    """
    folder = next((folder for folder in (path, path / "student") if (folder / BUNDLE_FILE).is_file()), None)
    if folder is None:
        fix = "give a checkpoint file, a torch bundle, or a run folder that holds student/"
        raise CheckpointError("a folder without a bundle", where=str(path), fix=fix)
    bundle = read_bundle(folder)
    if bundle.kind != "torch":
        what = f"a bundle of kind {bundle.kind}, weights are needed"
        raise CheckpointError(
            what, where=str(folder), fix="give the torch bundle it was made from: student/ in the run"
        )
    try:
        state_dict = load_file(bundle.model_path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{bundle.file} cannot be read: {error}", where=str(folder)) from error
    licences = [step["licence"] for step in bundle.provenance if isinstance(step.get("licence"), str)]
    return FileContent(
        format="torch bundle",
        state_dict=as_float32(state_dict),
        arch=bundle.arch,
        arch_args=bundle.arch_args,
        classes=bundle.classes,
        preprocess=bundle.preprocess,
        training_digests=bundle.training_digests(),
        licence=licences[-1] if licences else None,
        metadata={"bundle": bundle.digest},
    )
