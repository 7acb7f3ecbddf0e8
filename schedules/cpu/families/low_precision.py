"""Dense layers in int8 and bf16 on lines of words: what their families share, and dot products."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from sparse_tvm.families import (
    Extents,
    Kernel,
    WeightedFamily,
    Wish,
    Work,
    bytes_of,
    elements,
)
from sparse_tvm.operators import Activation, Bias, Dense, Layout, Residual
from sparse_tvm.schedules.cpu import word_weights
from sparse_tvm.schedules.cpu.cost import arrival_cycles
from sparse_tvm.schedules.cpu.dots import Dot
from sparse_tvm.schedules.cpu.families.extents import tiles_for
from sparse_tvm.schedules.cpu.precision import (
    INT8,
    PRECISIONS,
    Precision,
)
from sparse_tvm.schedules.cpu.simd import LANES, Simd, dot_chains, dot_group_of, tiles_of
from sparse_tvm.sparsity.quantise import as_words
from sparse_tvm.sparsity.statistics import WeightStatistics
from sparse_tvm.targets import Target

if TYPE_CHECKING:
    from sparse_tvm.schedules.cpu.dot_products import MultiplyAdd
    from sparse_tvm.schedules.cpu.low_matmul import LowMatmul

UNSTRUCTURED = "csr"
"""The wish for a sparse weight without blocks."""


_L2_SHARE = 0.75
"""Share of the second cache that keeps a weight from one group of tokens to the next."""

_FEW_TILES = 4
"""Whose words the first cache mostly holds, for a weight of single rows."""

_LOOP = 1.3
"""Cycles that the loop over stored blocks takes at least for one, measured on Zen 4."""

_PAIRED_ROWS = (2, 4, 6)
"""Of blocks that are multiplied in pairs; the last of a dense weight's."""

_WOVEN = 6.0
"""Cycles that weaving two lines of a tile takes, by LLVM's models of N2, V1 and V2."""

_LATENCY, _WINDOW = 5.0, 512
"""Cycles from one dot product to the next of the same sums, and how many instructions a CPU looks
ahead."""


def precision_of(op: Dense) -> Precision | None:
    """What the weight and the input are multiplied in; None if not alike or not known."""
    types = op.types
    return PRECISIONS.get(types.input) if types.input == types.weight else None


def fits_wish(block: tuple[int, int], wish: Wish) -> bool:
    """Whether blocks of this size can hold the blocks that were wished for without much waste."""
    if wish.block is None:
        return True
    (rows, columns), (wished_rows, wished_columns) = block, wish.block
    aligned = columns % wished_columns == 0 or wished_columns % columns == 0
    return wished_rows % rows == 0 and aligned


class LowPrecisionFamily(WeightedFamily[Dense]):
    """What the families share: types, epilogues, and the wishes that they can meet."""

    precisions: ClassVar[tuple[Precision, ...]]
    operator: ClassVar[type[Dense]] = Dense

    @abstractmethod
    def lacks(self, target: Target) -> str | None:
        """What the target's CPUs miss; None if nothing."""

    @abstractmethod
    def layouts(self, op: Dense, target: Target) -> Sequence[Layout]:
        """Dense, and sparse, layouts."""

    def refuses(self, op: Dense, target: Target) -> str | None:
        if precision_of(op) not in self.precisions:
            names = " and ".join(precision.name for precision in self.precisions)
            return f"{self.name} computes {names} only"
        if op.groups > 1:
            return f"{self.name} computes no groups"
        for step in op.epilogue:
            if not isinstance(step, Bias | Residual | Activation):
                return f"{self.name} has no epilogue {step}"
        return self.lacks(target)

    def candidates(
        self, op: Dense, weight: WeightStatistics, target: Target, wish: Wish | None = None
    ) -> Sequence[Layout]:
        found = self.layouts(op, target)
        if wish is None:
            return found
        if wish.format == "bsr":
            blocks = [layout for layout in found if layout.format == "bsr"]
            return [layout for layout in blocks if fits_wish(layout.block, wish)]
        return [layout for layout in found if layout.format == wish.format]

    def work(
        self,
        op: Dense,
        operands: Sequence[Extents],
        output: Extents,
        nonzeros: int | None = None,
    ) -> Work:
        n, k = op.matrix
        count = n * k if nonzeros is None else nonzeros
        tokens = elements(Extents(output.shape[:2])) * LANES
        moved = bytes_of([*operands, output])
        return Work(2.0 * count * tokens, moved, rate=self.rate(op))

    @abstractmethod
    def rate(self, op: Dense) -> float:
        """Of the kernel's unit (see :class:`Work`)."""


