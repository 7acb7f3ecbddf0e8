"""Kernel families account for the work there is, and need no compiler to plan.

The work is counted here by doing it, with numbers that count how often they are multiplied.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from sparse_tvm.backends import get_backend
from sparse_tvm.backends.cpu import CpuBackend
from sparse_tvm.families import Extents, WeightedFamily, Work
from sparse_tvm.operators import (
    FLOAT32,
    PRECISIONS,
    Activation,
    Attention,
    Bias,
    Clamp,
    Convolution,
    Dense,
    LayerNorm,
    Layout,
    Product,
    Types,
)
from sparse_tvm.schedules.cpu.families.attention import AttentionFamily
from sparse_tvm.schedules.cpu.families.convolution import ConvolutionFamily, DepthwiseFamily
from sparse_tvm.schedules.cpu.families.matmul import MatmulFamily
from sparse_tvm.schedules.cpu.families.product import ProductFamily
from sparse_tvm.schedules.cpu.families.rows import LayerNormFamily
from sparse_tvm.schedules.cpu.families.winograd import WinogradFamily
from sparse_tvm.sparsity.masks import prune_array
from sparse_tvm.sparsity.pattern import Pattern
from sparse_tvm.sparsity.statistics import AssumedWeight, MeasuredWeight
from sparse_tvm.targets import TARGETS, get_target

V4 = get_target("x86-64-v4")
CPU = get_backend("cpu")


class Counted:
    """A number that counts multiplications instead of making them."""

    multiplied = 0

    def __mul__(self, other):
        Counted.multiplied += 1
        return self

    def __add__(self, other):
        return self


def numbers(*shape):
    return np.full(shape, Counted(), dtype=object)


def flops(compute):
    """Two for every multiplication that ``compute`` makes."""
    Counted.multiplied = 0
    compute()
    return 2 * Counted.multiplied


def test_numbers_count():
    assert flops(lambda: numbers(3, 5) @ numbers(5, 7)) == 2 * 3 * 5 * 7


def extents_of(array):
    return Extents(array.shape, str(array.dtype))


def tiles(lead, rows, features):
    return Extents((lead, -(-rows // 16), features, 16))


def weight(shape, sparsity=0.9, structure="4x1"):
    w = np.random.default_rng(0).standard_normal(shape).astype("float32")
    return prune_array(w, sparsity, structure)


def dense_work(w, layout, lead, rows):
    """Accounted work, and the arrays that a call reads or writes."""
    family, (n, k) = MatmulFamily(), w.shape
    op = Dense(layer="fc", matrix=w.shape, epilogue=(Bias(),), layout=layout)
    arrays = family.pack(op, w, layout, V4)
    x, y, bias = tiles(lead, rows, k), tiles(lead, rows, n), Extents((n,))
    operands = [x, *map(extents_of, arrays.values()), bias]
    return family.work(op, operands, y, np.count_nonzero(w)), arrays


FORMS = [
    Layout("matmul", "csr"),
    Layout("matmul", "bsr", (4, 1)),
    Layout("matmul", "bsr", (2, 1)).having(parts=3),
    Layout("matmul", "dense", (8, 1)),
]


@pytest.mark.parametrize("layout", FORMS, ids=lambda layout: layout.format)
def test_flops_of_a_layer_are_those_of_its_nonzeros(layout):
    w = weight((24, 40))
    work, _ = dense_work(w, layout, lead=2, rows=20)
    x = numbers(2 * 32, 40)  # twenty rows are two tiles, and whole tiles are computed
    assert work.flops == flops(lambda: [x[:, k] * Counted() for _, k in np.argwhere(w)])


@pytest.mark.parametrize("layout", FORMS, ids=lambda layout: layout.format)
def test_bytes_of_a_layer_are_those_of_its_arrays(layout):
    w = weight((24, 40))
    work, arrays = dense_work(w, layout, lead=2, rows=20)
    activations = 4 * 2 * 32 * (40 + 24)
    assert work.bytes == activations + 4 * 24 + sum(array.nbytes for array in arrays.values())


@pytest.mark.parametrize("layout", FORMS, ids=lambda layout: layout.format)
def test_near_loads_are_one_line_of_activations_for_each_column_of_a_block(layout):
    w = weight((24, 40))
    work, arrays = dense_work(w, layout, lead=2, rows=20)
    loads = 0
    if layout.sparse:
        filled = arrays["data"].any(axis=2)  # zeros that fill rows up to fours are no work
        loads = np.count_nonzero(filled) * 2 * 32
    assert work.near_bytes == 4 * loads


def test_layer_without_known_nonzeros_has_all_of_them():
    layout = Layout("matmul", "dense", (8, 1))
    op = Dense(layer="fc", matrix=(24, 40), layout=layout)
    operands = [tiles(1, 16, 40), Extents((3, 40, 8))]
    work = MatmulFamily().work(op, operands, tiles(1, 16, 24))
    assert work.flops == flops(lambda: numbers(16, 40) @ numbers(40, 24))


@pytest.mark.parametrize(("queries", "keys"), [(16, 16), (20, 40)])
def test_flops_of_attention(queries, keys):
    batch, heads, size, value_size = 2, 3, 5, 7
    op = Attention(heads=heads, scale=1.0)
    q, k = tiles(batch, queries, heads * size), tiles(batch, keys, heads * size)
    v, y = (tiles(batch, rows, heads * value_size) for rows in (keys, queries))
    work = AttentionFamily().work(op, [q, k, v, Extents((keys,), "int64", numbers=True)], y)

    def compute():
        rows, columns = -(-queries // 16) * 16, -(-keys // 16) * 16
        scores = numbers(batch, heads, rows, size) @ numbers(batch, heads, size, columns)
        return scores @ numbers(batch, heads, columns, value_size)

    assert work.flops == flops(compute)
    assert work.near_bytes == 0
    assert work.bytes == 4 * sum(np.prod(operand.shape) for operand in (q, k, v, y))


@pytest.mark.parametrize(
    ("a", "left", "b", "right"),
    [
        ((2, 4, 5, 6), (0, 1, 2, 3), (2, 4, 6, 7), (0, 1, 2, 3)),
        ((2, 5, 4, 6), (0, 2, 1, 3), (2, 7, 4, 6), (0, 2, 3, 1)),
        ((6, 5), (1, 0), (6, 7), (0, 1)),
    ],
)
def test_flops_of_a_product(a, left, b, right):
    op = Product(left=left, right=right)
    product = numbers(*a).transpose(left) @ numbers(*b).transpose(right)
    work = ProductFamily().work(op, [Extents(a), Extents(b)], Extents(product.shape))
    assert work.flops == flops(lambda: numbers(*a).transpose(left) @ numbers(*b).transpose(right))
    assert work.bytes == 4 * (np.prod(a) + np.prod(b) + product.size)
    assert work.near_bytes == 0


def convolution(channels, out_channels, groups=1, size=(9, 8)):
    return Convolution(
        layer="conv",
        matrix=(out_channels, channels // groups * 6),
        channels=channels,
        out_channels=out_channels,
        size=size,
        kernel=(3, 2),
        stride=(2, 1),
        dilation=(1, 1),
        pads=(0, 0, 0, 0),
        groups=groups,
    )


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_flops_of_a_convolution(groups):
    op = convolution(4, 8, groups)
    depthwise = groups == 4
    family = DepthwiseFamily() if depthwise else ConvolutionFamily()
    op = replace(op, layout=Layout(family.name, "dense" if depthwise else "csr"))
    w = weight(op.matrix, 0.5, "unstructured")
    x, y = Extents((2, 4, 9, 8)), Extents((2, 8, 4, 7))
    work = family.work(op, [x], y, np.count_nonzero(w))
    image = numbers(2, 4, 9, 8)

    def compute():
        kernel = w.reshape(8, 4 // groups, 3, 2)
        for out, channel, row, column in np.argwhere(kernel):
            source = channel + out // (8 // groups) * (4 // groups)
            image[:, source, row : row + 7 : 2, column : column + 7] * Counted()

    assert work.flops == flops(compute)


def test_flops_of_a_convolution_of_any_size_are_those_of_whole_planes():
    op = convolution(4, 8, size=(None, None))
    op = replace(op, layout=Layout("convolution", "csr"))
    assert ConvolutionFamily().work(op, [], Extents((2, 8, 50)), 7).flops == 2 * 7 * 50 * 2


@pytest.mark.parametrize("outputs", [2, 4])
def test_winograd_computes_more_rows_than_a_band_has(outputs):
    known = Convolution(
        layer="conv",
        matrix=(16, 32 * 9),
        channels=32,
        out_channels=16,
        size=(8, 10),
        kernel=(3, 3),
        stride=(1, 1),
        dilation=(1, 1),
        pads=(1, 1, 1, 1),
        layout=Layout("winograd_convolution", "dense").having(outputs=outputs),
    )
    products = (outputs + 2) / outputs * 8 * 10 * 16 * 32 * 3
    for op in (known, replace(known, size=(None, None))):
        assert WinogradFamily().work(op, [], Extents((2, 16, 80))).flops == 2 * 2 * products


def test_layer_norm_only_moves_bytes():
    x = tiles(2, 20, 40)
    work = LayerNormFamily().work(LayerNorm(epsilon=1e-5), [x, Extents((40,)), Extents((40,))], x)
    assert work == Work(bytes=4.0 * (2 * 2 * 32 * 40 + 2 * 40))


REFUSED = {
    "int8 weights": Dense(layer="fc", matrix=(8, 8), types=Types(weight="int8")),
    "bounds": Dense(layer="fc", matrix=(8, 8), epilogue=(Clamp(0.0, 6.0),)),
    "bfloat16 attention": Attention(heads=1, scale=1.0, types=Types(input="bfloat16")),
    "dot products": Product(left=(0, 1), right=(1, 0), rows=1),
    "volumes": replace(convolution(4, 8), size=(4, 4, 4)),
    "float16 layer norm": LayerNorm(epsilon=1e-5, types=Types(output="float16")),
}


@pytest.mark.parametrize("op", REFUSED.values(), ids=REFUSED.keys())
def test_what_no_family_computes_is_refused_with_a_reason(op):
    assert CPU.refuses(op, V4)
    assert CPU.accepting(op, V4) == []
    with pytest.raises(ValueError, match=re.escape(str(CPU.refuses(op, V4)))):
        CPU.family_for(op, V4)


def test_accepted_operators_have_a_family():
    accepted = {
        "matmul": Dense(layer="fc", matrix=(8, 8), epilogue=(Bias(), Activation("gelu"))),
        "convolution": convolution(4, 8),
        "depthwise_convolution": convolution(4, 8, groups=4),
        "attention": Attention(heads=1, scale=1.0),
        "product": Product(left=(0, 1), right=(0, 1)),
        "layer_norm": LayerNorm(epsilon=1e-5),
    }
    for name, op in accepted.items():
        assert op.types == FLOAT32
        assert CPU.refuses(op, V4) is None
        assert CPU.family_for(op, V4).name == name


def test_family_that_packed_a_weight_builds_its_kernel():
    backend = CpuBackend()
    layout = Layout("matmul", "csr")
    op = Dense(layer="fc", matrix=(8, 8), layout=layout)
    assert backend.family_for(op, V4) is backend.weighted_family(layout)
    with pytest.raises(KeyError):
        backend.family_for(replace(op, layout=Layout("no such", "csr")), V4)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
@pytest.mark.parametrize(
    "op",
    [Dense(layer="fc", matrix=(64, 96)), convolution(16, 64), convolution(64, 64, groups=64)],
    ids=["dense", "convolution", "depthwise"],
)
def test_candidates_are_distinct_and_priced(op, target):
    weights = [
        MeasuredWeight(weight(op.matrix, 0.9, "unstructured")),
        AssumedWeight(op.matrix, 0.9, (4, 1)),
    ]
    families = CPU.accepting(op, target)
    assert families
    for family, known in product(families, weights):
        assert isinstance(family, WeightedFamily)
        candidates = family.candidates(op, known, target)
        assert len(set(candidates)) == len(candidates)
        assert any(not layout.sparse for layout in candidates)
        assert {layout.family for layout in candidates} == {family.name}
        for layout in candidates:
            few, many = (family.cost(op, layout, known, tokens, target) for tokens in (16, 256))
            assert 0 < few < many < 1


@pytest.mark.parametrize("shape", [(768, 3072), (3072, 768)])
@pytest.mark.parametrize(
    ("structure", "sparsity", "tokens", "expected"),
    [
        ("unstructured", 0.7, 128, "dense"),
        ("unstructured", 0.7, 1024, "dense"),
        ("unstructured", 0.9, 16, "csr"),
        ("unstructured", 0.9, 1024, "csr"),
        ("4x4", 0.9, 128, "bsr"),
    ],
)
def test_int8_is_predicted_fastest_on_avx2_where_it_was_measured(
    shape, structure, sparsity, tokens, expected
):
    """On a Zen 3: see ``scripts/bench_choices.py``."""
    target, family = get_target("x86-64-v3"), CPU.family("dot")
    known = MeasuredWeight(weight(shape, sparsity, structure))
    op = Dense(layer="fc", matrix=shape, types=PRECISIONS["int8"])
    candidates = family.candidates(op, known, target)
    best = min(candidates, key=lambda each: family.cost(op, each, known, tokens, target))
    assert best.format == expected
    assert expected != "bsr" or best.block in ((2, 4), (4, 4))


@pytest.mark.parametrize(
    ("shape", "sparsity", "beside"),
    [((256, 256), 0.7, True), ((256, 256), 0.95, True), ((3072, 768), 0.9, False)],
)
def test_sliced_rows_lie_beside_csr_where_one_token_is_much_faster_so(shape, sparsity, beside):
    """In the second cache; a longer stream would only be longer."""
    target, family = get_target("x86-64-v3"), CPU.family("matmul")
    known = MeasuredWeight(weight(shape, sparsity, "unstructured"))
    op = Dense(layer="fc", matrix=shape)
    both = [layout for layout in family.candidates(op, known, target) if layout.get("sell", 0)]
    assert bool(both) == beside
    for layout in both:
        alone = replace(layout, parameters=tuple(p for p in layout.parameters if p[0] != "sell"))
        one, many = (
            [family.cost(op, each, known, tokens, target) for each in (layout, alone)]
            for tokens in (1, 4)
        )
        assert one[0] * 1.2 < one[1]
        assert many[0] == many[1]
        arrays = family.pack(op, weight(shape, sparsity, "unstructured"), layout, target)
        extra = sum(array.nbytes for name, array in arrays.items() if "slice" in name)
        assert f"for up to 2 tokens, {extra / 1e3:.0f} kB" in family.second_form(layout, arrays)
        assert family.second_form(alone, arrays) is None
    no_vpermps = get_target("cortex-a76")
    assert not any(one.get("sell", 0) for one in family.candidates(op, known, no_vpermps))


PLAN = """
import sys
from sparse_tvm.backends import backends
from sparse_tvm.operators import Attention, Convolution, Dense
from sparse_tvm.families import Extents, WeightedFamily
from sparse_tvm.passes.formats import FormatOptions
from sparse_tvm.passes.layout_choice import choose
from sparse_tvm.sparsity.statistics import AssumedWeight

