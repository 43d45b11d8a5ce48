"""Bare weights in a safetensors file."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from kdcompress.errors import CheckpointError
from kdcompress.teachers.base import FileContent, as_float32


def looks_like(head: bytes) -> bool:
    """Whether a file that starts so is safetensors: the length of a JSON header, then the header."""
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000


def read(path: Path) -> FileContent:
    """The weights and the header's remarks.

    Raises:
        CheckpointError: the file is truncated or damaged.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            state_dict = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 — no mapping
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        what = f"the safetensors file is truncated or damaged: {error}"
        raise CheckpointError(what, where=str(path), fix="fetch or save it again") from error
    return FileContent(format="safetensors", state_dict=as_float32(state_dict), metadata=metadata)
