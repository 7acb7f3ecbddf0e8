"""Shapes, sizes and tensors of a program are made once, and weights may be bound one by one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax.backend.cpu_generic.pipeline import finalize_passes
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from sparse_tvm.backends.shorten_program import shorten_program
from sparse_tvm.vm import WEIGHTS_APART

TARGET = tvm.target.Target("llvm")
SHARED = ("vm.builtin.make_shape", "vm.builtin.make_prim_value", "relax.vm.alloc_tensor")
KILL = "relax.vm.kill_object"


@I.ir_module
class Layers:
    """Four layers of one kernel, for any number of rows."""

    @T.prim_func(private=True)
    def scale(x: T.handle, w: T.Buffer((8,), "float32"), rows: T.int64, y: T.handle):
        n = T.int64()
        x_buffer = T.match_buffer(x, (n, 8), "float32")
        y_buffer = T.match_buffer(y, (n, 8), "float32")
        for i in T.serial(rows):
            for j in T.serial(8):
                y_buffer[i, j] = x_buffer[i, j] * w[j]

    @R.function
    def main(x: R.Tensor(("n", 8), "float32"), weights: R.Tuple([R.Tensor((8,), "float32")] * 4)):
        n = T.int64()
        cls = Layers
        a = R.call_tir(cls.scale, (x, weights[0], n), out_ty=R.Tensor((n, 8), "float32"))
        b = R.call_tir(cls.scale, (a, weights[1], n), out_ty=R.Tensor((n, 8), "float32"))
        c = R.call_tir(cls.scale, (b, weights[2], n), out_ty=R.Tensor((n, 8), "float32"))
        d = R.call_tir(cls.scale, (c, weights[3], n), out_ty=R.Tensor((n, 8), "float32"))
        return d


@I.ir_module
class Halves:
    """Two layers that are told half of how many rows there are."""

    @T.prim_func(private=True)
    def scale(x: T.handle, half: T.int64, y: T.handle):
        n = T.int64()
        x_buffer = T.match_buffer(x, (n, 8), "float32")
        y_buffer = T.match_buffer(y, (n, 8), "float32")
        for i in T.serial(half * 2):
            for j in T.serial(8):
                y_buffer[i, j] = x_buffer[i, j] * T.float32(2)

    @R.function
    def main(x: R.Tensor(("n", 8), "float32")):
        n = T.int64()
        cls = Halves
        y = R.call_tir(cls.scale, (x, n // 2), out_ty=R.Tensor((n, 8), "float32"))
        z = R.call_tir(cls.scale, (y, n // 2), out_ty=R.Tensor((n, 8), "float32"))
        return z


@I.ir_module
class Branches:
    """Which layer runs depends on an input."""

    @R.function
    def main(c: R.Tensor((), "bool"), x: R.Tensor(("n", 8), "float32")):
        n = T.int64()
        if c:  # noqa: SIM108
            y = R.reshape(x, R.shape([n * 8]))
        else:
            y = R.reshape(x, R.shape([n * 8]))
        return y


@I.ir_module
class Whole:
    """The weights are also returned as they came."""

    @R.function
    def main(x: R.Tensor((8,), "float32"), weights: R.Tuple([R.Tensor((8,), "float32")] * 2)):
        y = R.reshape(weights[1], R.shape([2, 4]))
        return y, weights


def lowered(module: tvm.IRModule) -> tvm.IRModule:
    steps = [relax.transform.ToNonDataflow(), relax.transform.RemovePurityChecking()]
    steps += [relax.transform.CallTIRRewrite(), *finalize_passes(TARGET)]
    with TARGET:
        return tvm.transform.Sequential(steps)(module)


def identity(arg: Any) -> str:
    """Names are not unique."""
    return f"{arg.name} {hash(arg)}" if isinstance(arg, relax.Var) else str(arg)


def calls(module: tvm.IRModule, function: str) -> list[tuple[str, tuple[str, ...]]]:
    """Functions that one calls, and their arguments, in order."""
    found = []
    for binding in bindings_of(module[function]):
        value = binding.value
        if isinstance(value, relax.Call):
            names = ("name_hint", "global_symbol", "name")
            name = next(getattr(value.op, n) for n in names if hasattr(value.op, n))
            found.append((str(name), tuple(map(identity, value.args))))
    return found


def bindings_of(function: relax.Function) -> list[Any]:
    return [binding for block in function.body.blocks for binding in block.bindings]


def run(module: tvm.IRModule, *inputs: Any) -> Any:
    machine = relax.VirtualMachine(relax.build(module, TARGET, relax_pipeline=None), tvm.cpu())
    return machine["main"](*inputs)


def test_shapes_sizes_and_tensors_are_made_once() -> None:
    before, after = lowered(Layers), shorten_program(lowered(Layers))
    repeated, left = Counter(calls(before, "main")), Counter(calls(after, WEIGHTS_APART))
    assert sum(n > 1 for (name, _), n in repeated.items() if name in SHARED[:2]) >= 2
    assert all(n == 1 for (name, _), n in left.items() if name in SHARED)
    kernels = [(name, args) for name, args in calls(after, WEIGHTS_APART) if name == "scale"]
    assert len(kernels) == 4
    assert len({args[-1] for _, args in kernels}) < 4, "layers in turn write the same memory"


def test_sizes_are_computed_once() -> None:
    computed = [
        [name for name, _ in calls(module, "main") if name.startswith("compute_symbolic_expr")]
        for module in (lowered(Halves), shorten_program(lowered(Halves)))
    ]
    assert list(map(len, computed)) == [2, 1]
    x = np.ones((6, 8), np.float32)
    result = run(shorten_program(lowered(Halves)), tvm.runtime.tensor(x))
    np.testing.assert_array_equal(result.numpy(), 4 * x)


def test_only_main_takes_weights_apart() -> None:
    after = shorten_program(lowered(Layers))
    main, apart = after["main"], after[WEIGHTS_APART]
    x, *weights = apart.params
    assert len(weights) == 4
    tvm.ir.assert_structural_equal(x.ty, main.params[0].ty)
    fields = [binding.var for binding in bindings_of(main)[:4]]
    arguments = tuple(map(identity, [main.params[0], *fields]))
    assert calls(after, "main") == [(WEIGHTS_APART, arguments)]
    taken = [binding.value for binding in bindings_of(main)[:4]]
    assert [(each.tuple_value.name, each.index) for each in taken] == [
        (main.params[1].name, i) for i in range(4)
    ]
    assert not any(isinstance(b.value, relax.TupleGetItem) for b in bindings_of(apart))
    kernels = [args[1] for name, args in calls(after, WEIGHTS_APART) if name == "scale"]
    assert kernels == list(map(identity, weights))


def test_weights_that_are_used_as_a_whole_stay_a_tuple() -> None:
    after = shorten_program(lowered(Whole))
    assert WEIGHTS_APART not in {variable.name_hint for variable in after.get_global_vars()}
    weights = [tvm.runtime.tensor(np.full(8, i, np.float32)) for i in range(2)]
    y, kept = run(after, tvm.runtime.tensor(np.zeros(8, np.float32)), weights)
    np.testing.assert_array_equal(y.numpy(), np.ones((2, 4), np.float32))
    assert len(kept) == 2


def test_weights_are_kept_and_memory_is_given_back_after_its_last_use() -> None:
    after = calls(shorten_program(lowered(Layers)), WEIGHTS_APART)
    used = {arg: at for at, (name, args) in enumerate(after) if name != KILL for arg in args}
    killed = [(args[0], at) for at, (name, args) in enumerate(after) if name == KILL]
    weights = {args[1] for name, args in after if name == "scale"}
    assert killed
    assert len({name for name, _ in killed}) == len(killed)
    assert all(at > used[name] for name, at in killed)
    assert not weights & {name for name, _ in killed}


def test_results_are_the_same() -> None:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((3, 8)).astype(np.float32)
    weights = [generator.standard_normal(8).astype(np.float32) for _ in range(4)]
    arguments = tvm.runtime.tensor(x), [tvm.runtime.tensor(w) for w in weights]
    module = shorten_program(lowered(Layers))
    expected = x * np.prod(weights, axis=0)
    np.testing.assert_allclose(run(module, *arguments).numpy(), expected, rtol=1e-5)
    machine = relax.VirtualMachine(relax.build(module, TARGET, relax_pipeline=None), tvm.cpu())
    machine.module["save_function"](WEIGHTS_APART, "bound", True, *arguments[1])
    found = machine.module["bound"](arguments[0]).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_functions_with_branches_stay() -> None:
    before = lowered(Branches)
    tvm.ir.assert_structural_equal(shorten_program(lowered(Branches)), before)
