"""Several processes end where one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranked import run_ranked
from tests.unit.many_ranks import RUNS

EXACT = [name for name in RUNS if name != "batch norm"]
MODULE = "tests.unit.many_ranks"


def outcomes(folder: Path, size: int) -> list[dict[str, Any]]:
    """What came out of all runs, by rank."""
    run_ranked(MODULE, f"{size}:main:{folder}")
    return [{name: torch.load(folder / f"{name} {rank}.pt") for name in RUNS} for rank in range(size)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (found,) = outcomes(tmp_path_factory.mktemp("alone"), 1)
    return found


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_as_many_processes_as_you_like_give_the_weights_that_one_gives(
    size: int, alone: dict[str, Any], tmp_path: Path
) -> None:
    together = outcomes(tmp_path, size)
    for name in RUNS:
        first = together[0][name]
        for other in together[1:]:
            for mine, theirs in zip(first["students"], other[name]["students"], strict=True):
                assert all(torch.equal(mine[key], theirs[key]) for key in mine), f"{name}: the ranks differ"
    for name in EXACT:
        first, reference = together[0][name], alone[name]
        assert first["val"] == reference["val"], name
        torch.testing.assert_close(first["losses"], reference["losses"], rtol=1e-4, atol=0.0, msg=name)
        for mine, theirs in zip(first["students"], reference["students"], strict=True):
            for key in mine:
                torch.testing.assert_close(mine[key], theirs[key], rtol=0.0, atol=1e-5, msg=f"{name}: {key}")


def test_ranks_talk_and_notice_who_does_not(tmp_path: Path) -> None:
    said = run_ranked(MODULE, f"3:talk:{tmp_path}", "3:disagree", "2:lose_one:die", "2:lose_one:hang")
    differs, *silent = sorted(said.splitlines()[:3])
    assert differs == "not all processes have the same data: rank 1 differs from rank 0"
    assert silent == ["silently 2", "silently 2"]
    died, hung = said.splitlines()[3:]
    for line in (died, hung):
        assert line.startswith("another process of this run has ended or does not answer: ")
