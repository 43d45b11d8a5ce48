"""How networks are run, as processes: the compiler does not see through the checks of the tests' own process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from kdcompress.execution import why_not_compiled
from tests.cli.command import run_cold
from tests.cli.conftest import SHORT, Shop, must


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["losses"][0] for line in lines if line.get("event", line.get("kind")) == "epoch"]


def distill(shop: Shop, out: Path, *words: str) -> str:
    teachers = (shop.folder / "a" / "model.pt", shop.folder / "b" / "model.pt")
    common = ("--teachers", *teachers, "--student", "resnet8", "--out", out, "train.epochs=2", "seed=4")
    return must(run_cold("distill", *common, *SHORT, *words, folder=shop.folder))


def test_a_short_training_is_run_plainly_and_the_recipe_says_so(shop: Shop) -> None:
    resolved = yaml.safe_load((shop.folder / "run" / "recipe.yaml").read_text(encoding="utf-8"))
    for section in ("train", "ensemble"):
        found = resolved[section]
        assert (found["precision"], found["channels_last"], found["compile"]) == ("fp32", False, False)


@pytest.mark.slow
@pytest.mark.skipif(why_not_compiled(torch.device("cpu")) is not None, reason="no compiler")
def test_compiled_networks_learn_what_the_others_do(shop: Shop, tmp_path: Path) -> None:
    """The student's graph is differentiated more than once where a term's gradient is measured."""
    distill(shop, tmp_path / "plain")
    said = distill(
        shop,
        tmp_path / "compiled",
        *("train.compile=true", "train.channels_last=true", "ensemble.compile=true", "ensemble.channels_last=true"),
    )
    assert "compiled" in said
    assert "batch norm folded; the same class as before on 100.00% of" in said
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-2)
