"""Calls of the instructions that kernels use; ``instructions.h`` says what each of them does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

PRELUDE = Path(__file__).with_suffix(".h").read_text(encoding="utf-8").replace("#pragma once\n", "")
"""What stands before the code of every module."""

Expr = Any
Buffer = Any


def address(buffer: Buffer, index: Expr) -> Expr:
    """Address of an element of a flat buffer."""
    return tirx.address_of(buffer[index])


def call(name: str, *args: Expr) -> None:
    """Call a function of the prelude that returns nothing."""
    T.evaluate(tirx.call_extern("void", f"stvm_{name}", *args))


def copy16(shared: Expr, source: Expr, valid: Expr) -> None:
    """Copy 16 bytes to shared memory, to be there after :func:`wait`; zeros unless valid."""
    call("copy16", shared, source, tirx.Cast("int32", valid))


def commit() -> None:
    """End a group of copies."""
    call("commit")


def wait(pending: int) -> None:
    """Wait until all but the last ``pending`` groups of copies are there."""
    call(f"wait_{pending}")


def await_previous() -> None:
    """Wait for the kernels before, then let the next one start: what every kernel does first."""
    call("await_previous")


def barrier() -> None:
    """Wait for all threads of the block."""
    T.evaluate(tirx.call_intrin("void", "tirx.tvm_storage_sync", "shared"))


def load_matrices(words: Buffer, first: int, row: Expr) -> None:
    """Load four 8 x 8 matrices into four words."""
    call("load_matrices", address(words, first), row)


def load_transposed(words: Buffer, first: int, row: Expr) -> None:
    """Load four 8 x 8 matrices, each transposed, into four words."""
    call("load_transposed", address(words, first), row)


def value(name: str, *args: Expr, dtype: str = "float32") -> Expr:
    """What a function of the prelude returns."""
    return tirx.call_extern(dtype, f"stvm_{name}", *args)


def multiply(
    sums: Buffer, d: int, words: Buffer, a: int, others: Buffer, b: int, dtype: str = "float16"
) -> None:
    """``D += A B``, 16 x 8 x 16, from registers that begin at these indices."""
    call(_of("multiply", dtype), address(sums, d), address(words, a), address(others, b))


def multiply_2_of_4(
    sums: Buffer,
    d: int,
    words: Buffer,
    a: int,
    others: Buffer,
    b: int,
    places: Expr,
    dtype: str = "float16",
) -> None:
    """``D += A B``, 16 x 8 x 32, A being 2:4 sparse."""
    name = _of("multiply_2_of_4", dtype)
    call(name, address(sums, d), address(words, a), address(others, b), places)


def multiply_add(
    sums: Buffer, first: int, count: int, x: Expr, pair: Expr, dtype: str = "float16"
) -> None:
    """Multiply-add so many tokens at x by the value of a pair, 2, 4 or 8."""
    call(f"{_of('multiply_add', dtype)}_{count}", address(sums, first), x, pair)


def add_lanes(sums: Buffer, index: int, bit: int) -> None:
    """Add to a sum that of the thread whose number differs in one bit."""
    call("add_lanes", address(sums, index), bit)


def pack(first: Expr, second: Expr, dtype: str = "float16") -> Expr:
    """Two float32 as a word of two 16-bit floats."""
    return value(_of("pack", dtype), first, second, dtype="uint32")


def unpack(word: Expr, which: int, dtype: str = "float16") -> Expr:
    """One of the two 16-bit floats of a word."""
    return value(_of("unpack", dtype), word, which)


def _of(name: str, dtype: str) -> str:
    """A function's name for elements of a type."""
    return name if dtype == "float16" else f"{name}_{dtype}"
