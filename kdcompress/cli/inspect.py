"""`kdcompress inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("file", metavar="FILE")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(file: str, as_json: bool) -> None:
    """Say what is in a checkpoint or a bundle, without running anything in it."""
    from kdcompress.bundle import BUNDLE_FILE

    facts = describe_bundle(Path(file)) if (Path(file) / BUNDLE_FILE).is_file() else describe_checkpoint(file)
    if as_json:
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False, default=str))
        return
    for name, value in facts.items():
        shown = json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict | list | tuple) else value
        click.echo(f"{name:<18} {'not said' if shown is None else shown}")


def describe_bundle(path: Path) -> dict[str, Any]:
    """The facts of a bundle folder."""
    from dataclasses import asdict

    from kdcompress.bundle import read_bundle

    bundle = read_bundle(path)
    facts = {key: value for key, value in asdict(bundle).items() if key != "path"}
    return facts | {"size_mb": bundle.size_mb, "digest": bundle.digest}


def describe_checkpoint(path: str) -> dict[str, Any]:
    """The facts of a checkpoint file."""
    from dataclasses import asdict

    from kdcompress.teachers import load_checkpoint

    checkpoint = load_checkpoint(path)
    return {
        "format": checkpoint.format,
        "arch": checkpoint.arch,
        "arch_args": dict(checkpoint.arch_args),
        "num_classes": checkpoint.num_classes,
        "in_channels": checkpoint.in_channels,
        "tensors": len(checkpoint.state_dict),
        "values": sum(tensor.numel() for tensor in checkpoint.state_dict.values()),
        "classes": checkpoint.classes,
        "preprocess": asdict(checkpoint.preprocess) if checkpoint.preprocess else None,
        "training_images": None if checkpoint.training_digests is None else len(checkpoint.training_digests),
        "licence": checkpoint.licence,
        "metadata": dict(checkpoint.metadata),
    }