@dataclass(frozen=True)
class DotFamily(LowPrecisionFamily):
    """Kernels of :mod:`sparse_tvm.schedules.cpu.dot_matmul`."""

    name: ClassVar[str] = "dot"
    counts_rows: ClassVar[bool] = True
    precisions: ClassVar[tuple[Precision, ...]] = (INT8,)
    dots: ClassVar[tuple[Dot, ...]]
    """Of a kind of CPU, the fastest first."""

    @abstractmethod
    def multiply_add(self, dot: Dot) -> MultiplyAdd:
        """The instruction itself."""

    @abstractmethod
    def code(self, dot: Dot) -> str | None:
        """What kernels with it bring in LLVM's own words."""

    def rate(self, op: Dense) -> float:
        return op.layout.block[1] if op.layout else _unit(op)

    def dot(
        self, target: Target, precision: Precision = INT8, least: int = 0, depth: int = 1
    ) -> Dot | None:
        """The target's instruction, which multiplies weights as large as ``least`` exactly."""
        able = (dot for dot in self.dots if target.has(*dot.features))
        exact = (dot for dot in able if dot.largest_weight >= least)
        wanted = (precision, depth)
        return next((dot for dot in exact if (dot.precision, dot.depth) == wanted), None)

    def lacks(self, target: Target) -> str | None:
        return None  # what it has depends on the precision

    def refuses(self, op: Dense, target: Target) -> str | None:
        precision = precision_of(op)
        if precision in self.precisions:
            if not self.dot(target, precision):
                return f"{target.name} has no dot products of {precision.name}"
            if not self.dot(target, precision, op.steps):
                return f"{target.name} multiplies no weights {op.steps} steps from 0"
        return super().refuses(op, target)

    def structures(self, op: Dense, target: Target) -> Sequence[str]:
        unit = _unit(op)
        found = ["unstructured", f"1x{unit}", f"4x{unit}"]
        pairs = self.dot(target, _precision(op), op.steps, depth=2)
        return [*found, f"4x{2 * unit}"] if pairs else found

    def layouts(self, op: Dense, target: Target) -> Sequence[Layout]:
        n, unit = op.matrix[0], _unit(op)
        wide = target.registers > LANES
        rows = min(6 if wide else target.lanes // 2, n)
        found = [Layout(self.name, "dense", (rows, unit))]
        found.append(Layout(self.name, UNSTRUCTURED, (1, unit)))
        found += [Layout(self.name, "bsr", (rows, unit)) for rows in (1, 2, 4, 8) if rows <= n]
        if self.dot(target, _precision(op), op.steps, depth=2):
            found.append(Layout(self.name, "dense", (_PAIRED_ROWS[-1], 2 * unit)))
            found += [Layout(self.name, "bsr", (rows, 2 * unit)) for rows in _PAIRED_ROWS]
        single = [layout for layout in found if layout.sparse and layout.block[0] == 1]
        if wide:  # so that the first cache holds more of the tokens; on others not measured
            found += [layout.having(group=_FEW_TILES) for layout in single]
        return found

    def cost(
        self, op: Dense, layout: Layout, weight: WeightStatistics, tokens: int, target: Target
    ) -> float:
        dot = self._dot(op, layout, target)
        simd, costs = self._simd(dot, target), target.costs
        (n, k), rows = op.matrix, layout.block[0]
        tiles = tiles_of(tokens)
        group = tiles / -(-tiles // dot_group_of(layout, simd))
        lines = -(-k // layout.block[1])
        dense_blocks = -(-n // rows) * lines
        blocks = weight.stored_blocks(layout.block) if layout.sparse else dense_blocks
        x_bytes = lines * group * LANES * 4 * dot.depth
        far = max(0.0, 1 - 0.85 * target.caches.l1 / x_bytes) if layout.sparse else 0.0
        far *= group * dot.depth * max(dot.gathered, costs.l2_line)
        spilled = 1.5 if rows * group * simd.per_tile > simd.accumulators else 1.0
        # The sums of a row wait for each other, unless the next row's products start meanwhile.
        waiting = _WINDOW / max(1.0, blocks / -(-n // rows) * (rows * group + 5))
        # Of few tokens one vector is computed; finding stored blocks takes as long as before.
        share = 1 / simd.per_tile if tokens <= simd.lanes and not layout.sparse else 1.0
        load = simd.per_tile * costs.load * dot.depth
        index = costs.index if layout.sparse else 0.0
        products = rows * dot.depth * dot.cycles_on(target)
        block = max(products * spilled, load) * share * group
        block = max(block, _LOOP if layout.sparse else 0.0) + far + index
        chains = dot_chains(rows, round(group) * simd.per_tile) if layout.sparse else 1
        block = max(block, _LATENCY / max(1.0, waiting) / chains)
        finish = n * group * 4.0 * share + -(-n // rows) * costs.row
        if dot.depth > 1:  # lines of the tokens are woven first
            finish += lines * group * (_WOVEN + dot.depth * costs.l2_line) * share
        # A dense weight comes beside the products, but for the first time.
        passes, stored = tiles / group, blocks * (rows * dot.depth * 4 + 2)
        near = stored < _L2_SHARE * target.caches.l2
        again = (passes - 1) / (costs.second if near else costs.streamed) if layout.sparse else 0.0
        arrival = stored / costs.words
        if target.foresees:
            arrival = arrival_cycles(stored, 1, weight.copies, target)
        streamed = arrival + stored * again
        return target.seconds((blocks * block + finish) * passes + streamed)

    def pack(
        self, op: Dense, w: np.ndarray, layout: Layout, target: Target
    ) -> dict[str, np.ndarray]:
        dot = self._dot(op, layout, target)
        zero_point = 0 if dot.signed else self._simd(dot, target).zero_point
        elements, of_rows = word_weights.rounded(w, dot.precision, dot.largest_weight, zero_point)
        pack = word_weights.sparse_rows if layout.sparse else word_weights.dense_rows
        return {**pack(as_words(elements), layout.block[0], dot.depth), **of_rows}

    def build(
        self, op: Dense, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        from sparse_tvm.schedules.cpu.bf16_dot import with_code
        from sparse_tvm.schedules.cpu.dot_matmul import dot_matmul

        layout = op.stored
        dot = self._dot(op, layout, target)
        simd = self._simd(dot, target)
        function = dot_matmul(
            problem_of(op, operands),
            layout.block[0],
            layout.sparse,
            simd,
            self.multiply_add(dot),
            dot_group_of(layout, simd),
            dot.depth,
        )
        title = title_of(op, dot.name.replace("-", "_"))
        return Kernel(title, with_code(function, self.code(dot)))

    def _simd(self, dot: Dot, target: Target) -> Simd:
        return replace(Simd.of(target), lanes=dot.lanes, registers=dot.registers)

    def _dot(self, op: Dense, layout: Layout, target: Target) -> Dot:
        depth = layout.block[1] // _unit(op)
        dot = self.dot(target, _precision(op), op.steps, depth)
        assert dot is not None, f"{self.name} was to refuse {target.name}"
        return dot


def _precision(op: Dense) -> Precision:
    """Of a layer that is known to have one."""
    precision = precision_of(op)
    assert precision is not None
    return precision


def _unit(op: Dense) -> int:
    """Features in a word of the layer's input, and of its weight."""
    return _precision(op).unit


def problem_of(op: Dense, operands: Sequence[Extents]) -> LowMatmul:
    """A layer's kernel, but for how its weight is stored."""
    from sparse_tvm.schedules.cpu.low_matmul import LowMatmul

    precision = precision_of(op)
    assert precision is not None
    out = PRECISIONS.get(op.types.output)
    rows = operands[-1].shape[0] if operands[-1].numbers else None
    return LowMatmul(tiles_for(operands[0]), *op.matrix, precision, op.epilogue, out, rows)


def title_of(op: Dense, unit: str) -> str:
    """The kernel's name, given that of what multiplies."""
    layout, precision = op.stored, precision_of(op)
    assert precision is not None
    rows, columns = layout.block
    size = f"_{rows}x{columns}" if layout.format == "bsr" else ""
    n, k = op.matrix
    out = PRECISIONS.get(op.types.output)
    to = [f"to_{out.name}"] if out else []
    names = [precision.name, unit, layout.format + size, f"{n}x{k}", *map(str, op.epilogue), *to]
    return "_".join(names)
