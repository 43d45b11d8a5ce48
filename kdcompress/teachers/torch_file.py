"""Files of `torch.save`, opened so that nothing in them can run."""

from __future__ import annotations

import argparse
import pathlib
import pickletools
import re
import warnings
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from kdcompress.errors import CheckpointError

_REFUSED_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
_ONLY_WEIGHTS = "save only the weights: torch.save(network.state_dict(), path)"

# Training scripts often keep their options and best accuracy beside the weights. Making these runs no code of theirs.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
    *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)),
    (pathlib.PurePosixPath, "pathlib.PosixPath"),
    (pathlib.PurePosixPath, "pathlib._local.PosixPath"),
]


def looks_like(head: bytes) -> bool:
    """Whether a file that starts so may come from `torch.save`: a zip archive or a bare pickle."""
    return head.startswith((b"PK\x03\x04", b"\x80"))


def read(path: pathlib.Path) -> Any:
    """The object that `torch.save` wrote, on the CPU.

    Raises:
        CheckpointError: the file is damaged, or holds what would run code; nothing of it has run then.
    """
    try:
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on how old or new the file is
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        refused = _REFUSED_GLOBAL.search(str(error))
        name = refused.group(1) if refused else _first_global(path)
        what = "it holds objects that are not weights"
        if name is not None:
            what = f"refused: opening it would run {name}, which is no part of a weight file; nothing was run"
        raise CheckpointError(what, where=str(path), fix=_ONLY_WEIGHTS) from error
    except Exception as error:  # damaged bytes raise anything: RuntimeError, EOFError, KeyError, struct.error …
        if "TorchScript" in str(error):
            what = "a TorchScript archive, which holds code; nothing was run"
            raise CheckpointError(what, where=str(path), fix=_ONLY_WEIGHTS) from error
        what = "the file is truncated, damaged or not a torch checkpoint"
        raise CheckpointError(what, where=str(path), fix="fetch or save it again") from error


def _first_global(path: pathlib.Path) -> str | None:
    """The first function or class that a bare pickle names, read without running it; None where it names none."""
    strings: list[str] = []
    try:
        for operation, argument, _ in pickletools.genops(path.read_bytes()):
            if operation.name == "GLOBAL":
                return str(argument).replace(" ", ".")
            if operation.name == "STACK_GLOBAL":
                return ".".join(strings[-2:])
            if isinstance(argument, str):
                strings.append(argument)
    except (ValueError, OSError):  # no pickle after all
        return None
    return None
