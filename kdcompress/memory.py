"""The most memory that a stretch of work takes."""

from __future__ import annotations

import re
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """The peak since it was made: on CUDA of the tensors on the device, elsewhere of the whole process.

    The process's is its resident set (`VmHWM`), with the mapped files that it has read, and with what was in memory
    before; known on Linux only.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known = True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            _CLEAR.write_text("5", encoding="ascii")
        except OSError:
            self._known = False

    def read_mb(self) -> float | None:
        """The peak in 10⁶ bytes; None where this system does not tell."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 1e6
        if not self._known:
            return None
        found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text(encoding="ascii", errors="replace"))
        return int(found[1]) * 1024 / 1e6 if found else None
