"""`kdcompress doctor`."""

from __future__ import annotations

import importlib.util

import click


@click.command()
def command() -> None:
    """Say what this machine and this installation can do."""
    from kdcompress.latency import describe_machine, versions
    from kdcompress.profiles import default_profile

    for name, value in {**versions(), **describe_machine(), "profile": default_profile().name}.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
        click.echo(f"{name:<18} {shown}")
    for extra, package in {"timm": "timm", "trt": "tensorrt"}.items():
        found = importlib.util.find_spec(package) is not None
        click.echo(f"{'extra ' + extra:<18} {'installed' if found else f'not installed (kdcompress[{extra}])'}")
