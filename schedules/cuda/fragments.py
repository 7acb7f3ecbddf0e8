"""Weights in the order in which tensor cores want them in their registers.

A kernel multiplies :data:`STEP` columns at a time. For each step, 16 rows of the weight are one
*fragment* of ``mma.sync`` per 16 columns, ``[32 threads, 4 words]`` of two 16-bit floats each: a
thread reads its share as one vector of 16 bytes, and a warp reads them in order. ``instructions.h``
says which elements a thread has.

2:4 weights keep 16 of the 32 columns of a step, which make one fragment, and say in 16 words of
*places* where these were (see :func:`places_of`).
"""

from __future__ import annotations

import numpy as np

STEP = 32
"""Columns of the weight that kernels multiply at a time."""

ROWS = 16
"""Rows of a fragment."""

_THREAD = np.arange(32)
_WORD = np.arange(4)
_ROW = (_THREAD[:, None] // 4 + _WORD[None, :] % 2 * 8)[..., None] + np.zeros(2, int)
_COLUMN = (_THREAD[:, None] % 4 * 2 + _WORD[None, :] // 2 * 8)[..., None] + np.arange(2)
"""Row and column in a 16 x 16 fragment, by thread, word and half."""


def fragments(w: np.ndarray) -> np.ndarray:
    """A matrix in fragments.

    Parameters
    ----------
    w : np.ndarray
        ``[..., 16 r, 16 c]`` of float16, or of the bits of bfloat16 in uint16.

    Returns
    -------
    np.ndarray
        uint32 ``[..., r, c, 32, 4]``.
    """
    *lead, rows, columns = w.shape
    tiles = w.reshape(*lead, rows // ROWS, ROWS, columns // 16, 16).swapaxes(-3, -2)
    halves = np.ascontiguousarray(tiles[..., _ROW, _COLUMN])
    words: np.ndarray = halves.view(np.uint32)
    return words[..., 0]


def compress(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two columns of each four that hold a row's values, and their places from 0 to 3.

    Parameters
    ----------
    w : np.ndarray
        ``[..., 4 c]``, of any four neighbours at most two other than 0.

    Returns
    -------
    tuple[np.ndarray, np.ndarray]
        Values and uint8 places, both ``[..., 2 c]``, places ascending in each pair.

    Raises
    ------
    ValueError
        When w is not 2:4.
    """
    groups = w.reshape(*w.shape[:-1], -1, 4)
    if (np.count_nonzero(groups, axis=-1) > 2).any():
        raise ValueError("more than two of four neighbours are not zero")
    order = np.argsort(groups == 0, axis=-1, kind="stable")[..., :2]
    places = np.sort(order, axis=-1)
    values = np.take_along_axis(groups, places, axis=-1)
    shape = (*w.shape[:-1], w.shape[-1] // 2)
    return values.reshape(shape), places.astype(np.uint8).reshape(shape)


def places_of(places: np.ndarray) -> np.ndarray:
    """Places as ``mma.sp.m16n8k32`` wants them.

    Word ``2 g + h`` has, in its lower half, rows g of the first (h = 0) or last eight stored
    columns, two bits each from the lowest on, and in its upper half those of row ``g + 8``.

    Parameters
    ----------
    places : np.ndarray
        uint8 ``[..., 16 r, 16 c]``, from :func:`compress`.

    Returns
    -------
    np.ndarray
        uint32 ``[..., r, c, 16]``.
    """
    *lead, rows, columns = places.shape
    split = places.reshape(*lead, rows // ROWS, 2, 8, columns // 16, 2, 8).astype(np.uint32)
    shifts = 16 * np.arange(2)[:, None, None, None, None] + 2 * np.arange(8)
    words: np.ndarray = (split << shifts.astype(np.uint32)).sum(axis=(-1, -5), dtype=np.uint32)
    # [..., r, g, c, h] -> [..., r, c, g, h]
    words = np.moveaxis(words, -2, -3)
    return words.reshape(*lead, rows // ROWS, columns // 16, ROWS)
