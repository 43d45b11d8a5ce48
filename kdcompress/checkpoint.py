"""`last.pt`: everything that a run needs to go on exactly where it was, but the teachers.

The file holds tensors, numbers, texts, lists and dictionaries, so it opens with `weights_only=True`. No state of a
random generator is in it: what a step draws is a function of (seed, step), see `seed_step`.
"""

from __future__ import annotations

import io
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kdcompress import ranks
from kdcompress.errors import CheckpointError
from kdcompress.files import atomic_write

FORMAT = "kdcompress/training-state"
VERSION = 1
LAST = "last.pt"
"""Its name in a run folder."""

Setting: TypeAlias = str | int | float | bool | tuple[float, ...] | None


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Writes `state` atomically: a kill at any instant leaves the old file or the new one.

    Args:
        path: the file.
        state: tensors, numbers, texts, None, and lists, tuples and dictionaries of them.

    Raises:
        TypeError: something else is in it, so that it could not be read again.
        OutputError: the place cannot be written to.
        RunError: the disk is full.
    """
    _require_plain(state, "")
    content = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, **state}, content)
    with atomic_write(path) as handle:
        handle.write(content.getbuffer())


def load_state(path: Path) -> dict[str, Any]:
    """Reads what `save_state` wrote, onto the CPU, running no code from it. Of several processes rank 0 reads it.

    Raises:
        CheckpointError: missing, truncated, of another kind or of another version.
    """
    try:
        content = ranks.share(path.read_bytes() if ranks.leads() else b"")
    except FileNotFoundError as error:
        fix = "start the run without --resume"
        raise CheckpointError(f"{path} does not exist", where="--resume", fix=fix) from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}", where="--resume") from error
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read, it is damaged or not a saved run", where="--resume") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{path} is no saved run: its format is {found!r}, not {FORMAT!r}", where="--resume")
    if state["version"] != VERSION:
        raise CheckpointError(
            f"{path} has version {state['version']} of the format, this kdcompress reads {VERSION}",
            where="--resume",
            fix="resume with the kdcompress that started the run",
        )
    return state


def require_same(saved: Mapping[str, Setting], current: Mapping[str, Setting], path: Path) -> None:
    """Refuses to go on with a run that was started differently.

    Raises:
        CheckpointError: every setting that differs, with both values.
    """
    changed = [
        f"{name} was {saved.get(name)!r} and is now {current.get(name)!r}"
        for name in dict.fromkeys([*saved, *current])
        if saved.get(name) != current.get(name)
    ]
    if changed:
        raise CheckpointError(
            f"{path} belongs to another run: {'; '.join(changed)}",
            where="--resume",
            fix="resume with the settings it was started with, or start anew in another folder",
        )


def environment(device: torch.device) -> dict[str, Setting]:
    """What the last bits of a result depend on besides the settings."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "device": f"{device.type} ({name})",
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "processes": ranks.size(),
    }


def seed_step(seed: int, step: int, device: torch.device, rank: int = 0) -> None:
    """Sets torch's generators for one step, so that dropout and the like are functions of (seed, step).

    What a network or a method draws must come from torch's default generators. Costs microseconds and does not wait
    for the device.

    Args:
        seed: of the run.
        step: counted over the whole training.
        device: whose generator is set besides the CPU's.
        rank: of the process, for what each draws for its own images.
    """
    mixed = _mix(_mix(seed) ^ step)
    if rank:
        mixed = _mix(mixed ^ rank)
    torch.default_generator.manual_seed(mixed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(mixed)


def _mix(value: int) -> int:
    """The finalizer of splitmix64 (Steele et al. 2014), cut to 63 bits."""
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (value ^ (value >> 31)) & 0x7FFFFFFFFFFFFFFF


def not_finite(state: Any) -> str | None:
    """The name of the first tensor in a nested state that holds a NaN or an infinity; None if there is none."""
    floats = [(name, tensor) for name, tensor in _tensors(state, "") if tensor.is_floating_point() and tensor.numel()]
    if not floats:
        return None
    finite = torch.stack([tensor.isfinite().all() for _, tensor in floats]).tolist()
    return next((name for (name, _), good in zip(floats, finite, strict=True) if not good), None)


def _require_plain(value: Any, name: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _require_plain(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _require_plain(item, f"{name}.{index}")
    elif not isinstance(value, Tensor) and type(value) not in (str, int, float, bool, type(None)):
        raise TypeError(f"{type(value).__name__} cannot be saved in {LAST}: {name[1:]}")


def _tensors(state: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(state, Tensor):
        yield name, state
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield from _tensors(value, f"{name}.{key}" if name else str(key))
    elif isinstance(state, list | tuple):
        for index, value in enumerate(state):
            yield from _tensors(value, f"{name}.{index}" if name else str(index))
