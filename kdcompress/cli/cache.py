"""`kdcompress cache`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


def folder_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--dir DIR`."""
    option = click.option(
        "--dir",
        "folder",
        metavar="DIR",
        type=click.Path(path_type=Path),
        help="Folder of the caches, as in cache.dir [default: kdcompress/teachers in your cache folder].",
    )
    return option(function)


@click.group()
def command() -> None:
    """Look after what teachers said and was stored (cache.enabled=true stores it)."""


@command.command("ls")
@folder_option
def list_command(folder: Path | None) -> None:
    """List the caches, the one used last first."""
    from kdcompress.teacher_cache import default_folder, list_caches

    root = folder or default_folder()
    caches = list_caches(root)
    for cache in caches:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(cache.used_at))
        about = cache.about
        teachers = ", ".join(about.get("teachers", ())) or "not said"
        click.echo(
            f"{cache.key}  {cache.disk_bytes / 1e9:8.3f} GB  {used}  {about.get('data', 'not said')} · "
            f"{about.get('views', 'not said')} · {teachers}"
        )
    total = sum(cache.disk_bytes for cache in caches)
    click.echo(f"{len(caches)} cache{'' if len(caches) == 1 else 's'}, {total / 1e9:.3f} GB in {root}")


@command.command("rm")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Remove all of them.")
@folder_option
def remove_command(names: tuple[str, ...], everything: bool, folder: Path | None) -> None:
    """Remove caches, by the first digits of their names. One that a running training uses stays."""
    from kdcompress.teacher_cache import default_folder, find_caches, list_caches, remove_cache

    root = folder or default_folder()
    if bool(names) == everything:
        raise click.UsageError("name the caches to remove, or give --all; see kdcompress cache ls")
    for cache in list_caches(root) if everything else find_caches(root, names):
        remove_cache(cache)
        click.echo(f"removed {cache.path}")


@command.command("verify")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@folder_option
def verify_command(names: tuple[str, ...], folder: Path | None) -> int:
    """Read every stored answer of all caches, or of those named. Exit code 1 if something is damaged.

    What is damaged is never used: the next training that wants it asks the teachers again.
    """
    from kdcompress.errors import RunError
    from kdcompress.teacher_cache import default_folder, find_caches, list_caches, verify_cache

    root = folder or default_folder()
    bad = False
    for cache in find_caches(root, names) if names else list_caches(root):
        try:
            found = verify_cache(cache)
        except RunError as error:
            bad = True
            click.echo(f"{cache.key}  damaged: {error.what}; {error.fix}")
            continue
        bad |= found.num_damaged > 0
        damaged = (
            f", {found.num_damaged:,} damaged: they will be asked for again" if found.num_damaged else ", all sound"
        )
        click.echo(f"{cache.key}  {found.num_sound:,} answers{damaged}")
    return 1 if bad else 0
