"""`kdcompress show`."""

from __future__ import annotations

import click


@click.command()
@click.argument("name", metavar="METHOD|WEIGHTING|RECIPE")
def command(name: str) -> None:
    """Print the card of a method or weighting with its options, or a recipe with every default written out."""
    from kdcompress.discovery import list_names
    from kdcompress.errors import InputError, unknown_name
    from kdcompress.recipe import build_recipe, dump_recipe, list_recipes, read_recipe

    methods, weightings = list_names("kdcompress.methods"), list_names("kdcompress.weightings")
    if name in methods or ":" in name:
        click.echo(describe_method(name))
    elif name in weightings:
        from kdcompress.discovery import read_card

        click.echo(str(read_card("kdcompress.weightings", name)))
    elif name in list_recipes() or name.endswith((".yaml", ".yml")):
        click.echo(dump_recipe(build_recipe(read_recipe(name), where=name)), nl=False)
    else:
        raise InputError(unknown_name("method or recipe", name, [*methods, *weightings, *list_recipes()]))


def describe_method(name: str) -> str:
    """The card, and a line per option: `method.temperature = 4.0`."""
    from kdcompress.discovery import list_options
    from kdcompress.methods.base import card, find_method

    options = list_options(find_method(name))
    lines = [f"    method.{option.name} = {option.default}" for option in options]
    return "\n".join([str(card(name)), "", "Options", *lines])
