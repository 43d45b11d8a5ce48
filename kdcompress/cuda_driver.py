"""The CUDA driver by ctypes: whether there is a GPU, memory, copies, a stream, events.

Nothing but the driver's own library is needed, so it works wherever TensorRT does, a bare Jetson included, and tells
that there is no GPU before TensorRT is touched: without one TensorRT ends the process. This file is also part of every
device bundle: Python 3.8, no kdcompress. The functions are those of the CUDA Driver API reference.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_MAJOR, _MINOR, _INTEGRATED = 75, 76, 18
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, …_MINOR, CU_DEVICE_ATTRIBUTE_INTEGRATED."""
_OUT_OF_MEMORY = 2


class CudaError(Exception):
    """A call of the driver failed, or there is no GPU; the message is one sentence."""


class CudaMemoryError(CudaError):
    """The GPU's memory does not suffice."""


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Args:
        name: as its maker calls it: "Orin", "NVIDIA L4".
        compute_capability: "8.7" …
        driver: newest CUDA version that the driver knows, e.g. "12.6".
        memory_mb: its memory in 10⁶ bytes; where it is integrated, the whole machine's.
        integrated: it shares its memory with the CPU, as on a Jetson.
    """

    name: str
    compute_capability: str
    driver: str
    memory_mb: int
    integrated: bool


def _open() -> Any:
    try:
        return ctypes.CDLL(_LIBRARY)
    except OSError:
        raise CudaError(f"there is no NVIDIA driver here ({_LIBRARY} is not found)") from None


def _check(library: Any, code: int, what: str) -> None:
    if code == 0:
        return
    text = ctypes.c_char_p()
    library.cuGetErrorString(code, ctypes.byref(text))
    said = text.value.decode() if text.value else f"error {code}"
    raise (CudaMemoryError if code == _OUT_OF_MEMORY else CudaError)(f"{what}: {said}")


def find_gpu() -> Gpu:
    """The first GPU.

    Raises:
        CudaError: there is no driver or no GPU, as a sentence.
    """
    library = _open()
    _check(library, library.cuInit(0), "the NVIDIA driver does not start")
    count = ctypes.c_int()
    _check(library, library.cuDeviceGetCount(ctypes.byref(count)), "the NVIDIA driver counts no GPU")
    if count.value == 0:
        raise CudaError("there is an NVIDIA driver here, but no GPU")
    device, version, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    _check(library, library.cuDeviceGet(ctypes.byref(device), 0), "the GPU cannot be opened")
    name = ctypes.create_string_buffer(256)
    _check(library, library.cuDeviceGetName(name, 256, device), "the GPU has no name")
    _check(library, library.cuDriverGetVersion(ctypes.byref(version)), "the driver has no version")
    _check(library, library.cuDeviceTotalMem_v2(ctypes.byref(memory), device), "the GPU's memory is not known")

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        _check(library, library.cuDeviceGetAttribute(ctypes.byref(value), number, device), "the GPU does not answer")
        return value.value

    return Gpu(
        name=name.value.decode(),
        compute_capability=f"{attribute(_MAJOR)}.{attribute(_MINOR)}",
        driver=f"{version.value // 1000}.{version.value % 1000 // 10}",
        memory_mb=memory.value // 10**6,
        integrated=attribute(_INTEGRATED) == 1,
    )


class Cuda:
    """One stream on the first GPU, in the context that TensorRT uses too, with its memory and events.

    Raises:
        CudaError: there is no GPU. Every method may raise it.
    """

    def __init__(self) -> None:
        find_gpu()
        self._library = _open()
        device, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._do("cuDeviceGet", ctypes.byref(device), 0)
        self._do("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._do("cuCtxSetCurrent", context)
        self._do("cuStreamCreate", ctypes.byref(stream), 0)
        self._stream = stream
        self._events = [self._event(), self._event()]

    def _do(self, name: str, *arguments: Any) -> None:
        _check(self._library, getattr(self._library, name)(*arguments), name)

    def _event(self) -> ctypes.c_void_p:
        event = ctypes.c_void_p()
        self._do("cuEventCreate", ctypes.byref(event), 0)
        return event

    @property
    def stream(self) -> int:
        """The stream as TensorRT takes it."""
        return int(self._stream.value or 0)

    def allocate(self, num_bytes: int) -> int:
        """Memory of the GPU; its address.

        Raises:
            CudaMemoryError: there is not enough.
        """
        address = ctypes.c_uint64()
        self._do("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(num_bytes, 1)))
        return int(address.value)

    def free(self, address: int) -> None:
        """Gives memory back."""
        self._do("cuMemFree_v2", ctypes.c_uint64(address))

    def copy_in(self, address: int, array: np.ndarray) -> None:
        """Copies a contiguous array into the GPU, on the stream."""
        self._do(
            "cuMemcpyHtoDAsync_v2",
            ctypes.c_uint64(address),
            ctypes.c_void_p(array.ctypes.data),
            ctypes.c_size_t(array.nbytes),
            self._stream,
        )

    def copy_out(self, array: np.ndarray, address: int) -> None:
        """Copies from the GPU into a contiguous array, on the stream; done after `synchronize`."""
        self._do(
            "cuMemcpyDtoHAsync_v2",
            ctypes.c_void_p(array.ctypes.data),
            ctypes.c_uint64(address),
            ctypes.c_size_t(array.nbytes),
            self._stream,
        )

    def synchronize(self) -> None:
        """Waits until all that is on the stream is done."""
        self._do("cuStreamSynchronize", self._stream)

    def time_ms(self, enqueue: Callable[[], None]) -> tuple[float, float]:
        """Milliseconds between a pair of events around what `enqueue` puts on the stream, and those that it took to
        put it there."""
        start, end = self._events
        elapsed = ctypes.c_float()
        self._do("cuEventRecord", start, self._stream)
        begun = time.perf_counter_ns()
        enqueue()
        handed_over = (time.perf_counter_ns() - begun) / 1e6
        self._do("cuEventRecord", end, self._stream)
        self._do("cuEventSynchronize", end)
        self._do("cuEventElapsedTime", ctypes.byref(elapsed), start, end)
        return float(elapsed.value), handed_over


def why_no_gpu() -> str | None:
    """Why nothing can run on a GPU here, as a sentence; None where something can."""
    try:
        find_gpu()
    except CudaError as error:
        return str(error)
    return None
