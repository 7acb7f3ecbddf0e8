"""Programs that are straight runs of kernels are one function of their library, too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import relax
from tvm.relax import vm_build
from tvm.relax.backend.cpu_generic.pipeline import finalize_passes
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from sparse_tvm.backends.object_code import compile_kernels
from sparse_tvm.backends.straight_program import BODY_ATTRIBUTE, straight_program
from sparse_tvm.errors import InputError
from sparse_tvm.vm import CONSTANTS, STRAIGHT, runtime

TARGET = tvm.target.Target("llvm")
WEIGHTS = [np.arange(8, dtype=np.float32) + i for i in range(2)]


@I.ir_module
class Layers:
    """Two layers of one kernel for any number of rows, the second times a constant."""

    @T.prim_func(private=True)
    def scale(x: T.handle, w: T.Buffer((8,), "float32"), rows: T.int64, y: T.handle):
        n = T.int64()
        x_buffer = T.match_buffer(x, (n, 8), "float32")
        y_buffer = T.match_buffer(y, (n, 8), "float32")
        with T.Assert(rows < T.int64(100), "too many rows", "InputError"):
            pass
        for i in T.parallel(rows):
            for j in T.serial(8):
                y_buffer[i, j] = x_buffer[i, j] * w[j]

    @R.function
    def main(x: R.Tensor(("n", 8), "float32"), weights: R.Tuple([R.Tensor((8,), "float32")] * 2)):
        n = T.int64()
        cls = Layers
        tensor = R.Tensor((n, 8), "float32")
        a = R.call_tir(cls.scale, (x, weights[0], n), out_ty=tensor)
        b = R.call_tir(cls.scale, (a, weights[1], n), out_ty=tensor)
        c = R.call_tir(cls.scale, (b, R.const(np.full(8, 2, "float32")), n), out_ty=tensor)
        return R.reshape(c, R.shape([n * 8]))


@I.ir_module
class ReturnsWeight:
    """What is returned is no memory of the program's own."""

    @R.function
    def main(x: R.Tensor((8,), "float32"), weights: R.Tuple([R.Tensor((8,), "float32")] * 2)):
        return R.reshape(weights[1], R.shape([2, 4]))


@I.ir_module
class CallsAnother:
    """A function that is no kernel is called."""

    @R.function
    def main(x: R.Tensor((8,), "float32"), weights: R.Tuple([R.Tensor((8,), "float32")] * 2)):
        y = R.call_pure_packed("another", x, ty_args=R.Tensor((8,), "float32"))
        return y


@T.prim_func
def expected(a: T.handle, b: T.handle, c: T.handle, d: T.handle) -> T.int64:
    n, workspace_bytes, tensors = T.int64(), T.int64(), T.int64()
    x = T.match_buffer(a, (n, T.int64(8)), "float32", layout=None)
    y = T.match_buffer(b, (n * T.int64(8),), "float32", layout=None)
    memory = T.match_buffer(c, (workspace_bytes,), "uint8", layout=None)
    addresses = T.match_buffer(d, (tensors,), "int64", layout=None)
    first: T.let[T.int64] = (T.int64(32) * n + T.int64(63)) // T.int64(64) * T.int64(64)
    both: T.let[T.int64] = first + (T.int64(32) * n + T.int64(63)) // T.int64(64) * T.int64(64)
    if memory.shape[0] < both:
        return both
    if (
        T.call_extern(
            "int32",
            "scale_body",
            x.data,
            T.reinterpret("handle", addresses[0]),
            n,
            T.address_of(memory[T.int64(0)]),
            n,
        )
        != 0
    ):
        T.tvm_throw_last_error()
    if (
        T.call_extern(
            "int32",
            "scale_body",
            T.address_of(memory[T.int64(0)]),
            T.reinterpret("handle", addresses[1]),
            n,
            T.address_of(memory[first]),
            n,
        )
        != 0
    ):
        T.tvm_throw_last_error()
    if (
        T.call_extern(
            "int32",
            "scale_body",
            T.address_of(memory[first]),
            T.reinterpret("handle", addresses[2]),
            n,
            y.data,
            n,
        )
        != 0
    ):
        T.tvm_throw_last_error()
    return T.int64(0)


