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
from sparse_tvm.sparsity.formats import BSR

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
    bsr = BSR.from_dense(half.astype(np.float32), (SIDE, SIDE))
    blocks = swizzled(bsr.data.astype(np.float16))
    first = (bsr.indices * SIDE).astype(np.int32)
    if not len(blocks):  # an all-zero weight: kernels want at least one element
        blocks, first = np.zeros((1, SIDE * SIDE // 2), np.uint32), np.zeros(1, np.int32)
    return {"data": blocks, "columns": first, "indptr": bsr.indptr.astype(np.int32)}
