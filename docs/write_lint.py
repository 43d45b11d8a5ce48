"""Writes lint.md from the rules' docstrings, and the table of profiles: `python docs/write_lint.py`."""

from collections.abc import Iterator
from pathlib import Path

from kdcompress.lint import list_rules
from kdcompress.profiles import ALIASES, PROFILES

PAGE = Path(__file__).parent / "lint.md"
INTRODUCTION = """# kdcompress lint

`kdcompress lint MODEL.onnx|BUNDLE --for PROFILE` reads an ONNX file, ours or anybody's, and says what stands between it
and that runtime, with what to do about each finding. `--json` prints every place; without it the first three of a rule.

- **error**: the runtime refuses the file, or its answers are wrong. Exit code 1.
- **warning**: it runs, but slower, in another precision or less accurately than meant. Exit code 0, as for
- **note**: good to know.

A file that is no ONNX model, is damaged, or names weights outside its folder is refused in one line, exit code 2.

This page is written by `docs/write_lint.py` from the rules themselves (`kdcompress/lint/`).

## Profiles

`kdcompress ls profiles` lists them, `kdcompress show PROFILE` prints one. They are data (`kdcompress/profiles.py`).
"""
COLUMNS = ("profile", "runtime", "device", "computes in", "opset written, newest read", "activations", "biases", "Q/DQ")


def profiles() -> Iterator[str]:
    """The table of profiles."""
    yield f"| {' | '.join(COLUMNS)} |\n| {' | '.join(['---'] * len(COLUMNS))} |"
    for one in PROFILES.values():
        activations = f"{one.activation_type}, {'symmetric' if one.symmetric else 'asymmetric'}"
        pairs = "inputs, and the skip of a residual Add" if one.skip_only else "inputs and outputs"
        cells = (one.name, f"{one.runtime} {one.version}", one.device, ", ".join(one.precisions))
        rest = (f"{one.opset}, {one.newest_opset}", activations, "float" if one.float_bias else "int32", pairs)
        yield f"| {' | '.join((*cells, *rest))} |"
    yield ""
    yield from (f"`{name}` is `{meant}`, the newest." for name, meant in ALIASES.items())
    yield "Weights are int8, symmetric, one scale for each output channel, for all of them.\n"
    yield from (f"- `{one.name}`: {one.note}." for one in PROFILES.values() if one.note)
    yield ""


def rules() -> Iterator[str]:
    """One section for each rule, by severity."""
    for severity in ("error", "warning", "note"):
        yield f"## Rules: {severity}\n"
        for rule in list_rules().values():
            if rule.severity == severity:
                yield f"### {rule.name}\n\n{rule.what}\n\n*Why:* {rule.why}\n\n*Do:* {rule.fix}\n"


def page() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *profiles(), *rules()])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
