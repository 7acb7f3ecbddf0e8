"""What the tests of passes share: programs from TVMScript, comparison, evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx

from sparse_tvm.backends import resolve_target
from sparse_tvm.operators import Operator
from sparse_tvm.passes import dialect
from sparse_tvm.passes.formats import FormatOptions
from sparse_tvm.passes.graph import Rewrite, op_name
from sparse_tvm.passes.infrastructure import Context, Pass
from sparse_tvm.passes.pipeline import phases
from sparse_tvm.passes.program import Program


def context(*rules: str, target: str = "native", **options: Any) -> Context:
    """What passes may ask: a target by name, and the command line's options."""
    values = {"format": "auto", "block": None, "threshold": None, **options}
    return Context(*resolve_target(target), FormatOptions.parse(**values, rules=rules))


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


def apply(passes: Pass | list[Pass], subject: Program, within: Context | None = None) -> Program:
    """Apply the passes, for the native target unless a context says otherwise."""
    for one in [passes] if isinstance(passes, Pass) else passes:
        subject = one(subject, within or context())
    return subject


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
            found = dialect.match(binding.value, Operator)
            name = found.op.name if found else op_name(binding.value)
            if name is not None:
                names.append(name.removeprefix("relax."))
    return names


def calls(subject: Program, kind: type[dialect.Op]) -> list[dialect.OperatorCall[dialect.Op]]:
    """The calls of one of our operators, in order."""
    return list(dialect.calls(subject, kind))


def evaluate(subject: Program, *inputs: np.ndarray) -> np.ndarray:
    """Output of a program without operators of ours, on TVM's own code."""
    executable = tvm.compile(subject.module, tvm.target.Target({"kind": "llvm"}))
    return _run(executable, *inputs, *subject.weights.values())


def compile_and_run(
    subject: Program, *inputs: np.ndarray, within: Context | None = None
) -> np.ndarray:
    """Output of a program through the whole pipeline."""
    within = within or context()
    for phase in phases(within.backend):
        subject = phase.run(subject, within)
    weights = tuple(tvm.runtime.tensor(array) for array in subject.weights.values())
    return _run(within.backend.generate(subject, within.target), *inputs, weights)


def _run(executable: relax.VMExecutable, *arguments: np.ndarray | tuple) -> np.ndarray:
    machine = relax.VirtualMachine(executable, tvm.cpu())
    tensors = [a if isinstance(a, tuple) else tvm.runtime.tensor(a) for a in arguments]
    return machine["main"](*tensors).numpy()
