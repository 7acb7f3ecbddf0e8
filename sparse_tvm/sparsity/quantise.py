"""Weights in low precision: int8 with a scale per output, bf16, and both as words of 32 bits."""

from __future__ import annotations

import numpy as np

LARGEST = 127
"""The largest magnitude of an int8 weight: symmetric, so that no zero point is needed."""


def quantise_rows(w: np.ndarray, largest: int = LARGEST) -> tuple[np.ndarray, np.ndarray]:
    """Round a float ``[N, K]`` matrix to int8, at most `largest`, with one scale per row.

    Returns
    -------
    tuple[np.ndarray, np.ndarray]
        int8 ``[N, K]``, and float32 ``[N]``: `w` is about the first times the
        second. A row of zeros has the scale 1.
    """
    peaks = np.abs(w).max(axis=1, initial=0).astype(np.float32)
    scales = np.where(peaks > 0, peaks / np.float32(largest), 1).astype(np.float32)
    rounded = np.rint(np.clip(w / scales[:, None], -largest, largest))
    return rounded.astype(np.int8), scales


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
