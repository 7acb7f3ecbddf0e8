"""The schedule for operators without a kernel: any extents, symbolic ones included."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax, tirx
from tvm.relax.backend.cpu_generic.pipeline import finalize_passes

from sparse_tvm.passes.batch_matmul import batch_matmul
from sparse_tvm.passes.legalize import legalize
from sparse_tvm.passes.lower_kernels import lower_kernels
from sparse_tvm.passes.program import Program
from sparse_tvm.passes.schedule_rest import schedule_rest
from sparse_tvm.schedules.cpu.intrinsics import FAST_MATH
from sparse_tvm.targets import get_target

TARGET = get_target()


def compile_function(build, *shapes):
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
    program = legalize(batch_matmul(program), TARGET)
    program = schedule_rest(lower_kernels(program, TARGET), TARGET)
    assert not program.notes
    target = tvm.target.Target(TARGET.tvm_target())
    finish = tvm.transform.Sequential(
        [
            relax.transform.ToNonDataflow(),
            relax.transform.RemovePurityChecking(),
            relax.transform.CallTIRRewrite(),
            *finalize_passes(target),
        ]
    )
    with target, tvm.transform.PassContext(config=FAST_MATH):
        library = tvm.compile(program.module, target, relax_pipeline=finish)
    machine = relax.VirtualMachine(library, tvm.cpu())
    return lambda *arrays: machine["main"](*map(tvm.runtime.tensor, arrays)).numpy()


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
