"""Writes methods.md from the cards: `python docs/write_methods.py`."""

from collections.abc import Iterator
from pathlib import Path

from kdcompress.discovery import list_names, list_options, read_card
from kdcompress.methods.base import find_method

PAGE = Path(__file__).parent / "methods.md"
INTRODUCTION = """# Methods and weightings

Written by `docs/write_methods.py` from the cards at the top of the files; `kdcompress show NAME` prints the same.
"""


def lines(package: str, kind: str) -> Iterator[str]:
    """The paragraphs of one package's cards."""
    yield f"## {kind}\n"
    for name in list_names(package):
        card = read_card(package, name)
        yield f"### {name}\n"
        yield f"{card.title}\n"
        for heading, text in card.sections.items():
            yield f"**{heading}**\n"
            yield f"```text\n{text}\n```\n"
        if kind == "Methods":
            options = list_options(find_method(name))
            shown = ", ".join(f"`{option.name}={option.default}`" for option in options)
            yield f"**Options** {shown or 'none'}\n"


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION, *lines("kdcompress.methods", "Methods"), *lines("kdcompress.weightings", "Weightings")]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
