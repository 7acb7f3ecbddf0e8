"""Layers' weights as kernels on Hopper's warpgroups read them.

A weight is cut into tiles of 64 rows by 64 columns, each as it shall lie in shared memory: rows of
128 bytes whose chunks of 16 are swizzled (:func:`swizzled`), so that a tile is one copy of what
lies together. 2:4 keeps 32 of the 64 columns, in rows of 64 bytes, and words of *places* as
:func:`~.fragments.places_of` has them.
"""

from __future__ import annotations

import numpy as np

from sparse_tvm.operators import Layout
from sparse_tvm.schedules.cuda.fragments import compress, places_of
from sparse_tvm.schedules.cuda.weights import LARGEST_HALF

SIDE = 64
"""Rows and columns of a tile."""


def swizzled(tiles: np.ndarray) -> np.ndarray:
    """Tiles in the order in which they lie in shared memory.

    Parameters
    ----------
    tiles : np.ndarray
        float16 ``[..., 64, columns]``, of 64 columns or 32.

    Returns
    -------
    np.ndarray
        uint32 ``[..., 32 * columns]``.
    """
    *lead, rows, columns = tiles.shape
    chunks = columns // 8
    row, chunk = np.arange(rows)[:, None], np.arange(chunks)
    source = chunk ^ (row * chunks // 8 % chunks)
    split = tiles.reshape(*lead, rows, chunks, 8)[..., row, source, :]
    words: np.ndarray = (
        np.ascontiguousarray(split, "<f2").reshape(*lead, rows * columns).view(np.uint32)
    )
    return words


def warpgroup_arrays(w: np.ndarray, layout: Layout) -> dict[str, np.ndarray]:
    """A weight ``[N, K]`` in tiles.

    Dense: ``data`` ``[ceil(N / 64), ceil(K / 64), 2048]``. 2:4: ``data`` ``[.., 1024]`` and
    ``places`` ``[.., 128]``. BSR in blocks of 64x64: ``data`` ``[blocks, 2048]``, ``columns``, the
    first of each block, and ``indptr``, the first block of each row of blocks.

    Raises
    ------
    ValueError
        When the layout is 2:4, and the weight is not.
    """
    rows, columns = (-(-extent // SIDE) * SIDE for extent in w.shape)
    half = np.zeros((rows, columns), np.float16)
    half[: w.shape[0], : w.shape[1]] = np.clip(w, -LARGEST_HALF, LARGEST_HALF)
    if layout.format == "bsr":
        return _bsr_arrays(half)
    tiles = half.reshape(rows // SIDE, SIDE, columns // SIDE, SIDE).swapaxes(1, 2)
    if layout.format == "dense":
        return {"data": swizzled(tiles)}
    values, places = compress(tiles)
    by_step = places_of(places).swapaxes(-3, -2)  # 32 columns, then 16 rows
    return {"data": swizzled(values), "places": by_step.reshape(*tiles.shape[:2], -1)}


def _bsr_arrays(half: np.ndarray) -> dict[str, np.ndarray]:
    """Blocks row by row. Where a row has none there is one of zeros: with it sums begin."""
    rows, columns = (extent // SIDE for extent in half.shape)
    tiles = half.reshape(rows, SIDE, columns, SIDE).swapaxes(1, 2)
    stored = np.any(tiles, axis=(2, 3))
    stored[~np.any(stored, axis=1), 0] = True
    first = (np.nonzero(stored)[1] * SIDE).astype(np.int32)
    indptr = np.concatenate([[0], np.cumsum(stored.sum(1))]).astype(np.int32)
    return {"data": swizzled(tiles[stored]), "columns": first, "indptr": indptr}
