"""What the tests of passes share: programs from TVMScript, comparison, evaluation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tvm
from tvm import relax, tirx

from sparse_tvm.compiler import _build
from sparse_tvm.passes import dialect
from sparse_tvm.passes.convert_weights import FormatOptions
from sparse_tvm.passes.dense_to_sparse import dense_to_sparse
from sparse_tvm.passes.fc_transpose import fc_transpose
from sparse_tvm.passes.fuse_attention import fuse_attention
from sparse_tvm.passes.fuse_epilogue import fuse_epilogue
from sparse_tvm.passes.graph import Rewrite, op_name
from sparse_tvm.passes.lane_layout import lane_layout
from sparse_tvm.passes.legalize import legalize
from sparse_tvm.passes.lower_kernels import lower_kernels
from sparse_tvm.passes.program import Program
from sparse_tvm.passes.schedule_rest import schedule_rest
from sparse_tvm.targets import get_target

Pass = Callable[[Program], Program]


def program(module: tvm.IRModule, **weights: np.ndarray) -> Program:
    """A program of a module; weights that are not given are random.

    Every 2-D weight is a layer of the same name.
    """
    main = module["main"]
    rng = np.random.default_rng(0)
    arrays = {}
    for param in main.params[int(main.attrs["num_input"]) :]:
        shape = [int(n) for n in param.ty.shape]
        random = rng.standard_normal(shape).astype(str(param.ty.dtype))
        arrays[param.name] = weights.get(param.name, random)
    layers = {name: name for name, array in arrays.items() if array.ndim == 2}
    return Program(module, arrays, layers)


def build(
    body: Callable[..., relax.Expr],
    inputs: dict[str, tuple[int | str, ...]],
    weights: dict[str, tuple[int, ...]] | None = None,
    dtypes: dict[str, str] | None = None,
) -> Program:
    """A program ``body(emit, *inputs, *weights)`` by shapes, in which a string is a symbol."""
    symbols: dict[str, tirx.Var] = {}

    def extent(dim: int | str) -> int | tirx.Var:
        return symbols.setdefault(dim, tirx.Var(dim, "int64")) if isinstance(dim, str) else dim

    def parameter(name: str, shape: tuple[int | str, ...]) -> relax.Var:
        dtype = (dtypes or {}).get(name, "float32")
        return relax.Var(name, relax.TensorType([extent(dim) for dim in shape], dtype))

    params = [parameter(*item) for item in {**inputs, **(weights or {})}.items()]
    builder = relax.BlockBuilder()
    with builder.function("main", params, attrs={"num_input": len(inputs)}):
        with builder.dataflow():
            result = builder.emit_output(builder.normalize(body(builder.emit, *params)))
        builder.emit_func_output(result)
    return program(builder.get())


def assert_becomes(passes: Pass | list[Pass], before: Program, expected: tvm.IRModule) -> Program:
    """Apply the passes and compare with the module expected, and weights with its parameters."""
    after = apply(passes, before)
    tvm.ir.assert_structural_equal(after.module, rebuilt(expected))
    check_weights(after)
    return after


def assert_unchanged(passes: Pass | list[Pass], before: Program) -> Program:
    """Apply the passes and check that they left the module alone."""
    return assert_becomes(passes, before, before.module)


def apply(passes: Pass | list[Pass], subject: Program) -> Program:
    """Apply the passes to a copy."""
    after = Program(subject.module, dict(subject.weights), dict(subject.layers))
    for one in [passes] if callable(passes) else passes:
        after = one(after)
    return after


class _Rebuild(Rewrite):
    def rewrite(self, var: relax.Var, value: relax.Expr) -> None:
        return None


def rebuilt(module: tvm.IRModule) -> tvm.IRModule:
    """The module as a pass that replaces nothing leaves it: with one more copy of the output."""
    return _Rebuild(program(module)).run().module


def check_weights(subject: Program) -> None:
    """Weights and parameters agree in order, name, shape and dtype."""
    params = subject.module["main"].params[subject.num_input :]
    assert [p.name for p in params] == list(subject.weights)
    for param, array in zip(params, subject.weights.values(), strict=True):
        assert tuple(int(n) for n in param.ty.shape) == array.shape
        assert str(param.ty.dtype) == str(array.dtype)


def operators(subject: Program) -> list[str]:
    """Names of the operators called, in order; ours without their prefix."""
    names = []
    for block in subject.module["main"].body.blocks:
        for binding in block.bindings:
            found = dialect.match(binding.value)
            name = found.name if found else op_name(binding.value)
            if name is not None:
                names.append(name.removeprefix("relax."))
    return names


def calls(subject: Program, name: str) -> list[dialect.DialectCall]:
    """The calls of one of our operators, in order."""
    values = [b.value for block in subject.module["main"].body.blocks for b in block.bindings]
    return [found for value in values if (found := dialect.match(value, name)) is not None]


def evaluate(subject: Program, *inputs: np.ndarray) -> np.ndarray:
    """Output of a program without operators of ours, on TVM's own code."""
    executable = tvm.compile(subject.module, tvm.target.Target({"kind": "llvm"}))
    return _run(executable, *inputs, *subject.weights.values())


def compile_and_run(
    subject: Program,
    *inputs: np.ndarray,
    target: str = "native",
    options: FormatOptions | None = None,
) -> np.ndarray:
    """Output of a program through every pass from fc-transpose on."""
    chosen = get_target(target)
    subject = apply([fc_transpose, fuse_epilogue, fuse_attention, lane_layout], subject)
    subject = dense_to_sparse(subject, options or FormatOptions(), chosen)
    subject = schedule_rest(lower_kernels(legalize(subject, chosen), chosen), chosen)
    weights = tuple(tvm.runtime.tensor(array) for array in subject.weights.values())
    return _run(_build(subject, chosen), *inputs, weights)


def _run(executable: relax.VMExecutable, *arguments: np.ndarray | tuple) -> np.ndarray:
    machine = relax.VirtualMachine(executable, tvm.cpu())
    tensors = [a if isinstance(a, tuple) else tvm.runtime.tensor(a) for a in arguments]
    return machine["main"](*tensors).numpy()
