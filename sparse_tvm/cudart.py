"""NVIDIA's CUDA runtime as far as we call it ourselves: copies, streams, events, pinned memory."""

from __future__ import annotations

import ctypes
from typing import Any

from sparse_tvm.errors import DeviceError

_NON_BLOCKING = 1
_NO_TIMING = 2
_ANY_DIRECTION = 4  # the driver tells from the addresses

LEGACY_STREAM = 1
"""What CUDA's headers call ``cudaStreamLegacy``: the default stream by a handle of its own."""


class CudaRuntime:
    """The library's functions; what fails is a `DeviceError` with CUDA's own words.

    Parameters
    ----------
    library : ctypes.CDLL
        ``libcudart``, the same that TVM's part for CUDA uses.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        library.cudaGetErrorString.restype = ctypes.c_char_p

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            self._library.cudaGetLastError()  # else the next call of anybody would report it
            words = self._library.cudaGetErrorString(status).decode()
            raise DeviceError(f"CUDA failed in {name}: {words} (error {status})")

    def _handle(self, name: str, *arguments: Any) -> int:
        handle = ctypes.c_void_p()
        self._call(name, ctypes.byref(handle), *arguments)
        return handle.value or 0

    def current_device(self) -> int:
        """The calling thread's device."""
        index = ctypes.c_int()
        self._call("cudaGetDevice", ctypes.byref(index))
        return index.value

    def use_device(self, index: int) -> None:
        """Choose the calling thread's device."""
        self._call("cudaSetDevice", index)

    def create_stream(self) -> int:
        """A stream that does not wait for the default one."""
        return self._handle("cudaStreamCreateWithFlags", _NON_BLOCKING)

    def synchronize(self, stream: int) -> None:
        """Return when all work of a stream is done."""
        self._call("cudaStreamSynchronize", ctypes.c_void_p(stream))

    def create_event(self) -> int:
        """A mark that streams can wait for."""
        return self._handle("cudaEventCreateWithFlags", _NO_TIMING)

    def record(self, event: int, stream: int) -> None:
        """Mark where a stream is now."""
        self._call("cudaEventRecord", ctypes.c_void_p(event), ctypes.c_void_p(stream))

    def wait_for(self, event: int, stream: int) -> None:
        """Let a stream go on only after a mark."""
        self._call("cudaStreamWaitEvent", ctypes.c_void_p(stream), ctypes.c_void_p(event), 0)

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Copy between addresses of any kind, in a stream."""
        pointers = ctypes.c_void_p(target), ctypes.c_void_p(source)
        size, stream_handle = ctypes.c_size_t(nbytes), ctypes.c_void_p(stream)
        self._call("cudaMemcpyAsync", *pointers, size, _ANY_DIRECTION, stream_handle)

    def pin(self, nbytes: int) -> int:
        """Memory of the host that the device copies from and to by itself."""
        return self._handle("cudaMallocHost", ctypes.c_size_t(nbytes))

    def unpin(self, address: int) -> None:
        """Give such memory back; without an error, as it may be too late to complain."""
        self._library.cudaFreeHost(ctypes.c_void_p(address))

    def memory(self) -> tuple[int, int]:
        """Free and all bytes of the calling thread's device."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value
