"""Plain state dicts by other hands, with the usual wrappers around them and prefixes in their names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from kdcompress.errors import CheckpointError
from kdcompress.teachers.base import FileContent, as_float32

_WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "weights",
    "params",
    "state_dict_ema",
    "model_ema",
    "ema",
)
_CLASS_LISTS = ("classes", "class_names", "categories")


def parse(content: object, path: Path) -> FileContent:
    """Finds the weights in what a foreign file holds.

    Raises:
        CheckpointError: there are no weights in it.
    """
    state_dict = _find_weights(content)
    if state_dict is None:
        found = (
            f"keys {', '.join(map(str, list(content)[:6]))}" if isinstance(content, Mapping) else type(content).__name__
        )
        raise CheckpointError(
            f"no state dict in it (found: {found})",
            where=str(path),
            fix="save a state dict, bare or under the key 'state_dict'",
        )
    around = content if isinstance(content, Mapping) else {}
    return FileContent(
        format="state dict",
        state_dict=as_float32(strip_prefixes(state_dict)),
        classes=_class_names(around),
        metadata={str(key): plain for key, value in around.items() if (plain := _plain(value)) is not None},
    )


def strip_prefixes(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what wrappers put before all of them (`module.`, `_orig_mod.`, `model.` …), and without counters.

    No network of the zoo keeps everything in a single child, so a first part that all names share is a wrapper's.
    """
    names = {name: tensor for name, tensor in state_dict.items() if name != "n_averaged"}
    while len({name.partition(".")[0] for name in names}) == 1 and all("." in name for name in names):
        shortened = {name.partition(".")[2]: tensor for name, tensor in names.items()}
        if not any("." in name for name in shortened):
            break
        names = shortened
    return names


def _find_weights(content: object, depth: int = 0) -> dict[str, Tensor] | None:
    if not isinstance(content, Mapping) or depth > 3:
        return None
    for key in _WRAPPERS:
        if isinstance(content.get(key), Mapping):
            inside = _find_weights(content[key], depth + 1)
            if inside is not None:
                return inside
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if any(tensor.ndim > 1 for tensor in tensors.values()):
        return tensors
    inner = [found for value in content.values() if (found := _find_weights(value, depth + 1)) is not None]
    return inner[0] if len(inner) == 1 else None


def _plain(value: Any) -> str | int | float | None:
    """A value that JSON can hold; None for all else."""
    if isinstance(value, np.generic):
        value = value.item()
    return value if isinstance(value, str | int | float) else None


def _class_names(around: Mapping[Any, Any]) -> tuple[str, ...] | None:
    for key in _CLASS_LISTS:
        names = around.get(key)
        if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
            return tuple(names)
    indices = around.get("class_to_idx")
    if isinstance(indices, Mapping) and sorted(map(str, indices.values())) == sorted(map(str, range(len(indices)))):
        return tuple(str(name) for name in sorted(indices, key=lambda name: int(indices[name])))
    return None
