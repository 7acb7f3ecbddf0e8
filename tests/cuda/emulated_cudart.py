"""The CUDA runtime, played on a CPU: what is asked of a stream is done no earlier than it must be.

Kernels of the emulated GPU run when they are called. Copies to the host are put off until somebody
waits for their stream, so that whoever reads a result too early reads something else.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from sparse_tvm.errors import DeviceError
from sparse_tvm.vm import runtime

_UNWRITTEN = 0xA5


class EmulatedCudart:
    """Stands in for `sparse_tvm.cudart.CudaRuntime`.

    Attributes
    ----------
    pinned : dict[int, np.ndarray]
        Blocks of pinned memory by address.
    most_pinned : int
        Bytes of one block that the system would still pin.
    log : list[tuple]
        Calls that matter for the order of work: name and arguments.
    """

    def __init__(self) -> None:
        self.pinned: dict[int, np.ndarray] = {}
        self.most_pinned = 1 << 40
        self.log: list[tuple[Any, ...]] = []
        self._device = 0
        self._handles = 1000
        self._pending: defaultdict[int, list[Callable[[], Any]]] = defaultdict(list)
        self._marks: dict[int, list[Callable[[], Any]]] = {}

    def current_device(self) -> int:
        return self._device

    def use_device(self, index: int) -> None:
        self._device = index

    def create_stream(self) -> int:
        self._handles += 1
        return self._handles

    def synchronize(self, stream: int) -> None:
        self.log.append(("synchronize", stream))
        for action in self._pending.pop(stream, []):
            action()

    def create_event(self) -> int:
        return self.create_stream()

    def record(self, event: int, stream: int) -> None:
        self.log.append(("record", event, stream))

    def wait_for(self, event: int, stream: int) -> None:
        self.log.append(("wait", event, stream))

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self.log.append(("copy", nbytes, stream))
        if any(a <= target < a + block.nbytes for a, block in self.pinned.items()):
            taken = ctypes.string_at(source, nbytes)  # later kernels may overwrite it
            self._pending[stream].append(lambda: ctypes.memmove(target, taken, nbytes))
        else:
            ctypes.memmove(target, source, nbytes)

    def pin(self, nbytes: int) -> int:
        if nbytes > self.most_pinned:
            raise DeviceError("CUDA failed in cudaMallocHost: out of memory (error 2)")
        block = np.full(nbytes, _UNWRITTEN, np.uint8)
        self.pinned[block.ctypes.data] = block
        return int(block.ctypes.data)

    def unpin(self, address: int) -> None:
        del self.pinned[address]

    def memory(self) -> tuple[int, int]:
        return 1 << 30, 1 << 31


class EmulatedGraphs:
    """Stands in for TVM's graphs: a replay is a call with the operands of the first run.

    Attributes
    ----------
    replays : int
        How often a graph was launched.
    failures : int
        How many captures will fail.
    """

    def __init__(self) -> None:
        self.replays = self.failures = 0
        self._kept: dict[tuple[int, int], Any] = {}

    def get_cached_alloc(self, machine: Any, function: Any, index: int) -> Any:
        key = function.__chandle__(), index
        if key not in self._kept:
            self._kept[key] = function, _invoke(machine, function)
        return self._kept[key][1]

    def run_or_capture(self, machine: Any, function: Any, arguments: Any, index: int) -> Any:
        key = function.__chandle__(), index
        if key not in self._kept:
            result = _invoke(machine, function, *arguments)
            if self.failures:
                self.failures -= 1
                raise RuntimeError("operation not permitted when stream is capturing")
            self._kept[key] = function, arguments, result
            return result
        captured, operands, result = self._kept[key]
        self.replays += 1
        _invoke(machine, captured, *operands)
        return result


def _invoke(machine: Any, function: Any, *arguments: Any) -> Any:
    return runtime().get_global_func("vm.builtin.invoke_closure")(machine, function, *arguments)
