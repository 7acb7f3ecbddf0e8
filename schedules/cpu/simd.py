"""A CPU's vector registers, and how many tiles of tokens share a pass over a weight.

Needs no TVM: kernels, families and the cost model ask here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparse_tvm.operators import Layout
from sparse_tvm.schedules.cpu.precision import ZERO_POINT
from sparse_tvm.targets import Target

LANES = 16
"""Rows per tile: 16 float32 are one cache line."""


_PERMUTATIONS = {8: "llvm.x86.avx2.permps", 16: "llvm.x86.avx512.permvar.sf.512"}
"""``vpermps``, by the lanes of a vector."""


@dataclass(frozen=True)
class Simd:
    """What a kernel needs to know of a CPU's vector unit.

    Attributes
    ----------
    lanes : int
        float32 elements in one vector register (8 for AVX2, 16 for AVX-512).
    registers : int
        Architectural vector registers (16 for AVX2, 32 for AVX-512 and NEON).
    by_element : bool
        Whether a multiply-add takes a factor from any element of a vector, as on Arm.
    zero_point : int
        How an int8 activation of 0 is stored: x86 multiplies unsigned bytes, Arm signed ones.
    permutation : str or None
        LLVM's intrinsic that gives each lane any element of a vector, of float32 by int32.
    foresees : bool
        Whether few rows of activations get their weights sooner without asking for them ahead.
    """

    lanes: int
    registers: int
    by_element: bool = False
    zero_point: int = ZERO_POINT
    permutation: str | None = None
    foresees: bool = False

    @classmethod
    def of(cls, target: Target) -> Simd:
        """The vector unit of a target."""
        arm = target.architecture == "aarch64"
        permutation = None if arm else _PERMUTATIONS.get(target.lanes)
        zero_point = 0 if arm else ZERO_POINT
        return cls(target.lanes, target.registers, arm, zero_point, permutation, target.foresees)

    @property
    def accumulators(self) -> int:
        """Registers an inner loop may keep sums in, leaving some for its operands.

        At least for a tile, a weight, and a product where that and its sum are two instructions:
        a sum on the stack makes a loop twice as slow.
        """
        return self.registers - max(4, self.registers // 4, self.per_tile + 2)

    def fits(self, rows: int, vectors: int) -> bool:
        """Whether a block's sums stay in registers, beside all its vectors and one weight."""
        sums = rows * vectors
        return sums <= self.accumulators and sums + vectors < self.registers

    @property
    def few_registers(self) -> bool:
        """Whether there are 16 of them, as with AVX2: what is neither a sum nor an operand of the
        next multiply-add has no place there."""
        return self.registers < 32

    @property
    def per_tile(self) -> int:
        """Vectors in one tile."""
        return LANES // self.lanes

    def weights_together(self, layout: Layout) -> int:
        """How many weights of a row one load brings.

        Four in a CSR row of AVX2 and AVX-512, whose shuffles spread any element of four over all
        lanes. Loads are what such a row is bound by. SSE2's shuffles would need a copy first.
        """
        spreads = self.permutation is not None
        return 4 if spreads and layout.sparse and layout.block == (1, 1) else 1

    def rows_abreast(self, layout: Layout) -> int:
        """How many rows of such a weight have equally many, for few tokens to pass over together.

        A short row's time is the CPU not foreseeing its end, and its sum waiting for itself.
        """
        return 4 if self.weights_together(layout) > 1 else 1


def tiles_of(rows: Any) -> Any:
    """Tiles that hold this many rows."""
    return (rows + (LANES - 1)) // LANES


MAX_GROUP = 4
"""Tiles whose accumulators share a pass over W: enough to reuse each weight 64 times."""

_WEIGHTS_TOGETHER_GROUP = 2


def most_sliced_rows(lanes: int) -> int:
    """Rows of activations that slices of so many lanes serve, which take a step for each.

    For more, the other form of single weights is faster. With AVX-512 four rows of 70 to 90 % zeros
    take 0.6 to 0.85 of its time, and of 95 % as much or 8 % more.
    """
    return 4 if lanes == LANES else 2


ROW_COUNTS = (1, 2, 4, 8)
"""Rows of activations, in all, that there are kernels of their own for: fewer count as so many."""


def rows_per_pass(layout: Layout, simd: Simd) -> int:
    """Rows of a block that are computed together.

    A dense block may have more than there are registers for: of its divisors, the one with the most
    multiply-adds per load.
    """
    rows = layout.block[0]
    if layout.sparse:
        return rows

    def per_load(part: int) -> float:
        vectors = group_limit(part, simd) * simd.per_tile
        fits = part * vectors <= simd.accumulators
        return part * vectors / (part + vectors) if fits else 0.0

    return max((part for part in range(rows, 0, -1) if rows % part == 0), key=per_load)


def group_limit(rows: int, simd: Simd) -> int:
    """Tiles per group whose accumulators fit into the registers beside each other.

    With them go the vectors of X that more than one row multiplies: read again for each row, they
    would keep both load ports from bringing the next ones.
    """

    def fits(tiles: int) -> bool:
        vectors = tiles * simd.per_tile
        if rows == 1 or simd.by_element:  # a vector is used once, or while it is loaded
            return rows * vectors <= simd.accumulators
        return simd.fits(rows, vectors)

    return max(filter(fits, range(1, MAX_GROUP + 1)), default=1)


def group_of(layout: Layout, simd: Simd) -> int:
    """Tiles per group that a layout asks for (its parameter ``group``), or as many as fit.

    Where weights come together, two: half as many columns are a part's then, whose rows are as
    much longer, and another tile would save few loads.
    """
    most = _WEIGHTS_TOGETHER_GROUP if simd.weights_together(layout) > 1 else MAX_GROUP
    return layout.get("group", min(most, group_limit(rows_per_pass(layout, simd), simd)))


_MAX_DOT_GROUP = 8


def dot_group_limit(rows: int, simd: Simd) -> int:
    """The same for dot products of quads, which reuse each weight more.

    Several rows want the line of x in registers, too, beside a weight and a product.
    """
    limit = simd.accumulators // (rows * simd.per_tile)
    if rows > 1:
        limit = min(limit, (simd.registers - 2) // ((rows + 1) * simd.per_tile))
    return max(1, min(_MAX_DOT_GROUP, limit))


_SUMS_ON_THEIR_WAY, _MAX_CHAINS = 8, 4


def dot_chains(rows: int, vectors: int) -> int:
    """How many sums each row of a block of dot products has, which are added up at its end.

    A row of few vectors would wait for its own sums, a dot product's latency from block to block.
    """
    return max(1, min(_MAX_CHAINS, _SUMS_ON_THEIR_WAY // vectors)) if rows == 1 else 1


def dot_group_of(layout: Layout, simd: Simd) -> int:
    """Tiles per group that a layout asks for (its parameter ``group``), or as many as fit."""
    return layout.get("group", dot_group_limit(layout.block[0], simd))
