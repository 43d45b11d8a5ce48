"""`kdcompress lint`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from kdcompress.lint import Finding

SHOWN = 3
"""Places of one rule that are printed; --json has all."""


@click.command()
@click.argument("model", metavar="MODEL.onnx|BUNDLE", type=click.Path(path_type=Path))
@click.option("--for", "profile", metavar="PROFILE", default="auto", show_default=True, help="kdcompress ls profiles.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with every place.")
def command(model: Path, profile: str, as_json: bool) -> int:
    """Say whether a runtime will take an ONNX file, and run it in the precision meant, and what to do if not.

    Exit code 1 where there is an error among the findings.
    """
    from kdcompress.bundle import BUNDLE_FILE, read_bundle
    from kdcompress.errors import InputError
    from kdcompress.lint import lint
    from kdcompress.profiles import default_profile, get_profile

    chosen = default_profile() if profile == "auto" else get_profile(profile)
    file = model
    if (model / BUNDLE_FILE).is_file():
        bundle = read_bundle(model)
        if bundle.kind != "onnx":
            fix = "kdcompress export it to ONNX first"
            raise InputError(f"this is a {bundle.kind} bundle, an onnx one is needed", where=str(model), fix=fix)
        file = bundle.model_path
    found = lint(file, chosen)
    counts = {severity: sum(one.severity == severity for one in found) for severity in ("error", "warning", "note")}
    if as_json:
        facts = {"model": str(model), "profile": chosen.name, "counts": counts}
        click.echo(json.dumps(facts | {"findings": [asdict(one) for one in found]}, indent=2, ensure_ascii=False))
    else:
        click.echo("\n".join(describe(found)) or "nothing found")
        told = ", ".join(f"{number} {severity}{'s' * (number != 1)}" for severity, number in counts.items())
        click.echo(f"{model} for {chosen.name} ({chosen.runtime} {chosen.version}, {chosen.device}): {told}")
    return 1 if counts["error"] else 0


def describe(found: Sequence[Finding]) -> list[str]:
    """The findings of each rule together: its places, then what to do."""
    lines: list[str] = []
    for name in dict.fromkeys(one.rule for one in found):
        same = [one for one in found if one.rule == name]
        for one in same[:SHOWN]:
            lines.append(f"{one.severity} {name}: {one.where + ': ' if one.where else ''}{one.what}")
        if len(same) > SHOWN:
            lines.append(f"  … and {len(same) - SHOWN} more")
        lines.append(f"  {same[0].fix}")
    return lines
