"""How many keys and tiles of queries attention sums up together, in registers.

Blocks are ``(keys, tiles)``; when values are weighed, as many features of the result stand for the
keys. Needs no TVM: families offer blocks to the tuner.
"""

from __future__ import annotations

from collections.abc import Sequence

from sparse_tvm.schedules.cpu.simd import LANES, Simd

Blocks = tuple[int, int]

KEYS, MOST_TILES = (16, 12, 8, 6, 4, 3, 2), 4
"""What there is to choose among for multiply-adds of float32."""

DOT_KEYS, MOST_DOT_TILES = (16, 8, 4), 2
"""The same for dot products: tiles of values, of ``LANES`` features, are cut evenly."""

_OFFERED = 2
"""Numbers of keys for each number of tiles: fewer hide too little of a sum's latency."""

_DOT_USUAL = ((8, 2), (4, 1))


def usual_blocks(simd: Simd) -> Blocks:
    """One tile, so that what a mask hides from some queries is computed for as few as can be, and
    the keys of one, or as many as fit: sums enough to hide the latency of two units."""
    return min(LANES, simd.accumulators // simd.per_tile), 1


def usual_dot_blocks(simd: Simd) -> Blocks:
    """The larger block where its sums fit into the registers."""
    return next((one for one in _DOT_USUAL if _fits(one, simd)), _DOT_USUAL[-1])


def offered_blocks(
    simd: Simd, keys: Sequence[int], most_tiles: int, tiles: int | None
) -> list[Blocks]:
    """Blocks that only a measurement can tell apart.

    Parameters
    ----------
    keys, most_tiles : Sequence[int], int
        Numbers to choose among, the largest first, and the most tiles of a block.
    tiles : int | None
        How many tiles of queries there are, if that is known.
    """
    counts = range(1, min(most_tiles, most_tiles if tiles is None else tiles) + 1)
    fitting = [[(each, count) for each in keys if _fits((each, count), simd)] for count in counts]
    return [one for column in fitting for one in column[:_OFFERED]]


def check_blocks(blocks: Blocks, simd: Simd) -> None:
    """See to it that the sums of a block stay in registers.

    Raises
    ------
    ValueError
        When they do not.
    """
    keys, tiles = blocks
    if min(blocks) < 1 or not _fits(blocks, simd):
        raise ValueError(
            f"blocks of {keys} keys x {tiles} tiles of queries need {keys * tiles * simd.per_tile} "
            f"registers for sums, of which there are {simd.accumulators}"
        )


def _fits(blocks: Blocks, simd: Simd) -> bool:
    keys, tiles = blocks
    return simd.fits(keys, tiles * simd.per_tile)
