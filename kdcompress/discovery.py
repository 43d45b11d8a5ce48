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
import types
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
        InputError: no such file, module or class, not a `base`, or one that cannot be made as all others are.
    """
    kind = base.__name__.lower()
    module_name, _, class_name = name.partition(":")
    if class_name:
        own = _own_class(_import_own(module_name, kind), class_name, base)
        _require_usable(own, name, base)
        return own
    names = list_names(package)
    if name.replace("_", "-") not in names:
        raise InputError(unknown_name(kind, name, names), fix=f"or module:Class for a {kind} of your own")
    module = importlib.import_module(f"{package}.{name.replace('-', '_')}")
    classes = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    found = [c for c in classes if issubclass(c, base) and not inspect.isabstract(c)]
    if len(found) != 1:
        raise InputError(f"{module.__name__} holds {len(found)} complete classes of {base.__name__}, not one")
    _require_usable(found[0], name, base)
    return found[0]


def list_options(cls: type) -> tuple[Option, ...]:
    """The options of a class, in order: the keyword-only arguments of its constructor.

    Raises:
        InputError: an annotation names what its file does not have.
    """
    constructor = cls.__init__  # type: ignore[misc]
    parameters = [p for p in inspect.signature(constructor).parameters.values() if p.kind is p.KEYWORD_ONLY]
    # Only theirs: what else the constructor takes may be imported for type checkers alone.
    annotated = types.SimpleNamespace(__annotations__={p.name: p.annotation for p in parameters})
    names = getattr(inspect.unwrap(constructor), "__globals__", {})
    try:
        hints = typing.get_type_hints(annotated, names, include_extras=True)
    except (NameError, TypeError, SyntaxError) as error:
        where = f"{cls.__module__}:{cls.__name__}"
        raise InputError(f"the annotation of an option cannot be read: {error}", where=where) from error
    return tuple(Option(p.name, Any if hints[p.name] is p.empty else hints[p.name], p.default) for p in parameters)


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
        raise InputError(
            f"{module} cannot be imported: {type(error).__name__}: {reason}",
            where=f"a {kind} of your own is MODULE:Class",
            fix=f"the module's name, not its file's: {module.removesuffix('.py')}" if module.endswith(".py") else "",
        ) from error
    finally:
        if added:
            sys.path.remove(str(Path.cwd()))


def _own_class(module: Any, name: str, base: type[T]) -> type[T]:
    found = getattr(module, name, None)
    if isinstance(found, type) and issubclass(found, base) and found is not base:
        return found
    origin = f"{base.__module__}.{base.__name__}"
    if isinstance(found, type):
        raise InputError(f"{name} does not derive from {origin}", where=module.__name__)
    own = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, base)]
    names = [c.__name__ for c in own if c.__module__ == module.__name__]
    if not names:
        raise InputError(f"{module.__name__} holds no class that derives from {origin}, and none called {name}")
    raise InputError(unknown_name(f"class of {module.__name__}", name, names))


def _require_usable(cls: type, name: str, base: type) -> None:
    """Refuses a class that is not complete, or whose constructor cannot be called as that of `base` is.

    Raises:
        InputError: naming what is missing or in the wrong place.
    """
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        raise InputError(f"{name} does not define {', '.join(missing)}, which every {base.__name__} must")
    first = [p.name for p in inspect.signature(base).parameters.values()]
    parameters = list(inspect.signature(cls).parameters.values())
    placed = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(placed) < len(first) and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        fix = f"def __init__(self, {', '.join(first)}, *, …)"
        raise InputError(f"the constructor of {name} does not take {', '.join(first)}", fix=fix)
    if len(placed) > len(first):
        more = ", ".join(p.name for p in placed[len(first) :])
        fix = f"a * before them: def __init__(self, {', '.join(first)}, *, …)"
        raise InputError(f"{more} of {name} must be keyword-only, as options are", fix=fix)
    bare = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if bare:
        raise InputError(f"{', '.join(bare)} of {name} must have a default, as options have")
