"""What is compared: each word of `--methods` as the recipe that it means, equal to the others in all that must be."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kdcompress.discovery import check_options
from kdcompress.errors import RecipeError, unknown_name
from kdcompress.methods.base import find_method, list_methods
from kdcompress.recipe import Recipe, build_recipe, list_recipes, merge, parse_override, read_recipe

REFERENCE = "avg-kd"
SUPERVISED = "supervised"
EQUAL_COMPUTE = "supervised-equal-compute"
OWN_DATA = ("views", "padding", "mixup_alpha")
"""How images are augmented is a recipe's own; which images there are is the same for all."""
COMMON_TRAIN = ("epochs", "device", "precision", "checkpoint_minutes")


@dataclass(frozen=True)
class Contender:
    """One row of the comparison.

    Args:
        name: as it was asked for.
        recipe: of its runs, but for the seed.
    """

    name: str
    recipe: Recipe

    @property
    def folder(self) -> str:
        """Its folder's name."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.name).strip("-.")


def read_contenders(
    words: Sequence[str], changes: Mapping[str, Any], overrides: Sequence[str], recipe: str | None
) -> tuple[Contender, ...]:
    """The contenders: the reference and `supervised` first, then those that were asked for, in their order.

    Args:
        words: `NAME`, `NAME:OPTION=VALUE,…`, or the name or file of a recipe.
        changes: recipe sections that all share.
        overrides: texts `KEY=VALUE` that all share.
        recipe: name or file of a recipe that all share but for its method.

    Raises:
        RecipeError: a word that means nothing, two that mean one folder, or an override of one method's options.
    """
    for override in overrides:
        if parse_override(override)[0][0] == "method":
            fix = f"--methods {REFERENCE}:{override.partition('.')[2]}"
            raise RecipeError(f"{override} would be an option of every method", where="KEY=VALUE", fix=fix)
    shared = {key: value for key, value in (read_recipe(recipe) if recipe else {}).items() if key != "method"}
    fixed = build_recipe(merge(shared, changes), overrides, where=f"recipe {recipe}" if recipe else "the command")
    wanted = {"enabled": True, "views": fixed.train.epochs}  # as many views as epochs: as varied as without a cache
    unsaid = {key: value for key, value in wanted.items() if key not in fixed.cache.model_fields_set}
    fixed = fixed.model_copy(update={"cache": fixed.cache.model_copy(update=unsaid)})
    names = dict.fromkeys((REFERENCE, SUPERVISED, *words))
    contenders = tuple(read_contender(name, shared, changes, overrides, fixed) for name in names)
    folders: dict[str, str] = {}
    for one in contenders:
        if folders.setdefault(one.folder, one.name) != one.name or one.folder in ("", EQUAL_COMPUTE):
            raise RecipeError(f"{one.name!r} and {folders[one.folder]!r} are named alike", where="--methods")
    return contenders


def read_contender(
    word: str, shared: Mapping[str, Any], changes: Mapping[str, Any], overrides: Sequence[str], fixed: Recipe
) -> Contender:
    """The contender that one word means; what `fixed` fixes for all is taken from there.

    Raises:
        RecipeError: it means nothing.
    """
    if word.endswith((".yaml", ".yml")) or word in list_recipes():
        content = merge(merge(shared, read_recipe(word)), changes)
        where = f"recipe {word}"
    else:
        name, options = parse_method(word)
        if ":" not in name and name.replace("_", "-") not in list_methods():
            what = unknown_name("method or recipe", name, [*list_methods(), *list_recipes()])
            raise RecipeError(what, where="--methods", fix="or MODULE:Class for a method of your own")
        content = merge(merge(shared, changes), {"method": {"name": name, **options}})
        where = f"--methods {word}"
    own = build_recipe(content, overrides, where=where)
    method = find_method(own.method.name)
    options = check_options(method, own.method.options)
    student = fixed.trained[0]
    arch, arguments = (student.arch, student.args) if student.arch else (own.trained[0].arch, own.trained[0].args)
    alone = own.trained[0].model_copy(update={"arch": arch, "args": arguments})
    least, most = method.needs(**options).students
    together = (alone, *fixed.students[1:most])
    several = (*together, *[alone] * (least - len(together))) if most > 1 else ()
    return Contender(
        word,
        own.model_copy(
            update={
                "seed": fixed.seed,
                "data": fixed.data.model_copy(update={key: getattr(own.data, key) for key in OWN_DATA}),
                "teachers": fixed.teachers,
                "student": alone,
                "students": several,
                "train": own.train.model_copy(update={key: getattr(fixed.train, key) for key in COMMON_TRAIN}),
                "cache": fixed.cache,
            }
        ),
    )


def parse_method(word: str) -> tuple[str, dict[str, Any]]:
    """`amtml-kd:variant=paper,temperature=2` → ("amtml-kd", {"variant": "paper", "temperature": 2}).

    A name may itself hold a colon, `my_pkg.my_kd:MyKD:temperature=2`.

    Raises:
        RecipeError: an option that is not NAME=VALUE.
    """
    head, colon, tail = word.rpartition(":")
    if not colon or "=" not in tail:
        if colon and head in list_methods():
            raise RecipeError(f"{tail!r} is no option", where=f"--methods {word}", fix=f"{head}:NAME=VALUE,…")
        return word, {}
    options = {}
    for option in re.split(r",(?=\s*[a-z_][a-z_0-9]*=)", tail):
        (_, name), value = parse_override(f"method.{option.strip()}")
        options[name] = value
    return head, options


def with_epochs(contender: Contender, name: str, epochs: int) -> Contender:
    """The same under another name, with another number of epochs."""
    train = contender.recipe.train.model_copy(update={"epochs": epochs})
    return replace(contender, name=name, recipe=contender.recipe.model_copy(update={"train": train}))
