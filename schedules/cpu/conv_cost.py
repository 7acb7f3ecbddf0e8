"""How convolutions in planes are cut, and their predicted cycles: as dense layers on pixels.

The part of an image that a part of the weight reads should stay in the first cache; what a vector
of pixels costs there, and beyond, is the same as for tokens (see
:mod:`sparse_tvm.schedules.cpu.cost`).
"""

from __future__ import annotations

from sparse_tvm.operators import STILL, Convolution, Layout
from sparse_tvm.schedules.cpu.blocks import Blocks
from sparse_tvm.schedules.cpu.cost import arrival_cycles, line_cycles
from sparse_tvm.schedules.cpu.image_operators import blocks_of, window_of
from sparse_tvm.schedules.cpu.planes import Window
from sparse_tvm.schedules.cpu.simd import LANES, Simd
from sparse_tvm.sparsity.statistics import TYPICAL_COPIES
from sparse_tvm.targets import Target

_TYPICAL_SIZE = 28
"""Rows and columns of an image of which nobody knows them."""

_TYPICAL_LENGTH = 1024
"""The same of a signal."""

_NEIGHBOURS_GAP = 1
"""Columns between rows that a convolution's neighbours read as their padding: of a 3x3 window."""

_TYPICAL_DENSITY = 0.1
"""Share of a sparse weight that is stored."""

_MOST_VECTORS = 8
_SPARSE_SUMS = 16
"""Sums that a sparse weight's kernel keeps: more would reload few blocks less."""

_NEAR_SHARE, _NEAR_SHARE_OF_WINDOWS = 1.0, 0.5
_SECOND_CACHE_SHARE = 0.6
_FAR = 6.0
"""How many times the first cache a dense weight's rows must read of an image to do so in parts."""

_PACKED_USES = {"dense": 20.0, "csr": 12.0, "bsr": 1.5}
"""How often a vector of pixels must be read for a copy beside its neighbours to pay."""

_PACKED_WINDOW_USES = {"dense": 16.0, "csr": 6.0, "bsr": 3.0}
"""The same for the vectors of each tap, many of which are parts of two cache lines in place."""

_PACKED_WINDOW_SHARE = 1.5
"""Of the first cache: what is copied passes all rows in order, and half of it stays there."""

_PACKED_FROM, _PACKED_DENSE_SHARE = 1.5, 2.0
"""How many times the first cache a dense weight's rows must read of an image to read a copy of it
instead, and of it a part's copy may be."""

_FILLED_FROM, _FILLED_VECTORS = 128, 4
"""Columns from which on a row of single weights is filled up to fours, and how many vectors of
pixels then pass it, instead of more."""

_COPY_CYCLES = 1.2
"""To copy a vector."""

_GROUPED_ROWS = (8, 6, 4, 3, 2, 1)

_STREAMED_WEIGHT_BYTES = 256 << 10
_WINDOW_INDEX_CYCLES = 0.4
_DENSE_LOOP = 1.04
_SPILLED = 2.0

_STORED_TAP = 1.6
"""What a stored tap of a depthwise convolution takes at most, in times of one of a dense window."""


def blocking(op: Convolution, format: str, rows: int, target: Target) -> dict[str, int]:
    """The layout parameters of :func:`~sparse_tvm.schedules.cpu.conv_planes.conv_planes`."""
    simd, blocks = Simd.of(target), blocks_of(op)
    vectors = min(plane_vectors(op, simd), _group(format, rows, simd))
    if blocks is not None:
        return _of_blocks(op, blocks, format, rows, vectors, target)
    parameters = {"vectors": vectors}
    if vectors > _FILLED_VECTORS and _fills_rows(op, format, rows, simd):
        vectors = _FILLED_VECTORS
        parameters = {"vectors": vectors, "filled": 1}
    weight_bytes = 4 * op.matrix[0] * op.matrix[1]
    window = window_of(op)
    taps = window.taps * op.frames.kernel
    if format == "dense":
        planes = op.channels * len(window.phases)
        image_bytes = 4 * planes * plane_vectors(op, simd) * simd.lanes * op.frames.kernel
        room = min(weight_bytes, _SECOND_CACHE_SHARE * target.caches.l2)
        # Four rows by three vectors use a line too seldom for the image to pass all the time.
        if image_bytes < room and (taps > 1 or simd.registers >= 32):
            parameters["rows_outermost"] = 1
            return parameters
        near = _near(op, vectors, target)
        if _packs_dense(op, rows, vectors, target):
            share = _packed_bytes(op, vectors, simd) / (_PACKED_DENSE_SHARE * target.caches.l1)
            parts = max(1, min(round(share), op.channels))
            return {**parameters, "packed": 1, **({"parts": parts} if parts > 1 else {})}
        if near > _FAR:
            parameters["parts"] = min(round(near), op.channels)
        return {**parameters, **_packing(op, format, rows)}
    if _packs_windows(op, format, rows, simd):
        near = _packed_bytes(op, vectors, simd) / (_PACKED_WINDOW_SHARE * target.caches.l1)
        parameters |= {"packed": 1, "parts": max(1, round(near))}
        return {**parameters, **_streaming(weight_bytes)}
    share = _NEAR_SHARE if taps == 1 else _NEAR_SHARE_OF_WINDOWS
    if rows < 4 or taps > 1:
        share *= min(rows, 2)  # blocks load a vector less often
        near = _read_bytes(op, vectors, simd) / (share * target.caches.l1)
        parameters["parts"] = max(1, min(round(near), op.channels))
    return {**parameters, **_streaming(weight_bytes), **_packing(op, format, rows)}


