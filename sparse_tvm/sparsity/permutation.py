"""An order of a weight's inputs in which N:M sparsity keeps more of it.

N:M keeps the N largest of every M neighbours in a row, so it matters which inputs are neighbours.
After Pool and Yu, "Channel permutations for N:M sparsity" (NeurIPS 2021): inputs of different
groups of M change places as long as that keeps more. All swaps among some groups are looked at, the
best of each group are made, and groups are mixed anew.
"""

from __future__ import annotations

import numpy as np

from sparse_tvm.sparsity.masks import keep_n_of_m

_COLUMNS = 256
"""Inputs among which all swaps are compared at a time."""

_ROUNDS = 100
_LEAST = 2e-5
"""Share of the weight that three rounds must gain for another one to be worth while."""


def kept_share(w: np.ndarray, n: int, m: int) -> float:
    """Share of a weight's magnitude, the sum of absolute values, that N:M keeps of ``[N, K]``."""
    size = np.abs(w)
    total = float(size.sum(dtype=np.float64))
    return float(size[keep_n_of_m(size, n, m)].sum(dtype=np.float64)) / total if total else 1.0


def better_order(w: np.ndarray, n: int, m: int, seed: int = 0) -> np.ndarray:
    """Search for an order of inputs in which N:M keeps more magnitude.

    Parameters
    ----------
    w : np.ndarray
        float32 ``[N, K]``, M dividing K.
    n, m : int
        How many of how many neighbours stay.
    seed : int
        Of how groups are mixed.

    Returns
    -------
    np.ndarray
        int64 ``[K]``: which input comes where, ``w[:, order]``; never worse than as it is.
    """
    size = np.ascontiguousarray(np.abs(w).T, np.float32)
    rng = np.random.default_rng(seed)
    order = np.arange(len(size)).reshape(-1, m)
    total = float(size.sum(dtype=np.float64))
    gains: list[float] = []
    at_once = max(2, _COLUMNS // m)
    while len(gains) < 3 or (len(gains) < _ROUNDS and sum(gains[-3:]) > _LEAST * total):
        mixed = rng.permutation(len(order))
        parts = np.array_split(mixed, -(-len(order) // at_once))
        gains.append(sum(_swap(order, part, size, n) for part in parts))
    return order.ravel()


def _swap(order: np.ndarray, groups: np.ndarray, size: np.ndarray, n: int) -> float:
    """Make the best swaps among some groups, each taking part in one; return what they gain.

    Of a group without one of its inputs, what N:M keeps with another in its place is the sum of the
    N - 1 largest, and the larger one of the next and that other: ``rest + max(least, other)``.
    """
    members = order[groups]
    count, m = members.shape
    values = size[members]  # [groups, m, rows]
    least, rest = np.empty_like(values), np.empty((count, m), np.float64)
    for place in range(m):
        others = np.sort(np.delete(values, place, axis=1), axis=1)[:, ::-1]
        rest[:, place] = others[:, : n - 1].sum(axis=(1, 2), dtype=np.float64)
        least[:, place] = others[:, n - 1]
    flat, flat_least = values.reshape(count * m, -1), least.reshape(count * m, -1)
    having = np.stack([np.maximum(one, flat).sum(axis=1) for one in flat_least]).astype(np.float64)
    having += rest.ravel()[:, None]
    now = np.diagonal(having)
    gain = having + having.T - now[:, None] - now[None, :]
    group = np.repeat(np.arange(count), m)
    gain[group[:, None] >= group[None, :]] = 0
    gained, taken = 0.0, np.zeros(count, bool)
    good = np.flatnonzero(gain > 1e-6 * now.max(initial=0.0))
    for pair in good[np.argsort(-gain.flat[good])]:
        i, j = divmod(int(pair), count * m)
        if taken[group[i]] or taken[group[j]]:
            continue
        taken[group[[i, j]]] = True
        gained += float(gain[i, j])
        a, b = (groups[group[i]], i % m), (groups[group[j]], j % m)
        order[a], order[b] = order[b], order[a]
    return gained
