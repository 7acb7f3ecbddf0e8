"""How the server and a worker talk: small JSON messages over a socket, tensors in shared memory."""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

LENGTH = struct.Struct(">I")
"""Precedes every message: its length in bytes."""

_ALIGNMENT = 64
_KEPT, _KEPT_RATIO = 16 << 20, 4
"""An arena keeps so many bytes, or so many times what it needs: one large run must not cost its
memory for ever."""

_PAGE = mmap.PAGESIZE


def pack(message: dict[str, Any]) -> bytes:
    """Return `message` as it goes over the socket."""
    text = json.dumps(message).encode()
    return LENGTH.pack(len(text)) + text


class NoRoom(Exception):
    """The system has no memory or descriptor left for the tensors of a run; it may have later."""


class Arena:
    """Tensors in memory that two processes share: one of them writes, the other reads.

    Parameters
    ----------
    descriptor : int
        Of an anonymous file, made with :func:`create_arena`.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._map: mmap.mmap | None = None

    def place(self, layout: Sequence[tuple[str, Sequence[int]]]) -> list[np.ndarray]:
        """Return writable arrays of these dtypes and shapes, in place of all earlier ones.

        Raises
        ------
        NoRoom
            When the system has no memory for them.
        """
        offsets, size = _offsets(layout)
        held = os.fstat(self.descriptor).st_size
        if size > held or held > max(_KEPT, _KEPT_RATIO * size):
            try:
                os.ftruncate(self.descriptor, -(-size // _PAGE) * _PAGE)
            except OSError as error:
                raise NoRoom(f"no room for {size} bytes of tensors: {error.strerror}") from error
        return self._views(layout, offsets, size)

    def read(self, layout: Sequence[tuple[str, Sequence[int]]]) -> list[np.ndarray]:
        """Return the arrays that the other side placed; they last until it places others.

        Raises
        ------
        NoRoom
            When the system has no memory or descriptor for mapping them.
        """
        offsets, size = _offsets(layout)
        return self._views(layout, offsets, size)

    def close(self) -> None:
        """Give the memory back, as soon as nobody refers to an array in it.

        The map has a descriptor of its own, so it must not wait for the collector of garbage.
        """
        self._map = None
        os.close(self.descriptor)

    def _views(
        self, layout: Sequence[tuple[str, Sequence[int]]], offsets: Sequence[int], size: int
    ) -> list[np.ndarray]:
        if self._map is None or len(self._map) < size:
            # The old map goes with the last array that refers to it.
            held = os.fstat(self.descriptor).st_size
            try:
                self._map = mmap.mmap(self.descriptor, held)
            except (OSError, MemoryError) as error:
                raise NoRoom(f"no room for {held} bytes of tensors: {error}") from error
        return [
            np.ndarray(shape, dtype, buffer=self._map, offset=offset)
            for (dtype, shape), offset in zip(layout, offsets, strict=True)
        ]


def create_arena() -> Arena:
    """Make an empty arena; its descriptor is to be passed to the other process."""
    return Arena(os.memfd_create("sparse-tvm-tensors"))


def _offsets(layout: Sequence[tuple[str, Sequence[int]]]) -> tuple[list[int], int]:
    offsets = []
    size = 0
    for dtype, shape in layout:
        offsets.append(size)
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        size += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
    return offsets, max(size, _ALIGNMENT)
