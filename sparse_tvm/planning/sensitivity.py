"""How much a layer's output suffers when its weight is pruned.

The error of a setting is the share of the weight's energy that pruning by magnitude removes,
``|W - P|^2 / |W|^2``: the share of the output's energy that is lost, if inputs are not correlated
and of equal size. With calibration data each input counts by its own energy, ``sum_j h_j |W_j -
P_j|^2 / sum_j h_j |W_j|^2`` where ``h_j`` is the mean square of input j: the layer's reconstruction
error, if inputs are not correlated.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from sparse_tvm.planning.settings import DENSE, Setting
from sparse_tvm.sparsity.formats import reduce_blocks
from sparse_tvm.sparsity.masks import prune_array
from sparse_tvm.sparsity.pattern import Pattern


def errors_of(
    w: np.ndarray, settings: Iterable[Setting], energies: np.ndarray | None = None
) -> dict[Setting, float]:
    """The error of each setting, from 0 for none to 1 for a layer that is all zero.

    Parameters
    ----------
    w : np.ndarray
        float32 ``[N, K]``.
    settings : Iterable[Setting]
        How it may be pruned.
    energies : np.ndarray | None
        float32 ``[K]``: mean square of each input; by default all are alike.
    """
    squares = np.square(w)
    weighted = squares if energies is None else squares * energies
    whole = float(weighted.sum(dtype=np.float64))
    removed: dict[tuple[int, int], np.ndarray] = {}

    def error(setting: Setting) -> float:
        if setting == DENSE or not whole:
            return 0.0
        pattern = Pattern.parse(setting.structure)
        if pattern.n_m is not None:
            kept = prune_array(w, setting.sparsity, pattern) != 0
            return 1 - float(weighted.sum(dtype=np.float64, where=kept)) / whole
        if pattern.block not in removed:
            removed[pattern.block] = _removed(squares, weighted, pattern.block)
        sums = removed[pattern.block]
        return float(sums[round(setting.sparsity * (len(sums) - 1))]) / whole

    return {setting: error(setting) for setting in settings}


def _removed(squares: np.ndarray, weighted: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """How much of ``weighted`` goes with the smallest blocks, by how many of these go."""
    blocks = _summed(squares, block)
    if weighted is squares:
        blocks.sort()
    else:
        blocks = _summed(weighted, block)[np.argsort(blocks)]
    return np.concatenate([[0.0], np.cumsum(blocks, dtype=np.float64)])


def _summed(values: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    if block == (1, 1):
        return values.flatten()
    summed: np.ndarray = reduce_blocks(values, block, np.add).ravel()
    return summed
