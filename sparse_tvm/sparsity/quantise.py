"""Weights in low precision: int8 with a scale per output, bf16, and both as words of 32 bits."""

from __future__ import annotations

import numpy as np

LARGEST = 127
"""The largest int8 weight: symmetric, so that no zero point is needed."""

LEAST = -128
"""What weights reach that others rounded: in PyTorch, 127.5 steps are as much as the largest."""

PEAK_STEPS = 127.5
"""Steps of an int8 activation's scale that make its largest magnitude, which is rounded to 127."""

_SAMPLES = (16, 128)
"""How many values of a row, evenly spread, are asked before all are."""

_NEAR = 1e-3
"""How far from a whole number of steps a value may be, in steps; float32 is off by less than 1e-4,
and other values are as near by chance once in five hundred times."""


def steps_of_rows(w: np.ndarray, largest: int = LARGEST) -> np.ndarray:
    """Find the step whose multiples, of at most `largest`, the values of a row are.

    Multiples from `LEAST` on count too, unless `largest` is less than an int8 holds.

    Returns
    -------
    np.ndarray
        float32 ``[N]``, 0 for rows that have none. A quantised weight's are its own scales, or
        whole parts of them.
    """
    magnitudes = np.abs(w)
    peaks = magnitudes.max(axis=1, initial=0).astype(np.float32)
    steps = np.zeros(len(w), np.float32)
    columns = w.shape[1]
    samples = [magnitudes[:, :: -(-columns // size)] for size in (*_SAMPLES, columns) if columns]
    open_rows = np.flatnonzero(peaks > 0)
    for count in (*range(largest, 0, -1), *([-LEAST] if largest == LARGEST else [])):
        if not open_rows.size:
            break
        step = peaks[open_rows] / np.float32(count)
        fits = np.full(len(open_rows), True)
        if count > largest:  # below zero only
            fits = w[open_rows].max(axis=1) < peaks[open_rows]
        for sample in samples:
            fits[fits] = _whole(sample[open_rows[fits]], step[fits])
        steps[open_rows[fits]] = step[fits]
        open_rows = open_rows[~fits]
    return steps


def _whole(values: np.ndarray, steps: np.ndarray) -> np.ndarray:
    counts = values / steps[:, None]
    fits: np.ndarray = (np.abs(counts - np.rint(counts)) < _NEAR).all(axis=1)
    return fits


def quantise_rows(w: np.ndarray, largest: int = LARGEST) -> tuple[np.ndarray, np.ndarray]:
    """Round a float ``[N, K]`` matrix to int8, at most `largest`, with one scale per row.

    Rows that are multiples of a step already keep their values.

    Returns
    -------
    tuple[np.ndarray, np.ndarray]
        int8 ``[N, K]``, and float32 ``[N]``: `w` is about the first times the
        second. A row of zeros has the scale 1.
    """
    peaks = np.abs(w).max(axis=1, initial=0).astype(np.float32)
    steps = steps_of_rows(w, largest)
    scales = np.where(peaks > 0, peaks / np.float32(largest), 1).astype(np.float32)
    scales = np.where(steps > 0, steps, scales)
    rounded = np.rint(w / scales[:, None])  # within `largest`, or on steps of their own
    return rounded.astype(np.int8), scales


def reach(w: np.ndarray) -> int | None:
    """How far from 0 weights are to be multiplied exactly: `LARGEST` steps, or as far as `LEAST`.

    None if any row has no step of its own.
    """
    steps = steps_of_rows(w)
    peaks = np.abs(w).max(axis=1, initial=0)
    if not (steps[peaks > 0] > 0).all():
        return None
    farthest = np.rint(peaks / np.where(steps > 0, steps, 1)).max(initial=0)
    return LARGEST if farthest <= LARGEST else -LEAST


def round_to_bf16(w: np.ndarray) -> np.ndarray:
    """Round float32 to bf16, nearest even; a zero of either sign has no bit set.

    Returns
    -------
    np.ndarray
        The bits, uint16, of the shape of `w`.
    """
    bits = np.ascontiguousarray(w, np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
    return np.where(rounded == 0x8000, 0, rounded).astype(np.uint16)


def bf16_values(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bf16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def as_words(values: np.ndarray) -> np.ndarray:
    """Put consecutive columns of an ``[N, K]`` matrix of 8 or 16 bits into words.

    Returns
    -------
    np.ndarray
        int32 ``[N, ceil(K / values per word)]``, filled up with zeros.
    """
    unit = 4 // values.dtype.itemsize
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % unit)))
    return np.ascontiguousarray(padded).view(np.int32)
