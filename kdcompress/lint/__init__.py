"""Will that runtime take this graph, and run it in the precision meant? Rules by theme, one function each."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path

from kdcompress.discovery import list_names
from kdcompress.lint.base import RULES, Finding, Graph, Rule
from kdcompress.onnx_file import read_onnx
from kdcompress.profiles import Profile

__all__ = ["Finding", "Graph", "Rule", "lint", "list_rules"]

_ORDER = ("error", "warning", "note")


def list_rules() -> Mapping[str, Rule]:
    """All rules, sorted by name."""
    for name in list_names("kdcompress.lint"):
        importlib.import_module(f"kdcompress.lint.{name.replace('-', '_')}")
    return {name: RULES[name] for name in sorted(RULES)}


def lint(path: Path, profile: Profile) -> list[Finding]:
    """What stands between an ONNX file and a runtime, the gravest first.

    Args:
        path: the file.
        profile: the runtime and device it is for.

    Raises:
        InputError: the file cannot be opened, or is no valid model.
    """
    graph = Graph(read_onnx(path), path)
    found = [finding for rule in list_rules().values() for finding in rule.run(graph, profile)]
    return sorted(found, key=lambda finding: _ORDER.index(finding.severity))
