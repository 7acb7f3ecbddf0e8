"""W X for few rows of activations, by the product that reads W as it is stored."""

from __future__ import annotations

from sparse_tvm.schedules.cpu.block_product import BlockProduct
from sparse_tvm.schedules.cpu.row_sums import RowProduct
from sparse_tvm.schedules.cpu.simd import Simd, most_sliced_rows
from sparse_tvm.schedules.cpu.sliced_product import SlicedProduct
from sparse_tvm.schedules.cpu.stored_weight import StoredWeight


def row_product(weight: StoredWeight, m: int, simd: Simd) -> RowProduct:
    """The product of a weight and ``m`` rows, with buffers of its own."""
    sliced = weight.sliced
    if sliced and (m <= most_sliced_rows(sliced.lanes) or weight.layout.format == "sell"):
        return SlicedProduct.allocate(weight, m, simd)
    return BlockProduct.allocate(weight, m, simd)
