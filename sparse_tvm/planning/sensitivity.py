"""How much a layer's output suffers when its weight is pruned.

The error of a setting is what pruning by magnitude takes from a layer's output, as a share of the
output's energy: on calibration data, ``tr(D H D^T) / tr(W H W^T)`` where ``D`` is what is removed
from the weight ``W`` and ``H`` the mean product of each two inputs. Without data, inputs are taken
to be alike and not correlated, so that it is ``|D|^2 / |W|^2``.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from sparse_tvm.planning.settings import DENSE, Setting
from sparse_tvm.sparsity.formats import reduce_blocks
from sparse_tvm.sparsity.masks import prune_array
from sparse_tvm.sparsity.pattern import Pattern


def errors_of(w: np.ndarray, settings: Iterable[Setting]) -> dict[Setting, float]:
    """The error of each setting without data, from 0 for none to 1 for a layer that is all zero.

    Parameters
    ----------
    w : np.ndarray
        float32 ``[N, K]``.
    settings : Iterable[Setting]
        How it may be pruned.
    """
    squares = np.square(w)
    whole = float(squares.sum(dtype=np.float64))
    removed: dict[tuple[int, int], np.ndarray] = {}

    def error(setting: Setting) -> float:
        if setting == DENSE or not whole:
            return 0.0
        pattern = Pattern.parse(setting.structure)
        if pattern.n_m is not None:
            kept = prune_array(w, setting.sparsity, pattern) != 0
            return 1 - float(squares.sum(dtype=np.float64, where=kept)) / whole
        if pattern.block not in removed:
            removed[pattern.block] = _removed(squares, pattern.block)
        sums = removed[pattern.block]
        return float(sums[round(setting.sparsity * (len(sums) - 1))]) / whole

    return {setting: error(setting) for setting in settings}


def measured_errors(
    w: np.ndarray, settings: Iterable[Setting], products: np.ndarray
) -> dict[Setting, float]:
    """The error of each setting on calibration data: more than 1 where errors add up.

    Parameters
    ----------
    w : np.ndarray
        float32 ``[N, K]``.
    settings : Iterable[Setting]
        How it may be pruned.
    products : np.ndarray
        float32 ``[K, K]``: the mean product of each two inputs.
    """

    def energy(weight: np.ndarray) -> float:
        return float(np.einsum("nk,nk->", weight @ products, weight, dtype=np.float64))

    whole = energy(w)
    return {
        setting: 0.0
        if setting == DENSE or whole <= 0
        else max(0.0, energy(w - prune_array(w, setting.sparsity, setting.structure)) / whole)
        for setting in settings
    }


def _removed(squares: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """How much energy goes with the smallest blocks, by how many of these go."""
    blocks = np.sort(reduce_blocks(squares, block, np.add), axis=None)
    return np.concatenate([[0.0], np.cumsum(blocks, dtype=np.float64)])
