"""Layers in blocks of 32x32 on Hopper's warpgroups, against NumPy on the emulated GPU."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_harness import SM90, run
from test_tensor_matmul import gelu, weight

from sparse_tvm.backends.cuda_codegen import compile_kernel, device_source
from sparse_tvm.families import Extents
from sparse_tvm.nvrtc import compile_source
from sparse_tvm.operators import Activation, Bias, Epilogue, Layout, Residual
from sparse_tvm.schedules.cuda.band_matmul import BandProblem, band_matmul
from sparse_tvm.schedules.cuda.band_tiles import TILES as BAND_TILES
from sparse_tvm.schedules.cuda.band_tiles import BandTile, band_seconds, tile_for, tile_of
from sparse_tvm.schedules.cuda.band_weights import band_arrays, choose_bands
from sparse_tvm.schedules.cuda.cost import tensor_seconds

pytestmark = pytest.mark.usefixtures("gpu")

BLOCKS = Layout("", "bsr", (32, 32))
TILES = [tile_of(2, 3, 2), tile_of(4, 3), tile_of(1, 6)]


def compare(
    tile: BandTile,
    m: int,
    n: int,
    k: int,
    epilogue: Epilogue = (),
    out: str = "float16",
    rows: int | None = None,
) -> None:
    rng = np.random.default_rng([m, n, k])
    w = weight(BLOCKS, n, k, rng)
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
        else:
            expected = np.maximum(expected, 0) if step.function == "relu" else gelu(expected)
    extras = tuple(
        Extents((n,) if array.ndim == 1 else (1, rows, n), str(array.dtype)) for array in operands
    )
    x_extents, y_extents = Extents((rows, k), "float16"), Extents((rows, n), out)
    problem = BandProblem(n, k, x_extents, extras, y_extents, tile, epilogue, 3)
    operands = [array if array.ndim == 1 else array[None] for array in operands]
    arrays = [x, *band_arrays(w, tile.height).values(), *operands]
    found = run(band_matmul(problem), arrays, np.empty((m, n), out), SM90)
    tolerance = 1.5e-3 if out == "float16" else 2e-5
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(found.astype(np.float64), expected, atol=tolerance * scale)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_more_tasks_than_thread_blocks(tile):
    compare(tile, 600, 328, 1032, (Bias(), Activation("gelu"), Residual()))


@pytest.mark.parametrize(("m", "n", "k"), [(5, 40, 72), (33, 200, 136), (130, 136, 2056)])
def test_odd_shapes(m, n, k):
    compare(TILES[0], m, n, k, rows=m)


@pytest.mark.parametrize("epilogue", [(), (Bias(), Activation("relu"), Residual())])
def test_outputs_in_float32(epilogue):
    compare(TILES[1], 70, 96, 128, epilogue, "float32")


def test_an_activation_behind_the_residual():
    compare(TILES[0], 70, 96, 128, (Bias(), Residual(), Activation("relu")))


def test_a_weight_of_zeros():
    arrays = [
        np.ones((3, 64), np.float16),
        *band_arrays(np.zeros((40, 64), np.float32), TILES[0].height).values(),
    ]
    x, y = Extents((3, 64), "float16"), Extents((3, 40), "float16")
    problem = BandProblem(40, 64, x, (), y, TILES[0], (), 132)
    found = run(band_matmul(problem), arrays, np.empty((3, 40), np.float16), SM90)
    np.testing.assert_array_equal(found, np.zeros((3, 40)))


def test_a_full_weight():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((200, 96)).astype(np.float16)
    x = rng.standard_normal((70, 96)).astype(np.float16)
    problem = BandProblem(
        200, 96, Extents((70, 96), "float16"), (), Extents((70, 200), "float16"), TILES[0], (), 132
    )
    arrays = [x, *band_arrays(w.astype(np.float32), TILES[0].height).values()]
    found = run(band_matmul(problem), arrays, np.empty((70, 200), np.float16), SM90)
    expected = x.astype(np.float32) @ w.astype(np.float32).T
    np.testing.assert_allclose(found.astype(np.float32), expected, atol=0.05)


def test_bands_share_columns_and_have_equally_much():
    rng = np.random.default_rng(0)
    alike = rng.random((4, 96)) < 0.1
    occupied = np.tile(alike, (6, 1))  # rows r and r + 4 are alike
    bands = choose_bands(occupied, 6)
    assert sorted(bands.ravel()) == list(range(24))
    columns = [int(occupied[band].any(axis=0).sum()) for band in bands]
    before = [int(occupied[first : first + 6].any(axis=0).sum()) for first in range(0, 24, 6)]
    assert sum(columns) < 0.75 * sum(before)


def test_blocks_pay_on_warpgroups_where_tokens_are_many():
    matrix, blocks, gpu = (768, 3072), 230, SM90.gpu
    few, many = (
        (
            band_seconds(matrix, blocks, tokens, gpu),
            tensor_seconds(matrix, BLOCKS, blocks, tokens, gpu),
        )
        for tokens in (16, 4096)
    )
    assert few[0] > few[1]
    assert many[0] < many[1]
    assert tile_for(matrix, 4096, gpu) in BAND_TILES


@pytest.mark.parametrize("tile", BAND_TILES, ids=str)
@pytest.mark.parametrize("epilogue", [(Bias(),), (Bias(), Activation("gelu"), Residual())])
def test_products_overlap_and_no_register_spills(tile, epilogue):
    x, y = Extents((4096, 3072), "float16"), Extents((4096, 768), "float16")
    extras = (Extents((768,), "float32"), y)[: sum(1 for step in epilogue if step.operand)]
    problem = BandProblem(768, 3072, x, extras, y, tile, epilogue, 132)
    source = device_source(compile_kernel(band_matmul(problem), SM90))
    log = compile_source(source, "sm_90a").log
    assert " 0 bytes spill stores" in log
    assert "serialized" not in log
