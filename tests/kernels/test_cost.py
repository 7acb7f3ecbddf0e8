"""The cost model's sense, on every target: what it may never conclude from any parameters."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np
import pytest

from sparse_tvm.backends import get_backend
from sparse_tvm.operators import PRECISIONS, Convolution, Dense, Layout, Types
from sparse_tvm.passes.formats import FormatOptions
from sparse_tvm.passes.layout_choice import choose
from sparse_tvm.schedules.cpu.conv_cost import blocking, grouped_rows, plane_vectors
from sparse_tvm.schedules.cpu.cost import dense_rows, matmul_cycles, matmul_seconds, part_counts
from sparse_tvm.schedules.cpu.families.matmul import MatmulFamily
from sparse_tvm.schedules.cpu.row_cost import asks_from
from sparse_tvm.schedules.cpu.simd import Simd
from sparse_tvm.sparsity.masks import prune_array
from sparse_tvm.sparsity.statistics import MeasuredWeight
from sparse_tvm.targets import TARGETS, Caches

EVERY_TARGET = pytest.mark.parametrize(
    "target", TARGETS.values(), ids=[target.name for target in TARGETS.values()]
)
SHAPES = pytest.mark.parametrize("shape", [(768, 768), (3072, 768), (768, 3072)])
SPARSE = [
    Layout("matmul", "csr", (1, 1)),
    *(Layout("matmul", "bsr", (n, 1)) for n in (2, 4, 8, 16)),
]


def weight(shape, sparsity, structure):
    w = np.random.default_rng(0).standard_normal(shape).astype("float32")
    return prune_array(w, sparsity, structure) if sparsity else w


def chosen(w, target, precision="fp32"):
    op, _ = get_backend("cpu").in_precision(Dense(layer="layer", matrix=w.shape), precision, target)
    return choose(op, MeasuredWeight(w), FormatOptions(), get_backend("cpu"), target)


def blocks_of(shape, layout, density=0.1):
    return int(density * shape[0] * shape[1] / layout.block[0])


@EVERY_TARGET
@SHAPES
@pytest.mark.parametrize("layout", SPARSE, ids=str)
def test_a_smaller_or_slower_cache_never_helps(target, shape, layout):
    def cycles(target):
        return matmul_cycles(shape, layout, blocks_of(shape, layout), target)

    assert target.costs.l2_line > 0
    smaller = replace(target, caches=replace(target.caches, l1=target.caches.l1 // 2))
    slower = replace(target, costs=replace(target.costs, l2_line=2 * target.costs.l2_line))
    assert cycles(smaller) >= cycles(target)
    assert cycles(slower) >= cycles(target)


@EVERY_TARGET
def test_parts_pay_where_the_second_cache_is_far(target):
    shape, layout = (4096, 4096), Layout("matmul", "csr", (1, 1))
    blocks = blocks_of(shape, layout)
    target = replace(target, costs=replace(target.costs, l2_line=20.0))
    whole, *split = (
        matmul_cycles(shape, layout.having(parts=parts), blocks, target)
        for parts in part_counts(shape[1], layout, target)
    )
    assert min(split) < whole


@EVERY_TARGET
@SHAPES
def test_dense_with_one_zero_stays_dense(target, shape):
    w = weight(shape, 0, "")
    w[3, 5] = 0
    assert chosen(w, target).layout.format == "dense"


@EVERY_TARGET
@SHAPES
@pytest.mark.parametrize("sparsity", [0.8, 0.9, 0.95])
def test_4x1_stays_in_blocks(target, shape, sparsity):
    layout = chosen(weight(shape, sparsity, "4x1"), target).layout
    if target.name == "x86-64-v2":  # eight sums in sixteen registers: single rows are as fast
        assert layout.block in [(1, 1), (2, 1), (4, 1)]
        return
    assert layout.format == "bsr"
    assert layout.block in [(2, 1), (4, 1)]  # no zeros are stored


@EVERY_TARGET
@SHAPES
def test_unstructured_95_percent_is_sparse(target, shape):
    assert chosen(weight(shape, 0.95, "unstructured"), target).layout.format == "csr"


@EVERY_TARGET
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_no_choice_in_low_precision_is_predicted_slower_than_dense(target, precision):
    shape = (768, 768)
    op = Dense(layer="layer", matrix=shape, types=PRECISIONS[precision])
    if get_backend("cpu").refuses(op, target):
        pytest.skip(f"{target.name} has no kernels for {precision}")
    dense = chosen(weight(shape, 0, None), target)
    for structure in ("unstructured", "4x2", "4x4"):
        for sparsity in (0.0, 0.5, 0.9):
            choice = chosen(weight(shape, sparsity, structure), target, precision)
            assert choice.seconds <= choice.dense_seconds <= dense.seconds
            assert choice.layout.sparse or sparsity < 0.9


@EVERY_TARGET
@pytest.mark.parametrize("structure", ["4x1", "unstructured"])
@pytest.mark.parametrize(("filled", "rows"), [(0.01, 0), (0.9, 4), (9, 1)])
def test_the_farther_a_sparse_weight_the_fewer_rows_ask_for_it(target, structure, filled, rows):
    w = weight((768, 768), 0.9, structure)
    family, op = MatmulFamily(), Dense(layer="layer", matrix=w.shape)
    measured = MeasuredWeight(w)
    for found in family.candidates(op, measured, target):
        stored = measured.stored_blocks(found.block) * (4 * prod(found.block) + 2)
        copies = filled / target.caches.filled(stored)
        layout = found.having(ask=0)
        asks = asks_from(w.shape, layout, measured.stored_blocks(found.block), target, copies)
        single = found.block == (1, 1) and copies * stored > target.caches.l2
        if not (target.foresees and found.sparse):
            assert asks == 0
        elif single and filled < 1:  # which lose nothing by it, unless slices serve few rows
            assert asks == (min(5, rows or 5) if found.get("sell", 0) else 1)
        else:
            assert asks == rows


@EVERY_TARGET
def test_weights_of_16_bits_are_sparse_where_float32_is_and_no_slower_for_it(target):
    shape = (768, 768)
    for dtype in ("float16", "bfloat16"):
        op = Dense(layer="layer", matrix=shape, types=Types(weight=dtype))
        if get_backend("cpu").refuses(op, target):
            assert (dtype, target.name) == ("float16", "x86-64-v2")
            continue
        for structure in ("unstructured", "4x1", "16x1"):
            w = MeasuredWeight(weight(shape, 0.9, structure))
            choice = choose(op, w, FormatOptions(), get_backend("cpu"), target)
            assert choice.layout.sparse
            assert choice.layout.get(dtype, 0)
            assert choice.seconds <= choice.dense_seconds


@EVERY_TARGET
def test_more_tokens_take_longer(target):
    shape, layout = (768, 768), Layout("matmul", "csr", (1, 1))
    blocks = blocks_of(shape, layout)
    seconds = [
        matmul_seconds(shape, layout, blocks, target, tokens) for tokens in (1, 16, 64, 128, 512)
    ]
    assert seconds == sorted(seconds)
    assert seconds[0] == seconds[1]  # one tile
    cycles = matmul_cycles(shape, layout, blocks, target, 16)
    assert seconds[1] == pytest.approx(cycles / (target.costs.ghz * 1e9))


@EVERY_TARGET
def test_few_tokens_leave_registers_for_more_rows(target):
    simd = Simd.of(target)
    few, many = dense_rows(1024, simd, 16), dense_rows(1024, simd, 128)
    assert few >= many
    assert few * simd.per_tile <= simd.accumulators


def signal(groups, kernel, stride=1, channels=768):
    """A convolution over a signal of unknown length."""
    return Convolution(
        layer="layer",
        matrix=(channels, channels // groups * kernel),
        channels=channels,
        out_channels=channels,
        size=(1, None),
        kernel=(1, kernel),
        stride=(1, stride),
        dilation=(1, 1),
        pads=(0, 0, 0, 0),
        groups=groups,
    )


@EVERY_TARGET
@pytest.mark.parametrize("groups", [16, 48, 64, 256])
def test_rows_of_a_grouped_block_divide_a_group(groups, target):
    assert 768 // groups % grouped_rows(signal(groups, 128), target) == 0


def test_a_group_is_multiplied_in_the_block_with_the_most_products_per_load():
    """Eight rows would leave sixteen registers one vector of pixels."""
    assert grouped_rows(signal(16, 128), TARGETS["x86-64-v3"]) == 4


def test_a_signal_of_unknown_length_does_not_pass_each_row_of_the_weight_whole():
    parameters = blocking(signal(1, 3, 2, 512), "dense", 4, TARGETS["x86-64-v3"])
    assert "rows_outermost" not in parameters
    assert parameters["packed"] == 1


def pointwise(channels, out_channels, size):
    """A convolution of one pixel."""
    return Convolution(
        layer="layer",
        matrix=(out_channels, channels),
        channels=channels,
        out_channels=out_channels,
        size=(size, size),
        kernel=(1, 1),
        stride=(1, 1),
        dilation=(1, 1),
        pads=(0, 0, 0, 0),
    )


@pytest.mark.parametrize(
    ("op", "target", "filled"),
    [
        (pointwise(256, 1024, 14), "x86-64-v4", True),
        (pointwise(96, 576, 14), "x86-64-v4", False),  # short rows
        (pointwise(384, 64, 14), "x86-64-v4", False),  # few outputs
        (pointwise(512, 2048, 7), "x86-64-v4", False),  # few pixels
        (pointwise(256, 1024, 14), "x86-64-v3", False),
        (pointwise(256, 1024, 14), "neoverse-v1", False),
    ],
)
def test_long_rows_of_single_weights_are_filled_for_half_as_many_pixels(op, target, filled):
    parameters = blocking(op, "csr", 1, TARGETS[target])
    assert ("filled" in parameters) == filled
    if filled:
        assert parameters["vectors"] == 4


@pytest.mark.parametrize(
    ("op", "family", "rows"),
    [
        (pointwise(96, 576, 14), "channel_lanes_convolution", 32),
        (pointwise(32, 192, 28), "convolution", 6),  # transposing costs more than gaps
        (pointwise(256, 64, 56), "convolution", 6),  # each 16 rows would read 3 MB anew
    ],
)
def test_channels_are_in_lanes_where_gaps_cost_more_than_transposing(op, family, rows):
    w = weight(op.matrix, 0, "")
    target, backend = TARGETS["avx512-bf16"], get_backend("cpu")
    layout = choose(op, MeasuredWeight(w), FormatOptions(), backend, target, [prod(op.size)]).layout
    assert (layout.family, layout.block) == (family, (rows, 1))


def test_images_of_a_convolution_of_one_pixel_have_the_gaps_of_its_neighbours():
    simd = Simd.of(TARGETS["x86-64-v4"])
    assert plane_vectors(pointwise(96, 576, 14), simd) == 14
    assert plane_vectors(signal(1, 1), simd) == 1024 // simd.lanes


@EVERY_TARGET
@pytest.mark.parametrize("tokens", [1, 128])
def test_a_weight_that_others_push_out_of_the_caches_takes_longer(target, tokens):
    w = weight((768, 3072), 0.9, "4x1")
    op, layout = Dense(layer="layer", matrix=w.shape), Layout("matmul", "bsr", (4, 1))
    family = get_backend("cpu").family("matmul")
    cached, pushed_out = (
        family.cost(op, layout, MeasuredWeight(w, copies), tokens, target) for copies in (0.1, 1000)
    )
    assert cached < pushed_out


def test_caches_share_what_is_read_in_turns():
    caches = Caches(l1=32 << 10, l2=1 << 20, l3=2 << 20)
    shares = [caches.shares(nbytes) for nbytes in (0, 1 << 20, 4 << 20, 16 << 20, 64 << 20)]
    assert shares[0] == (1, 0, 0)
    assert shares[1] == pytest.approx((1, 0, 0), abs=0.01)
    assert shares[2] == pytest.approx((1 / 4, 3 / 4, 0), abs=0.02)
    assert shares[3] == pytest.approx((1 / 16, 0.77, 0.17), abs=0.01)
    assert shares[4] == (0, 0, 1)
    assert all(sum(one) == pytest.approx(1) for one in shares)


@EVERY_TARGET
def test_loads_and_products_take_as_long_as_the_longer_or_up_to_both(target):
    for loads, products in ((1.0, 3.0), (3.0, 1.0), (2.0, 2.0), (0.0, 1.0)):
        assert max(loads, products) <= target.beside(loads, products) <= loads + products


@EVERY_TARGET
def test_what_is_read_at_random_only_slows_memory_down(target):
    cycles = [target.memory_cycles(x_bytes) for x_bytes in (0, target.caches.l1, 1 << 30)]
    assert cycles == sorted(cycles)
    assert cycles[0] == 1 / target.costs.memory
