"""Pinned memory: results that the device copies straight into, and then NumPy's arrays.

Pinning takes longer than most copies, so that blocks are kept when the arrays in them are gone.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from typing import Any

import numpy as np

from sparse_tvm.cudart import CudaRuntime
from sparse_tvm.errors import DeviceError

_MOST_BYTES = 256 << 20
_GRANULE = 4096


class PinnedMemory:
    """Blocks of one model, by size; used by one thread at a time, but for arrays that end.

    At most `_MOST_BYTES` are pinned, whether in use or not, as the system cannot swap them out:
    whoever collects results by the million gets ordinary memory from then on, into which copies
    only take longer.
    """

    def __init__(self, cudart: CudaRuntime) -> None:
        self._cudart = cudart
        self._returned: deque[tuple[int, int]] = deque()
        self._idle: defaultdict[int, list[int]] = defaultdict(list)
        self._pinned = 0
        self._closed = False

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """An uninitialised array, pinned as long as there is room."""
        nbytes = math.prod(shape) * dtype.itemsize
        size = -(-nbytes // _GRANULE) * _GRANULE
        address = self._take(size) if size else None
        if address is None:
            return np.empty(shape, dtype)
        block = _Block(self, address, size)
        return np.asarray(block)[:nbytes].view(dtype).reshape(shape)

    def _take(self, size: int) -> int | None:
        self._collect()
        if self._idle[size]:
            return self._idle[size].pop()
        if self._pinned + size > _MOST_BYTES:
            self._free_idle()
        if self._pinned + size > _MOST_BYTES:
            return None
        try:
            address = self._cudart.pin(size)
        except DeviceError:  # the system has no more to pin
            return None
        self._pinned += size
        return address

    def give_back(self, address: int, size: int) -> None:
        """Keep a block for the next array of its size.

        Arrays may end at any moment of any thread, so that nothing here may wait.
        """
        if self._closed:
            self._cudart.unpin(address)
        else:
            self._returned.append((address, size))

    def close(self) -> None:
        """Free what is idle, and the rest when its arrays are gone."""
        self._closed = True
        self._collect()
        self._free_idle()

    def __del__(self) -> None:
        self.close()

    def _collect(self) -> None:
        while self._returned:
            address, size = self._returned.popleft()
            self._idle[size].append(address)

    def _free_idle(self) -> None:
        for size, addresses in self._idle.items():
            for address in addresses:
                self._cudart.unpin(address)
            self._pinned -= size * len(addresses)
        self._idle.clear()


class _Block:
    """What NumPy keeps alive below an array."""

    def __init__(self, pinned: PinnedMemory, address: int, size: int) -> None:
        self._pinned, self._address, self._size = pinned, address, size
        self.__array_interface__ = {
            "data": (address, False),
            "shape": (size,),
            "typestr": "|u1",
            "version": 3,
        }

    def __del__(self) -> None:
        self._pinned.give_back(self._address, self._size)
