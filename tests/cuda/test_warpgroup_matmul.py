"""Dense layers on Hopper's warpgroups: every layout and tile, against NumPy on the emulated GPU."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_harness import SM90, run
from test_tensor_matmul import gelu, weight

from sparse_tvm.families import Extents
from sparse_tvm.operators import Activation, Bias, Epilogue, Layout, Residual
from sparse_tvm.schedules.cuda.warpgroup_matmul import Problem, warpgroup_matmul
from sparse_tvm.schedules.cuda.warpgroup_tiles import WarpgroupTile, tiles
from sparse_tvm.schedules.cuda.warpgroup_weights import swizzled, warpgroup_arrays

pytestmark = pytest.mark.usefixtures("gpu")

DENSE, BLOCKS = Layout("", "dense"), Layout("", "bsr", (64, 64))
TWO_OF_FOUR = Layout("", "2:4", (1, 4))
CASES = [
    pytest.param(layout, tile, id=f"{layout.format} {tile.rows}x{tile.tokens}")
    for layout in (DENSE, TWO_OF_FOUR, BLOCKS)
    for tile in tiles(layout)
]


def compare(
    layout: Layout,
    tile: WarpgroupTile,
    m: int,
    n: int,
    k: int,
    epilogue: Epilogue = (),
    out: str = "float16",
    rows: int | None = None,
) -> None:
    rng = np.random.default_rng([m, n, k])
    w = weight(layout, n, k, rng)
    x = rng.standard_normal((m, k)).astype(np.float16)
    bias = rng.standard_normal(n).astype(np.float32)
    residual = rng.standard_normal((m, n)).astype(np.float16)
    expected = x.astype(np.float64) @ w.astype(np.float16).astype(np.float64).T
    operands = []
    for step in epilogue:
        if isinstance(step, Bias):
            operands.append(bias)
            expected = expected + bias
        elif isinstance(step, Residual):
            operands.append(residual)
            expected = expected + residual
        elif step.function == "relu":
            expected = np.maximum(expected, 0)
        else:
            expected = gelu(expected)
    extras = tuple(
        Extents((n,) if array.ndim == 1 else (1, rows, n), str(array.dtype)) for array in operands
    )
    problem = Problem(
        n,
        k,
        Extents((rows, k), "float16"),
        extras,
        Extents((rows, n), out),
        layout,
        tile,
        epilogue,
        3,
    )
    operands = [array if array.ndim == 1 else array[None] for array in operands]
    arrays = [x, *warpgroup_arrays(w, layout).values(), *operands]
    found = run(warpgroup_matmul(problem), arrays, np.empty((m, n), out), SM90)
    tolerance = 1.5e-3 if out == "float16" else 2e-5
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(found.astype(np.float64), expected, atol=tolerance * scale)


@pytest.mark.parametrize(("layout", "tile"), CASES)
def test_more_tiles_than_thread_blocks(layout, tile):
    compare(layout, tile, 300, 328, 200, (Bias(), Activation("gelu"), Residual()))


@pytest.mark.parametrize("layout", [DENSE, TWO_OF_FOUR, BLOCKS], ids=lambda v: v.format)
def test_more_tiles_stored_as_boxes(layout):
    compare(layout, tiles(layout)[-1], 700, 200, 136, (Bias(), Activation("gelu")))


@pytest.mark.parametrize("layout", [DENSE, TWO_OF_FOUR, BLOCKS], ids=lambda v: v.format)
@pytest.mark.parametrize(("m", "n", "k"), [(5, 40, 72), (33, 200, 136), (130, 136, 1032)])
def test_odd_shapes(layout, m, n, k):
    compare(layout, tiles(layout)[1], m, n, k, rows=m)


@pytest.mark.parametrize("layout", [DENSE, TWO_OF_FOUR, BLOCKS], ids=lambda v: v.format)
@pytest.mark.parametrize("epilogue", [(), (Bias(), Activation("relu"), Residual())])
def test_outputs_in_float32(layout, epilogue):
    compare(layout, tiles(layout)[0], 70, 96, 128, epilogue, "float32")


def test_an_activation_behind_the_residual():
    compare(DENSE, tiles(DENSE)[0], 70, 96, 128, (Bias(), Residual(), Activation("relu")))


def test_rows_without_blocks():
    w = np.zeros((192, 128), np.float32)
    w[70, 100] = 1
    arrays = warpgroup_arrays(w, BLOCKS)
    np.testing.assert_array_equal(arrays["columns"], [0, 64, 0])
    np.testing.assert_array_equal(arrays["indptr"], [0, 1, 2, 3])
    assert not arrays["data"][[0, 2]].any()


def test_a_weight_of_zeros():
    tile = tiles(BLOCKS)[0]
    x = np.ones((3, 64), np.float16)
    arrays = [x, *warpgroup_arrays(np.zeros((40, 64), np.float32), BLOCKS).values()]
    x_extents, y_extents = Extents((3, 64), "float16"), Extents((3, 40), "float16")
    problem = Problem(40, 64, x_extents, (), y_extents, BLOCKS, tile, (), 132)
    found = run(warpgroup_matmul(problem), arrays, np.empty((3, 40), np.float16), SM90)
    np.testing.assert_array_equal(found, np.zeros((3, 40)))


def test_sums_beyond_float16_saturate():
    x, w = np.full((2, 64), 200, np.float16), np.full((64, 64), 200, np.float32)
    x_extents, y_extents = Extents((2, 64), "float16"), Extents((2, 64), "float16")
    problem = Problem(64, 64, x_extents, (), y_extents, DENSE, tiles(DENSE)[0], (), 132)
    arrays = [x, *warpgroup_arrays(w, DENSE).values()]
    found = run(warpgroup_matmul(problem), arrays, np.empty((2, 64), np.float16), SM90)
    np.testing.assert_array_equal(found, np.full((2, 64), 65504, np.float16))


@pytest.mark.parametrize(("columns", "mask"), [(64, 7), (32, 3)])
def test_chunks_are_swizzled_by_row(columns, mask):
    tile = np.arange(64 * columns, dtype=np.float16).reshape(64, columns)
    found = swizzled(tile).view(np.float16).reshape(64, columns // 8, 8)
    for row in (0, 1, 2, 5, 63):
        turn = (row if columns == 64 else row // 2) & mask
        for chunk in range(columns // 8):
            expected = tile[row, chunk * 8 : chunk * 8 + 8]
            np.testing.assert_array_equal(found[row, chunk ^ turn], expected)
