"""`kdcompress evaluate`."""

from __future__ import annotations

import click

from kdcompress.cli._foreign import takes_onnx_files


@click.command()
@click.argument("model", metavar="BUNDLE|CKPT|MODEL.onnx")
@click.option("--data", metavar="DATA", required=True, help="Its test images: a folder, digits, cifar10:ROOT …")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@takes_onnx_files("model", keep=False)
def command(model: str, data: str, as_json: bool) -> None:
    """Accuracy of one bundle or checkpoint, with its interval."""
    from kdcompress.pipeline.report import evaluate_one

    evaluate_one(model, data=data, as_json=as_json)
