"""Weights in blocks of 32x32 as kernels on Hopper's warpgroups read them, band by band.

A *band* is some block rows, those whose sums a thread block keeps at a time; which they are is free
to choose, and chosen so that bands have equally much to do, and their blocks few columns. A band is
gone through in *steps*: 32 columns in which it has blocks; a word of a step has the number of these
columns in its lower half, and above it a bit for each block row with a block there.

A block lies as it shall lie in shared memory (see :func:`~.warpgroup_weights.swizzled`), its rows
in an order that gives each thread eight neighbouring outputs: of rows 8j + 2t and 8j + 2t + 1 of a
product, thread t of four has the sums, and these are outputs 8t + 2j and 8t + 2j + 1.
"""

from __future__ import annotations

import numpy as np

from sparse_tvm.schedules.cuda.warpgroup_weights import swizzled
from sparse_tvm.schedules.cuda.weights import LARGEST_HALF
from sparse_tvm.sparsity.formats import occupied_blocks

SIDE = 32
"""Rows and columns of a block."""

COLUMNS_BYTES, BLOCK_BYTES = 128 * SIDE * 2, SIDE * SIDE * 2
"""What the columns of 128 tokens take, and what a block does."""

LARGEST_INPUTS = SIDE << 16
"""What the word of a step can number."""

_TURNS = 40
"""Exchanges tried for each block row."""


def band_arrays(w: np.ndarray, height: int) -> dict[str, np.ndarray]:
    """A weight ``[N, K]`` in bands of ``height`` block rows.

    Returns
    -------
    dict[str, np.ndarray]
        ``data``, uint32 ``[blocks, 512]``; ``steps``, uint32 ``[steps]``; ``first_step`` and
        ``first_block``, int32 ``[bands + 1]``; ``rows``, int32 ``[bands, height]``, the block rows
        of each band, of which those beyond the last do not exist.
    """
    rows, columns = (-(-extent // SIDE) for extent in w.shape)
    half = np.zeros((rows * SIDE, columns * SIDE), np.float16)
    half[: w.shape[0], : w.shape[1]] = np.clip(w, -LARGEST_HALF, LARGEST_HALF)
    blocks = half.reshape(rows, SIDE, columns, SIDE).swapaxes(1, 2)
    bands = choose_bands(occupied_blocks(half != 0, (SIDE, SIDE)), height)
    return _arrays(blocks, bands)


def _arrays(blocks: np.ndarray, bands: np.ndarray) -> dict[str, np.ndarray]:
    steps: list[int] = []
    picked: list[tuple[int, int]] = []
    first_step, first_block = [0], [0]
    for band in bands:
        there = band < len(blocks)
        occupied = np.zeros((len(band), blocks.shape[1]), bool)
        occupied[there] = blocks[band[there]].any(axis=(2, 3))
        for column in np.flatnonzero(occupied.any(axis=0)):
            members = np.flatnonzero(occupied[:, column])
            picked += [(int(band[member]), int(column)) for member in members]
            steps.append(int(column) | int(np.sum(1 << members)) << 16)
        first_step.append(len(steps))
        first_block.append(len(picked))
    if not picked:  # kernels want at least one element
        picked, steps = [(0, 0)], [0]
    chosen = blocks[tuple(np.array(picked).T)]
    j, t, i = np.arange(4)[:, None, None], np.arange(4)[:, None], np.arange(2)
    order = np.broadcast_to(8 * t + 2 * j + i, (4, 4, 2)).reshape(SIDE)
    return {
        "data": swizzled(chosen[:, order]),
        "steps": np.array(steps, np.uint32),
        "first_step": np.array(first_step, np.int32),
        "first_block": np.array(first_block, np.int32),
        "rows": bands.astype(np.int32),
    }


def choose_bands(occupied: np.ndarray, height: int) -> np.ndarray:
    """Share block rows out among bands so that these copy about equally much, and little.

    Parameters
    ----------
    occupied : np.ndarray
        Which blocks there are, ``[block rows, block columns]``.
    height : int
        Block rows of a band.

    Returns
    -------
    np.ndarray
        Numbers of block rows, ``[bands, height]``; some beyond the last fill up the last bands.
    """
    count = -(-len(occupied) // height)
    padded = np.zeros((count * height, occupied.shape[1]), bool)
    padded[: len(occupied)] = occupied
    bands = np.arange(count * height).reshape(count, height)

    def copied(band: np.ndarray) -> int:
        rows = padded[band]
        return int(rows.any(axis=0).sum()) * COLUMNS_BYTES + int(rows.sum()) * BLOCK_BYTES

    costs = [copied(band) for band in bands]
    rng = np.random.default_rng(0)
    for _ in range(_TURNS * len(padded) if count > 1 else 0):
        a, b = rng.choice(count, 2, replace=False)
        i, j = rng.integers(height, size=2)
        bands[a, i], bands[b, j] = bands[b, j], bands[a, i]
        changed = copied(bands[a]), copied(bands[b])
        # Cubes: to shrink the larger of the two counts more than to shrink their sum.
        if changed[0] ** 3 + changed[1] ** 3 <= costs[a] ** 3 + costs[b] ** 3:
            costs[a], costs[b] = changed
        else:
            bands[a, i], bands[b, j] = bands[b, j], bands[a, i]
    return bands