dense = Dense(layer="fc", matrix=(768, 768))
image = Convolution(
    layer="conv", matrix=(64, 576), channels=64, out_channels=64, size=(14, 14),
    kernel=(3, 3), stride=(1, 1), dilation=(1, 1), pads=(1, 1, 1, 1),
)
cpu = backends()["cpu"]
for target in cpu.targets:
    for op in (dense, image):
        choice = choose(op, AssumedWeight(op.matrix, 0.95), FormatOptions(), cpu, target)
        assert choice.layout.sparse and 0 < choice.seconds < choice.dense_seconds
x = Extents((1, 8, 768, 16))
work = cpu.family("attention").work(Attention(heads=12, scale=1.0), [x, x, x], x)
assert work.flops > 0
print("tvm" in sys.modules)
"""


def test_planning_needs_no_compiler():
    ended = subprocess.run([sys.executable, "-c", PLAN], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["False"]


@pytest.mark.parametrize("copies", [1.3, 144])
def test_sliced_rows_stay_where_weights_come_from_memory(copies):
    """Zen 4: rows of single weights are what memory is slowest beside."""
    target, family, shape = get_target("znver4"), CPU.family("matmul"), (768, 768)
    known = MeasuredWeight(weight(shape, 0.8, "unstructured"), copies)
    op = Dense(layer="fc", matrix=shape)
    found = family.candidates(op, known, target)
    best = min(found, key=lambda layout: family.cost(op, layout, known, 1, target))
    assert best.get("sell", 0)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", [CPU, get_backend("cuda")], ids=["cpu", "cuda"])
def test_structures_that_a_family_names_are_among_its_layouts(backend, precision):
    for target in backend.targets:
        op, refusal = backend.in_precision(Dense(layer="", matrix=(256, 256)), precision, target)
        families = [] if refusal else backend.accepting(op, target)
        for family in families:
            for structure in family.structures(op, target):
                block = Pattern.parse(structure).block
                found = family.candidates(op, AssumedWeight(op.matrix, 0.9, block), target)
                stored = {"unstructured" if one.format == "csr" else one.block for one in found}
                skipped = structure if structure == "unstructured" else block
                assert skipped in stored, f"{family.name} skips no {structure} on {target.name}"
