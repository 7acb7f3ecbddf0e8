"""The Optimal Brain Surgeon: prune one layer so that its outputs change least.

A layer's squared error on calibration data is ``tr((V - W) A (V - W)^T)`` for weights ``W``, where
``A`` is the Hessian and ``V`` the best dense weights. With the support ``S`` of a row given, its
best values solve ``A[S, S] w = b[S]``, ``b`` being the row of ``V A``; and taking a block ``q`` of
them away, while the others make up for it, costs ``w[q]^T inv(inv(A[S, S])[q, q]) w[q]``.

That cost is exact: Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain
Surgeon" (1992); Frantar, Singh and Alistarh, "Optimal Brain Compression", arXiv 2208.11580, which
takes away one weight after the other. SparseGPT (Frantar and Alistarh, arXiv 2301.00774) makes that
affordable for columns by the thousand by an order common to all rows, in blocks of columns, which
leaves what was decided early as it was. Here each row keeps an order of its own and weights go in a
few rounds, each a share of what is left; the values are solved for anew in each. At sparsities that
are worth compiling the systems are small, so that this costs no more, and no early choice is final.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.linalg import lapack
from threadpoolctl import threadpool_limits

from sparse_tvm.sparsity.formats import occupied_blocks
from sparse_tvm.sparsity.masks import Cut, block_sizes, keep_n_of_m, spread
from sparse_tvm.sparsity.pattern import Goal

ROUND = 0.5
"""The least share of blocks that stay in one round: more rounds gain little and cost much."""


@dataclass(frozen=True)
class Problem:
    """The least squares problem of one layer.

    Attributes
    ----------
    hessian : np.ndarray
        float32 ``[K, K]``, symmetric and positive definite (damped).
    right : np.ndarray
        float32 ``[N, K]``: the best dense weights times `hessian`.
    """

    hessian: np.ndarray
    right: np.ndarray


def prune_by_obs(w: np.ndarray, problem: Problem, goal: Goal) -> np.ndarray:
    """Choose what stays of a weight, and the values it takes.

    Parameters
    ----------
    w : np.ndarray
        float32 ``[N, K]``; blocks of zeros in it stay zero.
    problem : Problem
        What the weight is for.
    goal : Goal
        The pattern and the share of blocks to set to zero, exact to one block.

    Returns
    -------
    np.ndarray
        A new float32 ``[N, K]``.
    """
    block = (1, 1) if goal.pattern.n_m else goal.pattern.block
    keep = occupied_blocks(w != 0, block)
    with threadpool_limits(1, "blas"):  # the systems are small: threads would only wait
        for step in _rounds(keep, goal):
            sizes = block_sizes(w.shape, block).astype(np.float32)
            costs = _removal_costs(problem, keep, block) / sizes
            costs[~keep] = -1.0
            keep &= _kept(costs, step)
        return refit(problem, keep, block)


def refit(problem: Problem, keep: np.ndarray, block: tuple[int, int] = (1, 1)) -> np.ndarray:
    """Return the best values for the blocks that a mask keeps: float32 ``[N, K]``."""
    solved = np.zeros_like(problem.right)
    columns = spread(keep, (1, block[1]), (len(keep), problem.right.shape[1]))
    for group, kept in enumerate(columns):
        rows = slice(group * block[0], (group + 1) * block[0])
        support = np.flatnonzero(kept)
        if support.size:
            factor = _cholesky(problem.hessian[np.ix_(support, support)])
            solved[rows, support] = _solve(factor, problem.right[rows, support])
    return solved


def _rounds(keep: np.ndarray, goal: Goal) -> list[float | tuple[int, int]]:
    """Return the shares of all blocks that are gone after each round, or the N of each M."""
    if goal.pattern.n_m:
        n, m = goal.pattern.n_m
        counts = [m]
        while counts[-1] > n:
            counts.append(max(n, min(counts[-1] - 1, round(counts[-1] * ROUND))))
        return [(count, m) for count in counts[1:]]
    now, wanted = float(keep.mean()), 1 - goal.sparsity
    if now <= wanted:
        return []
    if not wanted * keep.size >= 0.5:
        return [1.0]
    count = math.ceil(math.log(wanted / now) / math.log(ROUND))
    return [1 - now * (wanted / now) ** (i / count) for i in range(1, count + 1)]


def _kept(costs: np.ndarray, step: float | tuple[int, int]) -> np.ndarray:
    if isinstance(step, tuple):
        return keep_n_of_m(costs, *step)
    return Cut.at(costs, step).keep(costs)


def _removal_costs(problem: Problem, keep: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Return what taking each block away costs: float32, like `keep`; zero where none is kept."""
    costs = np.zeros(keep.shape, np.float32)
    columns = spread(keep, (1, block[1]), (len(keep), problem.right.shape[1]))
    whole = _factored(problem.hessian) if columns.all(axis=1).any() else None
    for group, kept in enumerate(columns):
        rows = slice(group * block[0], (group + 1) * block[0])
        support = np.flatnonzero(kept)
        if not support.size:
            continue
        if whole is not None and support.size == kept.size:
            factor, root = whole
        else:
            factor, root = _factored(problem.hessian[np.ix_(support, support)])
        values = _solve(factor, problem.right[rows, support])
        costs[group, keep[group]] = _costs_of_blocks(values, root, block[1])
    return costs


def _costs_of_blocks(values: np.ndarray, root: np.ndarray, width: int) -> np.ndarray:
    """Return the cost of each block of `width` columns, of which the last may be narrower.

    The inverse of the Hessian is ``root^T root``.
    """
    if width == 1:
        costs: np.ndarray = np.square(values).sum(axis=0) / np.einsum("ij,ij->j", root, root)
        return costs
    full = values.shape[1] // width
    found = []
    for start, count, size in ((0, full, width), (full * width, 1, values.shape[1] % width)):
        if size and count:
            index = start + np.arange(count * size).reshape(count, size)
            columns = root[:, index].transpose(1, 0, 2)
            w = values[:, index].transpose(1, 2, 0)
            blocks = columns.transpose(0, 2, 1) @ columns
            found.append(np.einsum("bcr,bcr->b", w, np.linalg.solve(blocks, w)))
    return np.concatenate(found)


def _factored(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower Cholesky factor of a matrix, and the factor's own inverse."""
    factor = _cholesky(matrix)
    root, _ = lapack.strtri(factor, lower=1)
    return factor, np.asarray(root)


def _cholesky(matrix: np.ndarray) -> np.ndarray:
    # Symmetric, so that the transposed view is the same matrix, in the order that LAPACK wants.
    factor, info = lapack.spotrf(matrix.T, lower=1)
    if info:
        raise np.linalg.LinAlgError(f"the Hessian is not positive definite at {info}")
    return np.asarray(factor)


def _solve(factor: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Solve for each row of `right`."""
    solution, _ = lapack.spotrs(factor, right.T, lower=1)
    return np.asarray(solution).T
