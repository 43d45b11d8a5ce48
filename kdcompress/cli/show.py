"""`kdcompress show`."""

from __future__ import annotations

from dataclasses import asdict

import click


@click.command()
@click.argument("name", metavar="METHOD|WEIGHTING|RECIPE|PROFILE")
def command(name: str) -> None:
    """Print the card of a method or weighting with its options, a recipe with every default, or a profile."""
    from kdcompress.discovery import list_names
    from kdcompress.errors import InputError, unknown_name
    from kdcompress.profiles import ALIASES, PROFILES, get_profile
    from kdcompress.recipe import build_recipe, dump_recipe, list_recipes, read_recipe

    methods, weightings = list_names("kdcompress.methods"), list_names("kdcompress.weightings")
    if name in methods:
        click.echo(describe_method(name))
    elif ":" in name:
        click.echo(describe_own(name))
    elif name in weightings:
        from kdcompress.discovery import read_card

        click.echo(str(read_card("kdcompress.weightings", name)))
    elif name in PROFILES or name in ALIASES:
        for key, value in asdict(get_profile(name)).items():
            click.echo(f"{key:<16} {', '.join(value) if isinstance(value, tuple) else value}")
    elif name in list_recipes() or name.endswith((".yaml", ".yml")):
        click.echo(dump_recipe(build_recipe(read_recipe(name), where=name)), nl=False)
    else:
        known = [*methods, *weightings, *list_recipes(), *PROFILES]
        raise InputError(
            unknown_name("method, weighting, recipe or profile", name, known), fix="or MODULE:Class for one of your own"
        )


def describe_own(name: str) -> str:
    """What is to be said of a method or weighting in a module of one's own.

    Raises:
        InputError: it is neither.
    """
    from kdcompress.discovery import read_card
    from kdcompress.errors import InputError
    from kdcompress.weightings.base import find_weighting

    try:
        return describe_method(name)
    except InputError as error:
        try:
            find_weighting(name)
        except InputError:
            raise error from None
        return str(read_card("kdcompress.weightings", name))


def describe_method(name: str) -> str:
    """The card, what it lacks, and for each option its default and its meaning: `method.temperature = 4.0`."""
    from kdcompress.discovery import CARD_HEADINGS, list_options
    from kdcompress.methods.base import card, find_method

    method, shown = find_method(name), card(name)
    lines = [str(shown)] if shown.title else []
    missing = [heading for heading in CARD_HEADINGS if not shown.sections.get(heading)]
    if missing:
        lines += ["", f"The docstring at the top of its file does not say: {', '.join(missing)}."]
    meanings = documented_arguments(method)
    lines += ["", "Options"]
    for option in list_options(method):
        lines.append(f"    method.{option.name} = {option.default}")
        if option.name in meanings:
            lines.append(f"        {meanings[option.name]}")
    return "\n".join(lines)


def documented_arguments(cls: type) -> dict[str, str]:
    """The entries below `Args:` in a class's docstring, each as one line."""
    import inspect

    found: dict[str, str] = {}
    name, inside = "", False
    for line in (inspect.getdoc(cls) or "").splitlines():
        indent, text = len(line) - len(line.lstrip()), line.strip()
        if indent == 0 and text:
            inside = text == "Args:"
        elif inside and indent == 4:
            name, _, meaning = text.partition(": ")
            found[name] = meaning
        elif inside and text and name:
            found[name] += f" {text}"
    return found
