"""What is found by its file name, methods and weightings: its names, its class, the class's options, its card.

Nothing here imports torch: a name is a file, a card is the docstring at its top, and only `find_class` imports it.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, ValidationError, create_model

from kdcompress.errors import InputError, RecipeError, unknown_name

T = TypeVar("T")
CARD_HEADINGS = ("Idea", "Loss", "Paper", "Use", "Cost")


@dataclass(frozen=True)
class Card:
    """What the docstring at the top of a file says: its first line, and the text below each of `CARD_HEADINGS`."""

    title: str
    sections: Mapping[str, str]

    def __str__(self) -> str:
        body = "\n\n".join(f"{heading}\n{text}" for heading, text in self.sections.items())
        return f"{self.title}\n\n{body}"


@dataclass(frozen=True)
class Option:
    """One option of a class: a keyword-only argument of its constructor. The annotation holds its type and range."""

    name: str
    annotation: Any
    default: Any


def list_names(package: str) -> tuple[str, ...]:
    """The names that the files of a package give: `avg_kd.py` is `avg-kd`; `base` and `_private` files are not counted.

    Args:
        package: e.g. "kdcompress.methods".
    """
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return tuple(sorted(m.name.replace("_", "-") for m in found if m.name != "base" and not m.name.startswith("_")))


def find_class(package: str, name: str, base: type[T]) -> type[T]:
    """The class that a name means.

    Args:
        package: where the files of this kind lie.
        name: a file's name, with dashes or underscores, or "module:Class" for one's own, found as Python finds it
            or in the current folder.
        base: what the class must derive from.

    Raises:
        InputError: no such file, module or class, or not a concrete `base`.
    """
    kind = base.__name__.lower()
    module_name, _, class_name = name.partition(":")
    if class_name:
        return _checked(getattr(_import_own(module_name, kind), class_name, None), name, base)
    names = list_names(package)
    if name.replace("_", "-") not in names:
        raise InputError(unknown_name(kind, name, names), fix=f"or module:Class for a {kind} of your own")
    module = importlib.import_module(f"{package}.{name.replace('-', '_')}")
    classes = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    found = [c for c in classes if issubclass(c, base) and not inspect.isabstract(c)]
    return _checked(found[0] if len(found) == 1 else None, name, base)


def list_options(cls: type) -> tuple[Option, ...]:
    """The options of a class, in order: the keyword-only arguments of its constructor."""
    constructor = cls.__init__  # type: ignore[misc]
    hints = typing.get_type_hints(constructor, include_extras=True)
    parameters = inspect.signature(constructor).parameters.values()
    return tuple(Option(p.name, hints.get(p.name, Any), p.default) for p in parameters if p.kind is p.KEYWORD_ONLY)


def check_options(cls: type, options: Mapping[str, Any], *, where: str = "method") -> dict[str, Any]:
    """The options with the types that the constructor asks for; every wrong one is named at once.

    Args:
        cls: a method or weighting.
        options: names and values, e.g. of a recipe's `method` section.
        where: the recipe's section, named in the error.

    Raises:
        RecipeError: unknown names (with the nearest legal one), wrong types, values out of range.
    """
    known = {option.name: option for option in list_options(cls)}
    problems = [unknown_name("key", f"{where}.{n}", [f"{where}.{k}" for k in known]) for n in options if n not in known]
    fields: dict[str, Any] = {name: (option.annotation, option.default) for name, option in known.items()}
    model = create_model("Options", __config__=ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True), **fields)
    try:
        checked = model.model_validate({name: value for name, value in options.items() if name in known})
    except ValidationError as error:
        for item in error.errors():
            message = item["msg"][0].lower() + item["msg"][1:]
            problems.append(f"{where}.{item['loc'][0]}: {message}, not {item['input']!r}")
    if problems:
        raise RecipeError("; ".join(problems), where=where)
    return {name: getattr(checked, name) for name in options}


def read_card(package: str, name: str) -> Card:
    """The card of a name, read from its file without running it.

    Raises:
        InputError: no such file.
    """
    if ":" in name:
        text = inspect.getdoc(_import_own(name.partition(":")[0], "module")) or ""
    else:
        names = list_names(package)
        if name.replace("_", "-") not in names:
            raise InputError(unknown_name(package.rpartition(".")[2].removesuffix("s"), name, names))
        spec = importlib.util.find_spec(f"{package}.{name.replace('-', '_')}")
        assert spec is not None
        assert spec.origin is not None
        text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    title, *lines = text.splitlines() or [""]
    sections: dict[str, list[str]] = {}
    heading = ""
    for line in lines:
        if line in CARD_HEADINGS:
            heading = line
            sections[heading] = []
        elif heading:
            sections[heading].append(line)
    return Card(title, {heading: inspect.cleandoc("\n".join(body)) for heading, body in sections.items()})


def _import_own(module: str, kind: str) -> Any:
    """A user's module; the current folder counts, as it does for `python -m`."""
    added = "" not in sys.path and str(Path.cwd()) not in sys.path
    if added:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(module)
    except Exception as error:  # their file may fail in any way
        reason = " ".join(str(error).split())
        raise InputError(f"{module} cannot be imported: {type(error).__name__}: {reason}", where=kind) from error
    finally:
        if added:
            sys.path.remove(str(Path.cwd()))


def _checked(found: Any, name: str, base: type[T]) -> type[T]:
    if isinstance(found, type) and issubclass(found, base) and not inspect.isabstract(found):
        return found
    raise InputError(f"{name} holds no class that derives from {base.__module__}.{base.__name__} and is complete")
