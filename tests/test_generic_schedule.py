"""The schedule for operators without a kernel: any extents, symbolic ones included."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tvm
from tvm import relax, tirx

from sparse_tvm.backends import get_backend
from sparse_tvm.passes.infrastructure import Context
from sparse_tvm.passes.pipeline import phases
from sparse_tvm.passes.program import Program
from sparse_tvm.targets import TARGETS, get_target, runs_here

HOST = get_target()
RUNNABLE = [target for target in TARGETS.values() if runs_here(target)]


def compile_function(build, *shapes, target=HOST):
    """Compile ``build(*inputs)`` for inputs whose extents are numbers or names of symbols."""
    symbols: dict[str, tirx.Var] = {}

    def dim(extent):
        is_name = isinstance(extent, str)
        return symbols.setdefault(extent, tirx.Var(extent, "int64")) if is_name else extent

    inputs = [
        relax.Var(f"x{i}", relax.TensorType([dim(d) for d in shape], "float32"))
        for i, shape in enumerate(shapes)
    ]
    builder = relax.BlockBuilder()
    with builder.function("main", inputs, {"num_input": len(inputs)}):
        with builder.dataflow():
            result = builder.emit_output(builder.emit(build(*inputs)))
        builder.emit_func_output(result)
    program = Program(builder.finalize(), {}, {})
    context = Context(get_backend("cpu"), target)
    for phase in phases(context.backend):
        program = phase.run(program, context)
    assert not program.notes
    library = context.backend.generate(program, target)
    machine = relax.VirtualMachine(library, tvm.cpu())
    weights = tuple(map(tvm.runtime.tensor, program.weights.values()))
    return lambda *arrays: machine["main"](*map(tvm.runtime.tensor, arrays), weights).numpy()


def normal(*shape):
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


CASES = {
    "soft-max": (lambda x: relax.op.nn.softmax(x, -1), lambda x: softmax(x, -1)),
    "soft-max of another axis": (lambda x: relax.op.nn.softmax(x, 1), lambda x: softmax(x, 1)),
    "mean": (lambda x: relax.op.mean(x, [-1]), lambda x: x.mean(-1)),
    "maximum over all": (relax.op.max, lambda x: x.max()),
    "sum of rows": (lambda x: relax.op.sum(x, [1]), lambda x: x.sum(1)),
    "transpose": (
        lambda x: relax.op.permute_dims(x, [2, 0, 1]),
        lambda x: x.transpose(2, 0, 1),
    ),
    "pointwise": (lambda x: relax.op.tanh(relax.op.add(x, x)), lambda x: np.tanh(x + x)),
}


@pytest.mark.parametrize("shape", [("a", "b", "c"), ("a", "b", 37), (2, "b", 64)])
@pytest.mark.parametrize(("build", "expected"), CASES.values(), ids=CASES.keys())
def test_symbolic_extents(build, expected, shape):
    run = compile_function(build, shape)
    for sizes in ((2, 3, 5), (2, 1, 1), (2, 40, 129)):
        fixed = [s if isinstance(d, str) else d for d, s in zip(shape, sizes, strict=True)]
        x = normal(*fixed)
        np.testing.assert_allclose(run(x), expected(x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dims", [("m", "k", "n"), ("m", 24, 40), (5, "k", "n"), (19, 8, "n")])
def test_matmul_of_symbolic_extents(dims):
    m, k, n = dims
    run = compile_function(
        lambda a, b: relax.op.matmul(a, relax.op.permute_dims(b, [0, 2, 1])),
        ("batch", m, k),
        ("batch", n, k),
    )
    for batch, *sizes in ((1, 1, 1, 1), (3, 7, 33, 65), (2, 100, 16, 130)):
        rows, inner, columns = (
            s if isinstance(d, str) else d for d, s in zip(dims, sizes, strict=True)
        )
        a, b = normal(batch, rows, inner), normal(batch, columns, inner)
        np.testing.assert_allclose(run(a, b), a @ b.transpose(0, 2, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("extent", [1, 3, 4, 7, 8, 15, 16, 17, 31, 64, 65, 127])
def test_every_extent(extent):
    x = normal(6, extent)
    run = compile_function(lambda x: relax.op.nn.softmax(relax.op.exp(x)), x.shape)
    np.testing.assert_allclose(run(x), softmax(np.exp(x), -1), rtol=2e-5, atol=2e-6)
    run = compile_function(lambda x: relax.op.variance(x, [1]), x.shape)
    np.testing.assert_allclose(run(x), x.var(1), rtol=2e-5, atol=2e-6)


def windows(x, size, step, pad, of, fill):
    """``of`` the elements of each window of the last two axes."""
    edges = [(0, 0)] * (x.ndim - 2) + [(pad, pad)] * 2
    padded = np.pad(x, edges, constant_values=fill)
    views = np.lib.stride_tricks.sliding_window_view(padded, (size, size), (-2, -1))
    return of(views[..., ::step, ::step, :, :], axis=(-2, -1))


def each_target(test):
    return pytest.mark.parametrize("target", RUNNABLE, ids=lambda target: target.name)(test)


@each_target
@pytest.mark.parametrize(
    ("size", "step", "pad", "width"), [(3, 2, 1, 7), (3, 1, 1, 59), (2, 2, 0, 32), (5, 3, 2, 59)]
)
def test_pooling(target, size, step, pad, width):
    x = normal(2, 3, 16, width)
    options = {"pool_size": size, "strides": step, "padding": (pad, pad)}
    run = compile_function(
        lambda x: relax.op.nn.max_pool2d(x, **options), ("a", 3, 16, width), target=target
    )
    np.testing.assert_array_equal(run(x), windows(x, size, step, pad, np.max, -np.inf))
    run = compile_function(
        lambda x: relax.op.nn.avg_pool2d(x, **options), (2, "c", 16, width), target=target
    )
    count = windows(np.ones_like(x), size, step, pad, np.sum, 0)
    sums = windows(x, size, step, pad, np.sum, 0)
    np.testing.assert_allclose(run(x), sums / count, rtol=1e-5, atol=1e-5)


@each_target
@pytest.mark.parametrize(("size", "step"), [(2, 2), (4, 2), (3, 1)])
def test_transposed_convolution(target, size, step):
    x, w = normal(2, 5, 9, 14), normal(5, 8, size, size)
    run = compile_function(
        lambda x, w: relax.op.add(
            relax.op.nn.conv2d_transpose(x, w, strides=step), relax.const(0.5, "float32")
        ),
        x.shape,
        w.shape,
        target=target,
    )
    height, width = ((extent - 1) * step + size for extent in x.shape[2:])
    expected = np.full((2, 8, height, width), 0.5, np.float32)
    for i, j in np.ndindex(9, 14):
        area = np.s_[:, :, i * step : i * step + size, j * step : j * step + size]
        expected[area] += np.einsum("nc,cohw->nohw", x[:, :, i, j], w)
    np.testing.assert_allclose(run(x, w), expected, rtol=1e-4, atol=1e-4)


@each_target
@pytest.mark.parametrize("axes", [[0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]])
def test_sums(target, axes):
    shape = (5, 21, 130)
    x = normal(*shape)
    run = compile_function(lambda x: relax.op.sum(x, axes), shape, target=target)
    np.testing.assert_allclose(run(x), x.sum(tuple(axes)), rtol=1e-4, atol=1e-3)
    if len(axes) == 1:
        run = compile_function(lambda x: relax.op.nn.softmax(x, axes[0]), shape, target=target)
        np.testing.assert_allclose(run(x), softmax(x, axes[0]), rtol=2e-5, atol=2e-6)


@each_target
@pytest.mark.parametrize("dims", [(4, 6, 50), ("a", 6, "c")])
def test_copies(target, dims):
    op = relax.op
    x = normal(4, 6, 50)
    parts = [
        (lambda x: op.concat([x, op.add(x, x)], 2), np.concatenate([x, x + x], 2)),
        (lambda x: op.concat([x, op.add(x, x), x], 1), np.concatenate([x, x + x, x], 1)),
        (
            lambda x: op.nn.pad(x, [0, 0, 1, 2, 3, 4], "constant", 1.5),
            np.pad(x, ((0, 0), (1, 2), (3, 4)), constant_values=1.5),
        ),
        (lambda x: op.strided_slice(x, [2], [1], [50], [3]), x[:, :, 1:50:3]),
    ]
    for build, expected in parts:
        run = compile_function(build, dims, target=target)
        np.testing.assert_array_equal(run(x), expected)


@each_target
@pytest.mark.parametrize("mode", ["nearest_neighbor", "linear"])
def test_resize(target, mode):
    x = normal(1, 8, 20, 24)
    run = compile_function(
        lambda x: relax.op.image.resize2d(x, (40, 48), layout="NCHW", method=mode),
        x.shape,
        target=target,
    )
    rows, columns = ((np.arange(2 * n) + 0.5) / 2 - 0.5 for n in (20, 24))
    if mode == "linear":

        def blend(x, at, axis):
            low = np.floor(at)
            share = (at - low).astype(np.float32)
            parts = [
                np.take(x, np.clip(low + i, 0, x.shape[axis] - 1).astype(int), axis) for i in (0, 1)
            ]
            share = share.reshape([-1 if i == axis else 1 for i in range(4)])
            return parts[0] * (1 - share) + parts[1] * share

        expected = blend(blend(x, rows, 2), columns, 3)
    else:
        expected = x[:, :, np.round(rows).astype(int)][..., np.round(columns).astype(int)]
    np.testing.assert_allclose(run(x), expected, rtol=1e-5, atol=1e-5)


def test_copies_have_no_conditions_inside():
    """Padding and concatenation are split where a condition changes."""
    from sparse_tvm.schedules.cpu.generic import schedule_generic
    from sparse_tvm.schedules.cpu.simd import Simd

    x = tvm.te.placeholder((64, 64), name="x")
    y = tvm.te.compute(
        (66, 70),
        lambda i, j: tirx.if_then_else(
            tirx.all(i >= 1, i < 65, j >= 3, j < 67), x[i - 1, j - 3], tirx.const(0, "float32")
        ),
    )
    text = schedule_generic(tvm.te.create_prim_func([x, y]), Simd(16, 32)).script()
    assert "if_then_else" not in text
    assert "T.vectorized(16)" in text


def scheduled(*tensors):
    """Text of the schedule for AVX-512 of what tensors are computed from."""
    from sparse_tvm.schedules.cpu.generic import schedule_generic
    from sparse_tvm.schedules.cpu.simd import Simd

    function = tvm.te.create_prim_func([*tensors], index_dtype_override=None)
    return schedule_generic(function, Simd(16, 32)).script()


@pytest.mark.parametrize("length", [64, "symbolic"])
def test_gathered_windows_are_rows(length):
    """A last axis of one element is no row: nothing is divided per element."""
    n = tirx.Var("n", "int64") if length == "symbolic" else length
    x = tvm.te.placeholder((1, 384, n + 8, 1), name="x")
    at = tvm.te.placeholder((9, n), "int64", name="at")
    y = tvm.te.compute((1, 384, 9, n, 1), lambda a, b, c, d, e: x[a, b, at[c, d], e])
    text = scheduled(x, at, y)
    outer, inner = [
        re.search(r" in (.*):", line)[1] for line in text.splitlines() if " in " in line
    ]
    assert "T.parallel" in outer
    assert re.sub(r"T.int64\((.*)\)", r"\1", inner) == f"range({n})"


@each_target
@pytest.mark.parametrize("dims", [(1, 64, 48), (1, "n", 48)])
def test_copies_with_a_last_axis_of_one(target, dims):
    op = relax.op
    x = normal(1, 64, 48)
    turned = x.transpose(0, 2, 1)[..., None]
    at = np.add.outer(np.arange(9), np.arange(40))

    def column(x):
        return op.expand_dims(op.permute_dims(x, [0, 2, 1]), 3)

    parts = [
        (column, turned),
        (
            lambda x: op.nn.pad(column(x), [0, 0, 0, 0, 4, 4, 0, 0], "constant", 0.5),
            np.pad(turned, ((0, 0), (0, 0), (4, 4), (0, 0)), constant_values=0.5),
        ),
        (lambda x: op.take(column(x), relax.const(at, "int64"), 2), turned[:, :, at]),
        (
            lambda x: op.add(column(x), op.mean(column(x), [2], True)),
            turned + turned.mean(2)[..., None],
        ),
    ]
    for build, expected in parts:
        run = compile_function(build, dims, target=target)
        np.testing.assert_allclose(run(x), expected, rtol=1e-5, atol=1e-6)


@each_target
@pytest.mark.parametrize(
    ("shape", "joined"),
    [
        ((1, 196, 4, 32), (1, 196, 128)),
        ((1, 54, 14, 14), (1, 54, 196)),
        ((1, 57, 7, 7), (1, 57, 49)),
        ((1, 57, 56, 56), (1, 57, 3136)),
        ((1, 10007, 3), (1, 30021)),
        ((1, 96, 20, 18), (96, 360)),
        ((3, 40, 96), (3, 8, 480)),
    ],
)
def test_axes_joined(target, shape, joined):
    run = compile_function(
        lambda x: relax.op.reshape(relax.op.add(x, x), joined), shape, target=target
    )
    x = normal(*shape)
    np.testing.assert_array_equal(run(x), (x + x).reshape(joined))


def test_transposing_copy_padded_on_a_last_axis_of_one():
    """Padding is written in vectors, and the rest without conditions."""
    x = tvm.te.placeholder((1, 64, 384), name="x")

    def padded(_, i, j, k):
        inside = tirx.all(j >= 4, j < 68)
        column = tirx.floormod(tirx.floordiv(j - 4 + k, 64) + i, 384)  # as a reshape writes it
        return tirx.if_then_else(inside, x[0, j - 4, column], tirx.const(0, "float32"))

    text = scheduled(x, tvm.te.compute((1, 384, 72, 1), padded))
    assert "if_then_else" not in text
    assert "//" not in text
    assert "T.vectorized(T.int64(4))" in text or "T.vectorized(4)" in text


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_of_tables_are_vectors(dtype):
    """Of half-precision tables too, which are converted as they are read."""
    table = tvm.te.placeholder((100, 768), dtype, name="table")
    at = tvm.te.placeholder((1, 64), "int64", name="at")
    row = tvm.te.compute((1, 64, 768), lambda _, i, j: table[at[0, i], j])
    text = scheduled(table, at, tvm.te.compute(row.shape, lambda *i: row[i].astype("float32")))
    assert "T.vectorized" in text
    assert "//" not in text


@pytest.mark.parametrize("batch", [1, 2])
def test_images_as_rows_are_cut_between_rows(batch):
    """Rows of 14 pixels, of channels that pieces hold whole: all extents are known."""
    x = tvm.te.placeholder((batch, 54, 14, 14), name="x")
    y = tvm.te.compute((batch, 54, 196), lambda a, b, c: x[a, b, c // 14, c % 14] * 2)
    text = scheduled(x, y)
    assert "T.min" not in text
    assert "T.vectorized" in text


@pytest.mark.parametrize("heads", [4, 8])
def test_heads_joined_are_vectors(heads):
    """A row of a head lies within a row of all heads."""
    x = tvm.te.placeholder((1, 196, heads, 32), name="x")
    y = tvm.te.compute((1, 196, heads * 32), lambda a, b, c: x[a, b, c // 32, c % 32])
    text = scheduled(x, y)
    assert "T.min" not in text
    assert "T.vectorized" in text
    assert "T.parallel" in text


def test_values_read_often_do_not_grow():
    """Each step reads the last one four times: inlined, this would be 4**24 operations."""

    def build(x):
        for _ in range(24):
            x = relax.op.tanh(relax.op.add(relax.op.multiply(x, x), relax.op.abs(x)))
        return x

    run = compile_function(build, ("a", 33))
    x = expected = normal(5, 33)
    for _ in range(24):
        expected = np.tanh(expected * expected + abs(expected))
    np.testing.assert_allclose(run(x), expected, rtol=1e-4, atol=1e-4)


def test_vectors_are_used():
    """A reduction along rows of odd length is no scalar loop."""
    from sparse_tvm.schedules.cpu.generic import schedule_generic
    from sparse_tvm.schedules.cpu.simd import Simd

    x = tvm.te.placeholder((5, 37), name="x")
    k = tvm.te.reduce_axis((0, 37))
    y = tvm.te.compute((5,), lambda i: tvm.te.sum(x[i, k], axis=k))
    text = schedule_generic(tvm.te.create_prim_func([x, y]), Simd(16, 32)).script()
    assert "T.vectorized(16)" in text
    assert "T.vectorized(5)" in text


@each_target
@pytest.mark.parametrize("size", [2, 4, 8, 16, 24, 48])
def test_indices_that_wrap_around(target, size):
    """Two halves of the last axis turned, of heads that were second, and joined."""
    op, half = relax.op, (1, 3, 1, size // 2)
    shapes = ((2, 4, 3, size), half, half)

    def rotated(x, c, s):
        x = op.permute_dims(x, [0, 2, 1, 3])
        low, high = (op.strided_slice(x, [3], [i], [i + size // 2]) for i in (0, size // 2))
        real = op.subtract(op.multiply(low, c), op.multiply(high, s))
        imaginary = op.add(op.multiply(low, s), op.multiply(high, c))
        joined = op.reshape(op.concat([real, imaginary], 3), (2, 3, 4 * size))
        return op.add(joined, joined)

    run = compile_function(rotated, *shapes, target=target)
    x, c, s = (normal(*shape) + i for i, shape in enumerate(shapes))
    low, high = np.split(x.transpose(0, 2, 1, 3), 2, -1)
    joined = np.concatenate([low * c - high * s, low * s + high * c], -1).reshape(2, 3, -1)
    np.testing.assert_allclose(run(x, c, s), joined * 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "size", "columns"), [(5, 8, 20), (5, 16, 40), (9, 2, 6), (5, 24, 20)]
)
@pytest.mark.parametrize("symbolic", [False, True])
def test_rows_cut_anew(rows, size, columns, symbolic):
    """Rows that begin and end within a period of what they are made of."""
    op, both = relax.op, 2 * rows * size // columns

    def recut(x, b):
        joined = op.concat([op.exp(x), x], 1 if symbolic else 0)
        shape = (x.ty.shape[0], both, columns) if symbolic else (both, columns)
        return op.multiply(op.reshape(joined, shape), b)

    lead = (3,) if symbolic else ()
    run = compile_function(recut, (*(("n",) if symbolic else ()), rows, size), (both, 1))
    x, b = normal(*lead, rows, size), normal(both, 1)
    joined = np.concatenate([np.exp(x), x], 1 if symbolic else 0)
    expected = joined.reshape((*lead, both, columns)) * b
    np.testing.assert_allclose(run(x, b), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 4, 33, "n"), (3, 2, 7, 7)])
def test_one_tensor_as_several_inputs(shape):
    """What a block reads of a tensor is all of it that any of its inputs needs."""

    def three_times(x):
        doubled = relax.op.add(x, x)
        return relax.op.concat([doubled, doubled, doubled], 1)

    x = normal(*(5 if d == "n" else d for d in shape))
    run = compile_function(three_times, shape)
    np.testing.assert_allclose(run(x), np.concatenate([x + x] * 3, 1), rtol=1e-6)


def test_product_of_a_tensor_with_itself():
    def square(x):
        doubled = relax.op.add(x, x)
        return relax.op.matmul(doubled, doubled)

    x = normal(3, 7, 7)
    run = compile_function(square, x.shape)
    np.testing.assert_allclose(run(x), 4 * x @ x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_indices_that_wrap_around_backwards(size):
    """The end comes first of what was gathered and flattened."""
    op, x = relax.op, normal(3, 33, 33, size)

    def reversed_part(x):
        part = op.take(x, relax.const(np.array([[2]])), 0)
        return op.flip(op.reshape(part, (1, 33 * 33 * size)), 1)

    run = compile_function(reversed_part, x.shape)
    np.testing.assert_array_equal(run(x), x[2].reshape(1, -1)[:, ::-1])


def test_exponentials_of_padding():
    """Where everything is padding, the argument is a constant in two nested exponentials."""
    op = relax.op

    def gate(x):
        inner = op.sigmoid(op.nn.pad(op.nn.log_softmax(x, 0), [0, 0, 2, 0]))
        outer = op.nn.pad(inner, [0, 0, 1, 0])
        return op.multiply(outer, op.sigmoid(outer))

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    x = normal(2, 144)
    run = compile_function(gate, x.shape)
    padded = np.pad(np.log(softmax(x, 0)), [(0, 0), (2, 0)])
    outer = np.pad(sigmoid(padded), [(0, 0), (1, 0)])
    np.testing.assert_allclose(run(x), outer * sigmoid(outer), rtol=1e-5, atol=1e-6)


@each_target
@pytest.mark.parametrize("size", [1, 5, 7, 19, 20, 32])
def test_transposed_parts_joined(target, size):
    """Boxes of a detector: channels last, and some of them other functions than the rest."""
    op = relax.op

    def boxes(x):
        x = op.sigmoid(op.permute_dims(x, [0, 2, 3, 1]))
        centre, extent, rest = (
            op.strided_slice(x, [3], [start], [stop]) for start, stop in ((0, 2), (2, 4), (4, 9))
        )
        return op.concat([op.add(centre, centre), op.multiply(extent, extent), rest], 3)

    run, x = compile_function(boxes, (2, 9, size, size), target=target), normal(2, 9, size, size)
    expected = 1 / (1 + np.exp(-x.transpose(0, 2, 3, 1)))
    expected[..., :2] *= 2
    expected[..., 2:4] **= 2
    np.testing.assert_allclose(run(x), expected, rtol=1e-5, atol=1e-5)


def test_transposed_parts_are_joined_in_vectors():
    """Along what they read, for what is written is another part in each column."""
    from tvm import topi

    from sparse_tvm.schedules.cpu.generic import schedule_generic
    from sparse_tvm.schedules.cpu.simd import Simd

    x = tvm.te.placeholder((9, 40), name="x")
    turned = topi.transpose(x, (1, 0))
    low, high = (topi.strided_slice(turned, [0, i], [40, j]) for i, j in ((0, 4), (4, 9)))
    joined = tvm.te.create_prim_func([x, topi.concatenate([topi.exp(low), high], axis=1)])
    text = schedule_generic(joined, Simd(8, 16)).script()
    assert "T.vectorized(8)" in text
    assert "T.unroll" not in text


@each_target
def test_many_indices_that_wrap_around_anywhere(target):
    """Each cut makes bounds longer: the loop stays whole where there would be too many."""
    from sparse_tvm.schedules.cpu.generic import schedule_generic
    from sparse_tvm.schedules.cpu.intrinsics import FAST_MATH
    from sparse_tvm.schedules.cpu.simd import Simd

    te = tvm.te
    m, n = (tirx.Var(name, "int64") for name in "mn")
    x, z = te.placeholder((m,), name="x"), te.placeholder((n,), name="z")

    def element(i):
        return sum((x[tirx.floormod(i + k * m, 3)] for k in range(1, 7)), z[i])

    function = te.create_prim_func([x, z, te.compute((n,), element)], index_dtype_override=None)
    scheduled = schedule_generic(function, Simd.of(target))
    assert len(scheduled.script()) < 10_000
    with (
        tvm.transform.PassContext(config=FAST_MATH),
        tvm.target.Target(target.tvm_target()) as host,
    ):
        built = tvm.compile(scheduled.with_attr("global_symbol", "main"), host).jit()
    xs, zs = normal(7), normal(1000)
    y = tvm.runtime.tensor(np.zeros_like(zs))
    built["main"](*map(tvm.runtime.tensor, (xs, zs)), y)
    expected = zs + sum(xs[(np.arange(1000) + k * 7) % 3] for k in range(1, 7))
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_boxes_of_several_maps():
    """A detector's anchors: maps of six boxes a pixel, flattened, joined and decoded."""
    op, sizes = relax.op, (4, 2, 1)

    def decoded(*maps):
        rows = []
        for x, size in zip(maps, sizes, strict=True):
            split = op.permute_dims(op.reshape(x, (1, 6, 4, size, size)), [0, 3, 4, 1, 2])
            rows.append(op.reshape(split, (1, 6 * size * size, 4)))
        joined = op.reshape(op.concat(rows, 1), (126, 4))
        x, y, w, h = (op.strided_slice(joined, [1], [i], [i + 1]) for i in range(4))
        halves = [op.multiply(op.exp(side), relax.const(0.5, "float32")) for side in (w, h)]
        low = [op.subtract(at, half) for at, half in zip((x, y), halves, strict=True)]
        high = [op.add(at, half) for at, half in zip((x, y), halves, strict=True)]
        corners = op.reshape(op.concat([*low, *high], 1), (126, 2, 2))
        inside = op.minimum(op.maximum(corners, relax.const(-1.0, "float32")), relax.const(1.0))
        return op.reshape(op.concat([inside, inside], 0), (252, 4))

    maps = [normal(1, 24, size, size) for size in sizes]
    rows = [
        x.reshape(6, 4, size, size).transpose(2, 3, 0, 1).reshape(-1, 4)
        for x, size in zip(maps, sizes, strict=True)
    ]
    at, sides = np.split(np.concatenate(rows), 2, 1)
    corners = np.concatenate([at - np.exp(sides) / 2, at + np.exp(sides) / 2], 1).clip(-1, 1)
    run = compile_function(decoded, *(x.shape for x in maps))
    np.testing.assert_allclose(run(*maps), np.concatenate([corners] * 2), rtol=1e-5, atol=1e-5)
