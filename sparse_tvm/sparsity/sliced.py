"""Sliced rows whose every step stays within a window: a format for few rows of activations.

A slice is as many rows as a vector has lanes, a lane for each. In each step every lane takes the
next value of its row, if that lies in the step's window, which is as many neighbouring columns as
there are lanes: so one load brings the inputs of all lanes, and one permutation hands them out. The
window begins at the first column that any lane has left, which takes the fewest steps that keep to
the order of columns. Sliced ELLPACK (Monakov et al., 2010) with windows in place of gathers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

_SAMPLED_SLICES, _SAMPLED_COLUMNS = 8, 512


@dataclass(frozen=True)
class SlicedRows:
    """The non-zeros of a ``[N, K]`` matrix, slice by slice.

    Attributes
    ----------
    data : np.ndarray
        float32 ``[steps, lanes]``; 0 where a lane has nothing in the window.
    places : np.ndarray
        uint8 ``[steps, lanes]``, the column of each value, from the window's first.
    windows : np.ndarray
        int32 ``[steps]``, the first column of each window, at most ``K - lanes``.
    indptr : np.ndarray
        int32 ``[ceil(N / lanes) + 1]``, where each slice starts in `data`.
    shape : tuple[int, int]
        ``(N, K)``.
    """

    data: np.ndarray
    places: np.ndarray
    windows: np.ndarray
    indptr: np.ndarray
    shape: tuple[int, int]

    @classmethod
    def from_dense(cls, w: np.ndarray, lanes: int, together: int = 1) -> SlicedRows:
        """Take a float32 ``[N, K]`` matrix apart, in slices of a multiple of ``together`` steps.

        Raises
        ------
        ValueError
            When a row is shorter than a window.
        """
        steps = list(_steps(w != 0, lanes))
        slices = -(-w.shape[0] // lanes)
        lengths = np.zeros(slices, np.int64)
        for step in steps:
            lengths[step.slices] += 1
        lengths += -lengths % together
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        data = np.zeros((indptr[-1], lanes), np.float32)
        places, windows = np.zeros(data.shape, np.uint8), np.zeros(len(data), np.int32)
        for i, step in enumerate(steps):
            at = indptr[step.slices] + i
            rows = step.slices[:, None] * lanes + np.arange(lanes)
            places[at] = np.where(step.taken, step.columns - step.windows[:, None], 0)
            windows[at] = step.windows
            last = w.shape[0] - 1, w.shape[1] - 1
            values = w[np.minimum(rows, last[0]), np.minimum(step.columns, last[1])]
            data[at] = np.where(step.taken, values, 0)
        return cls(data, places, windows, indptr.astype(np.int32), (w.shape[0], w.shape[1]))

    def to_dense(self) -> np.ndarray:
        """Return the float32 ``[N, K]`` matrix."""
        lanes = self.data.shape[1]
        slice_of = np.repeat(np.arange(len(self.indptr) - 1), np.diff(self.indptr))
        rows = slice_of[:, None] * lanes + np.arange(lanes)
        dense = np.zeros((lanes * (len(self.indptr) - 1), self.shape[1]), np.float32)
        np.add.at(dense, (rows, self.windows[:, None] + self.places), self.data)
        return dense[: self.shape[0]]


def window_steps(mask: np.ndarray, lanes: int) -> int:
    """How many steps a boolean ``[N, K]`` mask of non-zeros takes; see :class:`SlicedRows`."""
    return sum(len(step.slices) for step in _steps(mask, lanes))


@cache
def steps_per_slot(density: float, lanes: int) -> float:
    """Steps for each place of a dense slice, of single weights at random places.

    ``density`` is the share of them, above 0 to 1.
    """
    mask = np.random.default_rng(0).random((lanes * _SAMPLED_SLICES, _SAMPLED_COLUMNS)) < density
    return window_steps(mask, lanes) / (_SAMPLED_SLICES * _SAMPLED_COLUMNS)


@dataclass(frozen=True)
class _Step:
    """One step of the ``slices`` that have any left.

    ``columns`` ``[slices, lanes]`` are the next ones, ``K`` or more where a row has none left.
    """

    slices: np.ndarray
    windows: np.ndarray
    columns: np.ndarray
    taken: np.ndarray


def _steps(mask: np.ndarray, lanes: int) -> Iterator[_Step]:
    n, k = mask.shape
    if k < lanes:
        raise ValueError(f"rows of {k} columns are shorter than a window of {lanes}")
    rows, columns = np.nonzero(mask)
    counts = np.bincount(rows, minlength=n + -n % lanes)
    left = np.full((len(counts), counts.max() + 1), k, np.int32)
    starts = np.cumsum(counts) - counts
    left[rows, np.arange(len(rows)) - starts[rows]] = columns
    left = left.reshape(-1, lanes, left.shape[1])
    next_of = np.zeros(left.shape[:2], np.int64)
    slices, every_lane = np.arange(len(left)), np.arange(lanes)
    while True:
        following = left[slices[:, None], every_lane, next_of[slices]]
        first = following.min(axis=1)
        some = first < k
        slices, following = slices[some], following[some]
        if not len(slices):
            return
        windows = np.minimum(first[some], k - lanes)
        taken = following < np.minimum(windows + lanes, k)[:, None]
        yield _Step(slices, windows, following, taken)
        next_of[slices] += taken
