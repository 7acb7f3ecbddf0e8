"""Shapes, sizes and tensors of a program are made once, and weights are kept until it returns."""

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


def lowered(module: tvm.IRModule) -> tvm.IRModule:
    steps = [relax.transform.ToNonDataflow(), relax.transform.RemovePurityChecking()]
    steps += [relax.transform.CallTIRRewrite(), *finalize_passes(TARGET)]
    with TARGET:
        return tvm.transform.Sequential(steps)(module)


def identity(arg: Any) -> str:
    """Names are not unique."""
    return f"{arg.name} {hash(arg)}" if isinstance(arg, relax.Var) else str(arg)


def calls(module: tvm.IRModule) -> list[tuple[str, tuple[str, ...]]]:
    """Functions that ``main`` calls, and their arguments, in order."""
    found = []
    for block in module["main"].body.blocks:
        for binding in block.bindings:
            value = binding.value
            if isinstance(value, relax.Call):
                names = ("name_hint", "global_symbol", "name")
                name = next(getattr(value.op, n) for n in names if hasattr(value.op, n))
                found.append((str(name), tuple(map(identity, value.args))))
    return found


def run(module: tvm.IRModule, *inputs: Any) -> Any:
    machine = relax.VirtualMachine(relax.build(module, TARGET, relax_pipeline=None), tvm.cpu())
    return machine["main"](*inputs)


def test_shapes_sizes_and_tensors_are_made_once() -> None:
    before, after = lowered(Layers), shorten_program(lowered(Layers))
    repeated, left = Counter(calls(before)), Counter(calls(after))
    assert sum(n > 1 for (name, _), n in repeated.items() if name in SHARED[:2]) >= 2
    assert all(n == 1 for (name, _), n in left.items() if name in SHARED)
    kernels = [(name, args) for name, args in calls(after) if name == "scale"]
    assert len(kernels) == 4
    assert len({args[-1] for _, args in kernels}) < 4, "layers in turn write the same memory"


def test_weights_are_kept_and_memory_is_given_back_after_its_last_use() -> None:
    after = calls(shorten_program(lowered(Layers)))
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
    found = run(shorten_program(lowered(Layers)), *arguments).numpy()
    np.testing.assert_allclose(found, x * np.prod(weights, axis=0), rtol=1e-5)


def test_functions_with_branches_stay() -> None:
    before = lowered(Branches)
    tvm.ir.assert_structural_equal(shorten_program(lowered(Branches)), before)
