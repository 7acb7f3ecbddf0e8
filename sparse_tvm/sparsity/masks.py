"""Which values of a weight stay: those with the highest scores, in units of a pattern."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparse_tvm.sparsity.formats import reduce_blocks
from sparse_tvm.sparsity.pattern import Goal, Pattern


def prune_array(w: np.ndarray, sparsity: float, structure: str | Pattern) -> np.ndarray:
    """Return a weight with its smallest values set to zero.

    Parameters
    ----------
    w : np.ndarray
        float32 ``[N, K]``: output features by input features.
    sparsity : float
        Share of blocks to set to zero, exact to one block; ties go in row-major order. Not used
        for N:M, which implies it.
    structure : str | Pattern
        What is pruned as a unit: see `Pattern`.

    Returns
    -------
    np.ndarray
        A new float32 ``[N, K]``. Values that were zero stay zero.
    """
    pattern = Pattern.parse(structure) if isinstance(structure, str) else structure
    return masked(w, magnitude_mask(w, Goal(pattern, sparsity)))


def magnitude_mask(w: np.ndarray, goal: Goal) -> np.ndarray:
    """Return the boolean ``[N, K]`` mask that keeps the blocks of greatest L2 norm."""
    if goal.pattern.n_m:
        return keep_n_of_m(np.abs(w), *goal.pattern.n_m)
    scores = block_scores(w, goal.pattern.block)
    return spread(Cut.at(scores, goal.sparsity).keep(scores), goal.pattern.block, w.shape)


def wanda_mask(w: np.ndarray, input_norms: np.ndarray, goal: Goal) -> np.ndarray:
    """Return the mask that keeps the greatest products of weight and input norm, output by output.

    After Sun et al., "A Simple and Effective Pruning Approach for Large Language Models",
    arXiv 2306.11695. Blocks are compared within the outputs that they share.

    Parameters
    ----------
    w : np.ndarray
        float32 ``[N, K]``.
    input_norms : np.ndarray
        float ``[K]``: the L2 norm of each input over the calibration data, in any scale.
    goal : Goal
        The pattern and the sparsity.
    """
    products = np.abs(w) * input_norms.astype(np.float32)
    if goal.pattern.n_m:
        return keep_n_of_m(products, *goal.pattern.n_m)
    scores = block_scores(products, goal.pattern.block)
    keep = np.stack([Cut.at(row, goal.sparsity).keep(row) for row in scores])
    return spread(keep, goal.pattern.block, w.shape)


def masked(w: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Set what a mask does not keep to zero, in a copy."""
    pruned: np.ndarray = np.where(mask, w, np.float32(0))
    return pruned


@dataclass
class Cut:
    """Which scores go: all below a threshold, and the first `ties` that equal it."""

    threshold: float
    ties: int

    @classmethod
    def at(cls, scores: np.ndarray, share: float) -> Cut:
        """Cut off `share` of the scores, to the nearest count."""
        count = round(share * scores.size)
        if not count:
            return cls(-1.0, 0)
        threshold = np.partition(scores, count - 1, axis=None)[count - 1]
        return cls(float(threshold), count - int(np.count_nonzero(scores < threshold)))

    def keep(self, scores: np.ndarray) -> np.ndarray:
        """Return the mask of the scores that stay; later calls go on counting ties."""
        threshold = np.float32(self.threshold)
        kept = scores > threshold
        tied = np.flatnonzero(scores == threshold)
        kept.flat[tied[self.ties :]] = True
        self.ties -= min(self.ties, tied.size)
        return kept


def block_scores(w: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Return the float32 root mean square of each block.

    The L2 norm, since removing the blocks of least L2 norm changes the weight least in that
    norm; divided by the square root of the number of values, so that the smaller blocks at the
    edges compare with the others.
    """
    scores: np.ndarray
    if block == (1, 1):
        scores = np.abs(w)
        return scores
    squares = reduce_blocks(np.square(w), block, np.add)
    squares /= block_sizes(w.shape, block)
    scores = np.sqrt(squares)
    return scores


def block_sizes(shape: tuple[int, ...], block: tuple[int, int]) -> np.ndarray:
    """Return how many values each block holds: fewer at the edges."""
    (n, k), (r, c) = shape, block
    rows = np.minimum(r, n - np.arange(0, n, r))
    columns = np.minimum(c, k - np.arange(0, k, c))
    return np.outer(rows, columns)


def spread(keep: np.ndarray, block: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    """Turn a mask of blocks into one of the values of an ``[N, K]`` weight."""
    for axis, size in enumerate(block):
        if size > 1:
            keep = np.repeat(keep, size, axis)
    return keep[: shape[0], : shape[1]]


def keep_n_of_m(scores: np.ndarray, n: int, m: int) -> np.ndarray:
    """Keep the `n` highest scores of every `m` consecutive inputs; the first of equals."""
    columns = scores.shape[1]
    padded = np.pad(scores, ((0, 0), (0, -columns % m)), constant_values=-1)
    groups = padded.reshape(-1, m)
    order = np.argsort(-groups, axis=1, kind="stable")
    keep = np.zeros(groups.shape, bool)
    np.put_along_axis(keep, order[:, :n], True, axis=1)
    return keep.reshape(padded.shape)[:, :columns]