def _of_blocks(
    op: Convolution, blocks: Blocks, format: str, rows: int, vectors: int, target: Target
) -> dict[str, int]:
    """The same for images in blocks: each tap is a part of the weight at least.

    Dense weights, and blocks of rows, gain nothing by more.
    """
    simd = Simd.of(target)
    vectors = min(vectors, -(-blocks.largest // simd.lanes))
    near = 4.0 * op.channels * vectors * simd.lanes / (_NEAR_SHARE * rows * target.caches.l1)
    per_tap = max(1, min(round(near), op.channels)) if format == "csr" else 1
    return {"vectors": vectors, "parts": blocks.window.taps * per_tap}


def _streaming(weight_bytes: int) -> dict[str, int]:
    """Whether a sparse weight is asked for ahead of its use."""
    return {"prefetch": 1} if weight_bytes * _TYPICAL_DENSITY > _STREAMED_WEIGHT_BYTES else {}


def _fills_rows(op: Convolution, format: str, rows: int, simd: Simd) -> bool:
    """Whether rows of single weights are filled up to fours, which one load brings.

    Then half as many vectors of pixels pass them, so that a part has twice as many columns: where
    rows are long enough, and many outputs read what was packed for them. With few registers rows
    that are filled are slower.
    """
    layout = Layout("", format, (rows, 1))
    if simd.few_registers or simd.weights_together(layout) == 1 or op.groups > 1:
        return False
    return op.matrix[1] >= _FILLED_FROM and bool(_packing(op, format, rows))


def _packs_windows(op: Convolution, format: str, rows: int, simd: Simd) -> bool:
    """Whether what each tap multiplies is copied first: lines of its own, and no offset to look up.

    Measured with few registers only.
    """
    if op.groups > 1 or not simd.few_registers:
        return False
    if op.frames != STILL and format != "dense":
        return False
    uses = op.out_channels / rows * (1.0 if format == "dense" else _TYPICAL_DENSITY)
    return window_of(op).taps > 1 and uses >= _PACKED_WINDOW_USES[format]


def _packs_dense(op: Convolution, rows: int, vectors: int, target: Target) -> bool:
    """The same of a dense weight, if what it multiplies in place would leave the first cache."""
    packs = _packs_windows(op, "dense", rows, Simd.of(target))
    return packs and _near(op, vectors, target) > _PACKED_FROM


def _near(op: Convolution, vectors: int, target: Target) -> float:
    """How many times the first cache is read for so many vectors of pixels, in place."""
    across = len({column for _, column in window_of(op).phases})
    return across * _read_bytes(op, vectors, Simd.of(target)) / target.caches.l1


def _packed_bytes(op: Convolution, vectors: int, simd: Simd) -> float:
    """Bytes of the copy of what all taps multiply with so many vectors of pixels."""
    return 4.0 * op.matrix[1] * vectors * simd.lanes


def _packing(op: Convolution, format: str, rows: int) -> dict[str, int]:
    """Whether the pixels that pass the weight are copied first, channels next to each other.

    In large planes they are on as many pages as there are channels.
    """
    window = window_of(op)
    if window.taps * op.frames.kernel > 1 or window.pads != (0, 0, 0, 0):
        return {}
    uses = op.out_channels / rows * (1.0 if format == "dense" else _TYPICAL_DENSITY)
    return {"packed": 1} if uses >= _PACKED_USES[format] else {}


def _group(format: str, rows: int, simd: Simd) -> int:
    """Vectors of pixels beside whose sums the operands fit into the registers."""
    sums = simd.accumulators
    if format != "dense":
        sums = min(sums, _SPARSE_SUMS)
    return max(1, min(_MOST_VECTORS if format != "dense" else 4, sums // rows))


def dense_rows(op: Convolution, target: Target) -> int:
    """Rows of the register block of a dense kernel: the most multiply-adds per load.

    LLVM unrolls the loop over a window's taps. Where it does not know how far they are from each
    other, it computes that ahead, and wants a register, or sums would go to the stack.
    """
    simd = Simd.of(target)
    unknown = window_of(op).taps * op.frames.kernel > 1 and None in op.size

    def per_load(rows: int) -> float:
        vectors = min(plane_vectors(op, simd), _group("dense", rows, simd))
        spare = int(unknown and not _packs_dense(op, rows, vectors, target))
        fits = simd.fits(rows, vectors) and rows * vectors + vectors + spare < simd.registers
        return rows * vectors / (rows + vectors) if fits else 0.0

    return min(op.out_channels, max(range(1, 17), key=per_load))


def grouped_rows(op: Convolution, target: Target) -> int:
    """Rows of the blocks of a grouped kernel, which divide a group: the most FMAs per load."""
    simd, per_group = Simd.of(target), op.out_channels // op.groups

    def per_load(rows: int) -> float:
        vectors = min(plane_vectors(op, simd), _group("bsr", rows, simd))
        return rows * vectors / (rows + vectors)

    return max((rows for rows in _GROUPED_ROWS if per_group % rows == 0), key=per_load)


def conv_seconds(
    op: Convolution,
    layout: Layout,
    stored: int,
    pixels: int,
    target: Target,
    copies: float = TYPICAL_COPIES,
) -> float:
    """Seconds for so many pixels of the output on one core, with this many stored blocks."""
    simd, costs, blocks = Simd.of(target), target.costs, blocks_of(op)
    rows, parts, limit = layout.block[0], layout.get("parts", 1), layout.get("vectors", 1)
    groups = -(-plane_vectors(op, simd) // limit)
    vectors = plane_vectors(op, simd) / groups
    fmas = rows * vectors * costs.fma
    if rows * limit > simd.accumulators:
        fmas *= _SPILLED
    together = simd.weights_together(layout) if layout.get("filled", 0) else 1
    weights = -(-rows // costs.scalars_per_load) * costs.load * costs.narrow / together
    if layout.sparse:
        windows = window_of(op).taps * op.frames.kernel > 1 and blocks is None
        packed = windows and bool(layout.get("packed", 0))
        bytes_of = _packed_bytes if packed or blocks is not None else _read_bytes
        near = bytes_of(op, limit, simd) / parts
        lines = vectors * line_cycles(near, target) * simd.lanes / LANES
        block = max(fmas, weights) + lines + costs.index  # too short for both to overlap
        block += _WINDOW_INDEX_CYCLES if windows and not packed else 0.0
    else:
        block = max(fmas, weights + vectors * costs.load) * _DENSE_LOOP
    segments = parts * -(-op.out_channels // rows)
    sums = rows * vectors * (costs.sum if parts > 1 else 1)
    compute = stored * block + segments * (costs.row + sums)
    if layout.sparse and packed:
        compute += op.matrix[1] * vectors * _COPY_CYCLES
    passes = 1 if layout.get("rows_outermost", 0) else groups
    nbytes = stored * (4 * rows + (2 if layout.sparse else 0))
    streamed = arrival_cycles(nbytes, passes, copies, target)
    rows_out, columns_out = out_size(op)
    share = 1.0 if blocks is None else blocks.share
    cycles = share * (groups * compute + streamed)
    return target.seconds(cycles) * pixels / (rows_out * columns_out)


def depthwise_seconds(
    op: Convolution, taps: int, pixels: int, target: Target, *, sparse: bool
) -> float:
    """The same for a depthwise convolution that has so many ``taps`` in all of its channels."""
    blocks = round(taps * _STORED_TAP) if sparse else taps
    return conv_seconds(op, Layout("", "dense"), blocks, pixels, target)


def plane_vectors(op: Convolution, simd: Simd) -> int:
    """Vectors of the output, gaps included."""
    height, width = out_size(op)
    return int(-(-((height - 1) * (width + row_gap(op)) + width) // simd.lanes))


def row_gap(op: Convolution) -> int:
    """Columns between rows, as far as is known before all images are.

    A convolution of one pixel wants none. But its images have the rows of those that other layers
    read or make, and among these there is a padded window as good as always.
    """
    window = window_of(op)
    return max(window.reads.gap, _NEIGHBOURS_GAP if window.taps == 1 else 0)


def out_size(op: Convolution) -> tuple[int, int]:
    """Rows and columns of the output; typical ones of an image of unknown size."""
    typical = _TYPICAL_LENGTH if op.size[0] == 1 else _TYPICAL_SIZE
    height, width = op.typical(typical)
    rows, columns = window_of(op).out_size((height, width))
    return max(1, rows), max(1, columns)


def _read_bytes(op: Convolution, vectors: int, simd: Simd) -> float:
    """Bytes of the input that so many vectors of the output are computed from."""
    window: Window = window_of(op)
    (kernel_rows, _), pitch = window.kernel, out_size(op)[1] + window.reads.gap
    run = vectors * simd.lanes
    apart = kernel_rows * (run + LANES)
    together = run + (kernel_rows - 1) * window.dilation[0] * pitch + LANES
    elements = run if window.taps == 1 else min(apart, together)
    return float(4 * op.channels * op.frames.kernel * elements)
