"""`kdcompress ls`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import click


def _methods() -> Iterable[str]:
    from kdcompress.discovery import list_names, read_card

    return (f"{name:<18} {read_card('kdcompress.methods', name).title}" for name in list_names("kdcompress.methods"))


def _weightings() -> Iterable[str]:
    from kdcompress.discovery import list_names, read_card

    package = "kdcompress.weightings"
    return (f"{name:<18} {read_card(package, name).title}" for name in list_names(package))


def _models() -> Iterable[str]:
    from kdcompress.models import list_networks

    return list_networks()


def _recipes() -> Iterable[str]:
    from kdcompress.recipe import list_recipes

    return list_recipes()


def _targets() -> Iterable[str]:
    from kdcompress.export import list_targets

    return list_targets()


def _profiles() -> Iterable[str]:
    from kdcompress.profiles import ALIASES, PROFILES, default_profile

    here = default_profile().name
    for name, profile in PROFILES.items():
        numbers = ", ".join(profile.precisions)
        mark = " (this machine)" if name == here else ""
        yield f"{name:<12} {profile.runtime} {profile.version:<7} {profile.device}: {numbers}{mark}"
    yield from (f"{name:<12} = {meant}, the newest" for name, meant in ALIASES.items())


WHAT: dict[str, Callable[[], Iterable[str]]] = {
    "methods": _methods,
    "weightings": _weightings,
    "models": _models,
    "recipes": _recipes,
    "targets": _targets,
    "profiles": _profiles,
}


@click.command()
@click.argument("what", metavar="|".join(WHAT), type=click.Choice(list(WHAT)))
def command(what: str) -> None:
    """List what there is."""
    for line in WHAT[what]():
        click.echo(line)
