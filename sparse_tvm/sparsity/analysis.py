"""Recognise how the zeros of a weight are laid out: in blocks, N:M, or without structure."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import numpy as np

from sparse_tvm.sparsity.formats import occupied_blocks

MIN_SPARSITY = 0.05
"""Below this share of zeros a weight is called dense."""

MIN_FILL = 0.95
"""Blocks are a weight's structure when this share of their values is non-zero."""

_BLOCK_SIZES = (1, 2, 4, 8, 16, 32)
_N_M = ((1, 4), (2, 4), (4, 8))  # the stricter first
_MIN_SURPRISE = 10.0  # violations expected of random zeros; seeing none has odds of exp(-10)


@dataclass(frozen=True)
class Structure:
    """What the zeros of one ``[N, K]`` weight look like.

    Attributes
    ----------
    sparsity : float
        Share of zeros, 0 to 1.
    nnz : int
        Number of non-zeros.
    blocks : dict[tuple[int, int], float]
        For each candidate block (rows, columns), the share of non-zeros among the values of all
        blocks that hold any; values beyond the matrix's edges do not count.
    block : tuple[int, int] | None
        The largest block that the zeros follow, if any larger than one value.
    n_m : tuple[int, int] | None
        ``(N, M)`` when at most N of any M consecutive inputs are non-zero, by design.
    label : str
        ``"dense"``, ``"all zero"``, ``"unstructured"``, ``"2:4"`` or ``"4x1 blocks (fill 1.00)"``.
    """

    sparsity: float
    nnz: int
    blocks: dict[tuple[int, int], float]
    block: tuple[int, int] | None
    n_m: tuple[int, int] | None
    label: str


def analyse(w: np.ndarray) -> Structure:
    """Recognise the structure of a float32 ``[N, K]`` weight, in any memory order.

    A block size or N:M pattern is reported only where zeros without structure, as many as there
    are, would be very unlikely to show it.
    """
    mask = np.ascontiguousarray(w != 0)
    nnz = int(np.count_nonzero(mask))
    density = nnz / mask.size if mask.size else 1.0
    blocks = _block_fills(mask, nnz)
    is_sparse = nnz > 0 and 1 - density >= MIN_SPARSITY
    block = _largest_block(blocks, density) if is_sparse else None
    n_m = _find_n_m(mask, density, block) if is_sparse else None
    return Structure(
        sparsity=1 - density,
        nnz=nnz,
        blocks=blocks,
        block=block,
        n_m=n_m,
        label=_label(density, blocks, block, n_m),
    )


def density_map(mask: np.ndarray, cells: int = 24) -> np.ndarray:
    """Return where a weight's non-zeros are, coarsely enough to be looked at.

    Parameters
    ----------
    mask : np.ndarray
        Bool ``[N, K]``: which values are not zero.
    cells : int
        Rows and columns of the map; fewer where the weight has fewer.

    Returns
    -------
    np.ndarray
        uint8: in each cell the share of non-zeros, 255 being all of them.
    """
    rows, columns = (
        np.linspace(0, size, min(size, cells), endpoint=False, dtype=int) for size in mask.shape
    )
    counts = np.add.reduceat(np.add.reduceat(mask, columns, axis=1, dtype=int), rows, axis=0)
    heights, widths = np.diff(rows, append=mask.shape[0]), np.diff(columns, append=mask.shape[1])
    sizes = np.outer(heights, widths)
    density: np.ndarray = np.rint(255 * counts / sizes).astype(np.uint8)
    return density


def _label(
    density: float,
    blocks: dict[tuple[int, int], float],
    block: tuple[int, int] | None,
    n_m: tuple[int, int] | None,
) -> str:
    if density == 0:
        return "all zero"
    if 1 - density < MIN_SPARSITY:
        return "dense"
    if n_m is not None:
        return f"{n_m[0]}:{n_m[1]}"
    if block is not None:
        return f"{block[0]}x{block[1]} blocks (fill {blocks[block]:.2f})"
    return "unstructured"


def _block_fills(mask: np.ndarray, nnz: int) -> dict[tuple[int, int], float]:
    """Return the fill of every candidate block that fits the matrix."""
    fills = {}
    by_rows = mask
    for r in _BLOCK_SIZES:
        if r > max(len(mask), 1):
            break
        if r > 1:
            by_rows = occupied_blocks(by_rows, (2, 1))
        occupied = by_rows
        for c in _BLOCK_SIZES:
            if c > max(mask.shape[1], 1):
                break
            if c > 1:
                occupied = occupied_blocks(occupied, (1, 2))
            stored = _values_covered(occupied, (r, c), mask.shape)
            fills[r, c] = nnz / stored if stored else 1.0
    return fills


def _values_covered(occupied: np.ndarray, block: tuple[int, int], shape: tuple[int, ...]) -> int:
    """Count the values in occupied blocks, without those beyond the matrix's edges."""
    if not occupied.size:
        return 0
    (n, k), (r, c) = shape, block
    rows_beyond, columns_beyond = -n % r, -k % c
    return (
        int(np.count_nonzero(occupied)) * r * c
        - int(np.count_nonzero(occupied[-1])) * rows_beyond * c
        - int(np.count_nonzero(occupied[:, -1])) * columns_beyond * r
        + int(occupied[-1, -1]) * rows_beyond * columns_beyond
    )


def _largest_block(fills: dict[tuple[int, int], float], density: float) -> tuple[int, int] | None:
    """Return the largest block that is filled, and far more so than by chance."""

    def is_structure(block: tuple[int, int]) -> bool:
        values = block[0] * block[1]
        by_chance = density / (1 - (1 - density) ** values)
        return fills[block] >= max(MIN_FILL, (1 + by_chance) / 2)

    found = [block for block in fills if block != (1, 1) and is_structure(block)]
    return max(found, key=lambda block: (block[0] * block[1], block[0]), default=None)


def _find_n_m(
    mask: np.ndarray, density: float, block: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Return the strictest N:M pattern along the inputs that no group of M violates."""
    independent_rows = len(mask) / (block[0] if block else 1)
    for n, m in _N_M:
        groups = independent_rows * (mask.shape[1] // m)
        if groups * _chance_of_more(n, m, density) < _MIN_SURPRISE or density < n / m / 2:
            continue
        if _largest_group(mask, m) <= n:
            return n, m
    return None


def _chance_of_more(n: int, m: int, density: float) -> float:
    """Return the probability that more than `n` of `m` random values are non-zero."""
    return sum(comb(m, j) * density**j * (1 - density) ** (m - j) for j in range(n + 1, m + 1))


def _largest_group(mask: np.ndarray, m: int) -> int:
    """Return the most non-zeros in any group of `m` consecutive columns."""
    counts = mask[:, ::m].astype(np.uint8)
    for offset in range(1, m):
        part = mask[:, offset::m]
        counts[:, : part.shape[1]] += part
    return int(counts.max())
