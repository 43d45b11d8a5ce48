"""What a comparison consists of, kept in its folder so that it can go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kdcompress.errors import InputError, RecipeError
from kdcompress.files import atomic_write
from kdcompress.pipeline._contenders import Contender
from kdcompress.pipeline.base import RUNS
from kdcompress.recipe import build_recipe

PLAN_FILE = "plan.json"
PLAN_VERSION = 1


@dataclass(frozen=True)
class Plan:
    """What a comparison consists of; `plan.json`.

    Args:
        command: what was asked for, in its words.
        seeds: runs of each method.
        trials: settings tried for each method; 1 tries nothing.
        data_digest: of all splits.
        contenders: in the order of the table.
    """

    command: Mapping[str, Any]
    seeds: int
    trials: int
    data_digest: str
    contenders: tuple[Contender, ...]

    def write(self, folder: Path) -> None:
        """Writes `plan.json` atomically."""
        content = {
            "schema_version": PLAN_VERSION,
            "command": self.command,
            "seeds": self.seeds,
            "trials": self.trials,
            "data_digest": self.data_digest,
            "methods": [{"name": c.name, "recipe": c.recipe.model_dump(mode="json")} for c in self.contenders],
        }
        with atomic_write(folder / PLAN_FILE, "w") as handle:
            json.dump(content, handle, indent=2, ensure_ascii=False)

    @classmethod
    def read(cls, folder: Path) -> Plan:
        """Reads it.

        Raises:
            InputError: missing, damaged, or of another version.
        """
        file = folder / PLAN_FILE
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["schema_version"] != PLAN_VERSION:
                raise InputError(
                    f"{PLAN_FILE} of version {content['schema_version']}, not {PLAN_VERSION}", where=str(file)
                )
            contenders = tuple(
                Contender(str(one["name"]), build_recipe(one["recipe"], where=str(file))) for one in content["methods"]
            )
            numbers = int(content["seeds"]), int(content["trials"])
            return cls(dict(content["command"]), *numbers, str(content["data_digest"]), contenders)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise InputError(
                f"{folder} is no comparison: {PLAN_FILE} is missing or damaged", where="--out", fix="name its folder"
            ) from error


def newest() -> Path:
    """The newest comparison under `runs/`.

    Raises:
        InputError: there is none.
    """
    found = list(RUNS.glob(f"*/{PLAN_FILE}"))
    if not found:
        raise InputError(f"there is no comparison under {RUNS}/", where="--resume", fix="name its folder with --out")
    return max(found, key=lambda file: file.stat().st_mtime_ns).parent


def with_seeds(plan: Plan, seeds: int | None) -> Plan:
    """The plan with more seeds.

    Raises:
        RecipeError: fewer than it has.
    """
    if seeds is not None and seeds < plan.seeds:
        raise RecipeError(
            f"the comparison has {plan.seeds} seeds, {seeds} are fewer", where="--seeds", fix="as many or more"
        )
    return replace(plan, seeds=seeds or plan.seeds)


def require_same_command(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuses to go on with something else; what the command leaves out is as it was.

    Raises:
        RecipeError: with both.
    """
    for key, value in asked.items():
        if value and value != stored.get(key):
            raise RecipeError(
                f"other {key}: {value}; the comparison has {stored.get(key)}",
                where="--resume",
                fix="resume with --out (and more --seeds) alone, or start a new comparison",
            )