def planned(module: tvm.IRModule) -> tvm.IRModule:
    """A module behind all planning of memory."""
    steps = [relax.transform.ToNonDataflow(), relax.transform.RemovePurityChecking()]
    steps += [relax.transform.CallTIRRewrite(), finalize_passes(TARGET)[0]]
    with TARGET:
        return tvm.transform.Sequential(steps)(module)


def test_kernels_are_called_in_turn_with_addresses() -> None:
    after = straight_program(planned(Layers))
    assert after["scale"].attrs[BODY_ATTRIBUTE] == "scale_body"
    tvm.ir.assert_structural_equal(
        after[STRAIGHT], expected.with_attr("global_symbol", STRAIGHT), map_free_vars=True
    )


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The module compiled and loaded, as an artifact's library is."""
    path = tmp_path_factory.mktemp("straight") / "layers.so"
    _, *lower = finalize_passes(TARGET)
    with TARGET:
        module = tvm.transform.Sequential([straight_program, *lower])(planned(Layers))
        builder = relax.ExecBuilder()
        libraries = compile_kernels(vm_build._vmcodegen(builder, module), TARGET)
        vm_build._vmlink(builder, TARGET, ext_libs=libraries).export_library(str(path))
    return runtime().load_module(str(path))


def arguments(library: Any, x: np.ndarray, y: np.ndarray, workspace: int) -> list[Any]:
    """Of the straight function, and what keeps its memory."""
    program = library["vm_load_executable"]()
    program["vm_initialization"](1, 0, 2)
    tensors = [*map(aligned, WEIGHTS), *program[CONSTANTS]()]
    table = np.array([tensor.data_ptr() for tensor in tensors])
    arrays = [x, y, np.zeros(workspace, np.uint8), table]
    return [*map(aligned, arrays), program, tensors]


def aligned(array: np.ndarray) -> Any:
    """The array, or a copy of it that is as aligned as TVM wants it."""
    return tvm_ffi.from_dlpack(tvm.runtime.tensor(array))


@pytest.mark.parametrize("rows", [1, 3, 17])
def test_computes_what_the_machine_computes(machine: Any, rows: int) -> None:
    x = np.random.default_rng(rows).standard_normal((rows, 8)).astype(np.float32)
    needed = 2 * -(-rows * 32 // 64) * 64
    straight = machine.get_function(STRAIGHT, query_imports=True)
    given, result, workspace, table, program, tensors = arguments(
        machine, x, np.zeros(rows * 8, np.float32), needed
    )
    little = aligned(np.zeros(needed - 1, np.uint8))
    assert straight(given, result, little, table) == needed
    assert not np.from_dlpack(result).any()
    assert straight(given, result, workspace, table) == 0
    wanted = (x * WEIGHTS[0] * WEIGHTS[1] * 2).ravel()
    np.testing.assert_allclose(np.from_dlpack(result), wanted, rtol=1e-6)
    by_machine = program["main"](given, tvm_ffi.convert(tensors[:2]))
    np.testing.assert_array_equal(np.from_dlpack(by_machine), np.from_dlpack(result))


def test_errors_of_kernels_reach_the_caller(machine: Any) -> None:
    x = np.zeros((100, 8), np.float32)
    *given, program, tensors = arguments(machine, x, np.zeros(800, np.float32), 6400)
    with pytest.raises(InputError, match="too many rows"):
        machine.get_function(STRAIGHT, query_imports=True)(*given)
    with pytest.raises(InputError, match="too many rows"):
        program["main"](given[0], tvm_ffi.convert(tensors[:2]))


@pytest.mark.parametrize("module", [ReturnsWeight, CallsAnother])
def test_other_programs_stay_as_they_are(module: Any) -> None:
    before = planned(module)
    tvm.ir.assert_structural_equal(straight_program(before), before)
