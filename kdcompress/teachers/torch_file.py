"""Files of `torch.save`, opened so that nothing in them can run."""

from __future__ import annotations

import argparse
import pathlib
import re
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from kdcompress.errors import CheckpointError

_REFUSED_GLOBAL = re.compile(r"GLOBAL ([\w.]+)|[Uu]nsupported (?:global|class):? *([\w.]+)")
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
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        refused = _REFUSED_GLOBAL.search(str(error))
        if refused is None:
            raise CheckpointError(
                "it holds objects that are not weights", where=str(path), fix=_ONLY_WEIGHTS
            ) from error
        name = refused.group(1) or refused.group(2)
        what = f"refused: opening it would run {name}, which is no part of a weight file; nothing was run"
        raise CheckpointError(what, where=str(path), fix=_ONLY_WEIGHTS) from error
    except Exception as error:  # damaged bytes raise anything: RuntimeError, EOFError, KeyError, struct.error …
        if "TorchScript" in str(error):
            what = "a TorchScript archive, which holds code; nothing was run"
            raise CheckpointError(what, where=str(path), fix=_ONLY_WEIGHTS) from error
        what = "the file is truncated, damaged or not a torch checkpoint"
        raise CheckpointError(what, where=str(path), fix="fetch or save it again") from error
