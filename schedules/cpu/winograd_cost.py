"""How Winograd's convolutions in planes are cut, and their predicted cycles."""

from __future__ import annotations

from sparse_tvm.operators import Convolution, Layout
from sparse_tvm.schedules.cpu.conv_cost import out_size
from sparse_tvm.schedules.cpu.cost import arrival_cycles
from sparse_tvm.schedules.cpu.image_operators import window_of
from sparse_tvm.schedules.cpu.simd import Simd
from sparse_tvm.schedules.cpu.winograd import OUTPUTS, TAPS, Bands
from sparse_tvm.sparsity.statistics import TYPICAL_COPIES
from sparse_tvm.targets import Target

_MOST_VECTORS = 4
_SECOND_CACHE_SHARE = 0.6
_DENSE_LOOP = 1.04


def outputs_of(op: Convolution) -> int:
    """Rows of a band with the fewest products; fewer rows round less."""
    height, _ = out_size(op)
    return min(OUTPUTS, key=lambda m: Bands(height, 1, m, 1).count * (m + TAPS - 1))


def blocking(op: Convolution, target: Target, outputs: int) -> tuple[int, dict[str, int]]:
    """Rows of a block of the weight, and the other parameters of a layout.

    Images whose size only run time knows are computed band by band.
    """
    simd, bands = Simd.of(target), _bands(op, target, outputs)
    sizes = [count for count in range(1, bands.count + 1) if bands.count % count == 0]
    band_bytes = 4 * bands.points * op.channels * bands.pitch
    room = _SECOND_CACHE_SHARE * target.caches.l2
    unit = max((size for size in sizes if size * band_bytes <= room), default=1)
    if (op.size[1] or 0) + window_of(op).reads.gap < bands.span:  # vectors reach into the next row
        unit = bands.count
    count, known = unit * bands.vectors, None not in op.size

    def per_load(block: tuple[int, int]) -> float:
        rows, vectors = block
        # Of groups that are not all full.
        spread = count / (-(-count // vectors)) if known else vectors
        fits = simd.fits(rows, vectors)
        return rows * spread / (rows + spread) if fits else 0.0

    blocks = [(r, v) for v in range(1, _MOST_VECTORS + 1) for r in range(1, 9)]
    rows, vectors = max(blocks, key=per_load)
    parameters = {"outputs": outputs, "vectors": vectors}
    return min(rows, op.out_channels), {**parameters, "bands": unit} if known else parameters


def winograd_seconds(
    op: Convolution, layout: Layout, pixels: int, target: Target, copies: float = TYPICAL_COPIES
) -> float:
    """Seconds for so many pixels of the output on one core."""
    costs = target.costs
    bands, rows = _bands(op, target, layout.get("outputs", 2)), layout.block[0]
    unit = layout.get("bands", bands.count)
    blocks, units = -(-op.out_channels // rows), bands.count // unit
    count = unit * bands.vectors
    groups = -(-count // layout.get("vectors", 1))
    vectors = count / groups
    weights = -(-rows // costs.scalars_per_load) * costs.load * costs.narrow
    step = max(rows * vectors * costs.fma, weights + vectors * costs.load) * _DENSE_LOOP
    steps = blocks * bands.points * op.channels * TAPS
    compute = units * groups * (steps * step + blocks * bands.points * costs.row)
    # Each point is a sum over all of a band's rows, and each row one over all points.
    combined = op.channels * bands.count * bands.read_vectors * bands.points**2
    combined += op.out_channels * bands.count * bands.vectors * bands.outputs * bands.points
    streamed = arrival_cycles(steps * 4 * rows, units, copies, target)
    height, width = out_size(op)
    cycles = compute + combined * costs.fma + streamed
    return target.seconds(cycles) * pixels / (height * width)


def _bands(op: Convolution, target: Target, outputs: int) -> Bands:
    height, width = out_size(op)
    return Bands(height, width, outputs, Simd.of(target).lanes)
