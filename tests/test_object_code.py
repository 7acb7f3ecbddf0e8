"""Object code of kernels, made by several threads."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm.script import tirx as T

from sparse_tvm.backends import object_code
from sparse_tvm.backends.straight_program import BODY_ATTRIBUTE
from sparse_tvm.linker import link
from sparse_tvm.passes.lower_kernels import KERNEL_ATTRIBUTE
from sparse_tvm.targets import get_target

COUNT, WIDTH = 7, 24


def scaled_sum(times: int, by_hand: bool) -> Any:
    """A kernel that adds a row to itself, that many times, through a buffer of its own."""

    @T.prim_func(s_tir=True)
    def kernel(x: T.Buffer((WIDTH,), "float32"), y: T.Buffer((WIDTH,), "float32")):
        row = T.alloc_buffer((WIDTH,), "float32")
        for i in T.vectorized(WIDTH):
            row[i] = T.float32(0)
        for _ in T.unroll(times):
            for i in T.vectorized(WIDTH):
                row[i] = row[i] + x[i]
        for i in T.vectorized(WIDTH):
            y[i] = row[i]

    marked = kernel.with_attr("global_symbol", f"times_{times}")
    return marked.with_attr(KERNEL_ATTRIBUTE, "scaled_sum") if by_hand else marked


def compiled(tmp_path: Path, functions: dict[str, Any]) -> list[bytes]:
    target = tvm.target.Target(get_target("x86-64-v3").tvm_target())
    objects = []
    for i, code in enumerate(object_code.compile_kernels(tvm.IRModule(functions), target)):
        objects.append(tmp_path / f"{i}.o")
        code.write_to_file(str(objects[-1]))
    if objects:
        link(objects, tmp_path / "all.so")
    return [path.read_bytes() for path in objects]


@pytest.mark.parametrize("by_hand", [False, True])
def test_is_the_same_with_one_thread_and_with_several_and_right(
    by_hand: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions = {f"times_{n}": scaled_sum(n, by_hand) for n in range(1, COUNT + 1)}
    monkeypatch.setattr(object_code, "usable_cores", lambda: 1)
    alone = compiled(tmp_path, functions)
    monkeypatch.setattr(object_code, "usable_cores", lambda: 4)
    assert compiled(tmp_path, functions) == alone
    assert len(set(alone)) == COUNT

    library = tvm.runtime.load_module(str(tmp_path / "all.so"))
    x = np.arange(WIDTH, dtype=np.float32)
    for n in range(1, COUNT + 1):
        y = tvm.runtime.tensor(np.zeros(WIDTH, np.float32))
        library[f"times_{n}"](tvm.runtime.tensor(x), y)
        np.testing.assert_array_equal(y.numpy(), n * x)


def test_an_error_of_one_thread_is_that_of_all(tmp_path: Path) -> None:
    @T.prim_func
    def broken(x: T.Buffer((WIDTH,), "float32"), y: T.Buffer((WIDTH,), "float32")):
        y[0] = T.call_intrin("float32", "tirx.tvm_fill_fragment", x[0])

    functions = {f"times_{n}": scaled_sum(n, by_hand=True) for n in range(1, COUNT + 1)}
    functions["broken"] = broken.with_attr("global_symbol", "broken")
    with pytest.raises(Exception, match="tvm_fill_fragment"):
        compiled(tmp_path, functions)


def test_a_program_without_kernels_has_no_code(tmp_path: Path) -> None:
    assert compiled(tmp_path, {}) == []


def test_a_body_apart_takes_addresses_and_numbers_as_they_were(tmp_path: Path) -> None:
    """Its callers are compiled apart from it, so neither order nor types may change."""

    @T.prim_func
    def kernel(x: T.handle, first: T.int64, scale: T.float32, last: T.int32, y: T.handle):
        n = T.int64()
        x_buffer = T.match_buffer(x, (n,), "float32")
        y_buffer = T.match_buffer(y, (n,), "float32")
        for i in T.serial(T.Cast("int64", last) - first):
            y_buffer[first + i] = x_buffer[first + i] * scale

    marked = {"global_symbol": "kernel", BODY_ATTRIBUTE: "kernel_body"}
    compiled(tmp_path, {"kernel": kernel.with_attrs(marked)})
    library = tvm.runtime.load_module(str(tmp_path / "all.so"))
    x, y = np.arange(100, dtype=np.float32), np.zeros(100, np.float32)
    given, result = tvm.runtime.tensor(x), tvm.runtime.tensor(y)
    library["kernel"](given, 30, 2.0, 70, result)
    y[30:70] = x[30:70] * 2
    np.testing.assert_array_equal(result.numpy(), y)
    body = ctypes.CDLL(str(tmp_path / "all.so")).kernel_body
    again = tvm.runtime.tensor(np.zeros(100, np.float32))
    addresses = [ctypes.c_void_p(np.from_dlpack(each).ctypes.data) for each in (given, again)]
    numbers = ctypes.c_int64(30), ctypes.c_float(2), ctypes.c_int32(70)
    assert body(addresses[0], *numbers, addresses[1], ctypes.c_int64(100)) == 0
    np.testing.assert_array_equal(again.numpy(), y)
