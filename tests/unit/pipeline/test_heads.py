"""Methods that use the teachers' own classifiers, where one cannot be split off."""

import io
from pathlib import Path

from rich.console import Console

from kdcompress.pipeline._parts import prepare
from kdcompress.pipeline.distill import train_network
from kdcompress.recipe import build_recipe

SHORT = ("train.epochs=1", "train.batch_size=32", "train.precision=fp32", "data.limit=64", "data.test_limit=20")


def test_a_teacher_that_cannot_be_split_teaches_by_its_logits_and_that_is_said(tmp_path: Path) -> None:
    """Inside a residual block: what the logits depend on is more than that map."""
    network = {"student": {"arch": "resnet8", "init": "random"}, "data": {"source": "digits"}}
    train_network(network, SHORT, out=tmp_path)
    whole = {"path": str(tmp_path / "model.pt")}
    cut = {**whole, "stages": ("layer1", "layer3.0.conv1")}
    spoken = Console(file=io.StringIO(), width=400)
    asked = build_recipe({**network, "teachers": [whole, cut], "method": {"name": "ca-mkd"}}, SHORT)
    parts = prepare(asked, spoken, offline=True)
    assert list(parts.methods[0].regressors) == ["0"]  # type: ignore[arg-type]
    said = spoken.file.getvalue()  # type: ignore[attr-defined]
    assert "the classifier of teacher 2 (resnet8) cannot be split off; ca-mkd learns from its logits alone" in said
