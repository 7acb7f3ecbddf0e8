"""Calls of Hopper's instructions; ``warpgroup.h`` says what each of them does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tvm import tirx

from sparse_tvm.schedules.cuda.instructions import address, call

Expr = Any
Buffer = Any

COLUMNS = (64, 128, 192, 256)
"""Columns of the products there are; they have 64 rows."""


def _product(columns: int, structured: bool) -> str:
    """The function of products of 64 rows by so many columns, as C++.

    ``D = A B^T`` or ``D += A B^T``: A has 64 rows of 16 columns in shared memory, or of 32 of which
    16 are stored, and B as many columns. Both are rows of 128 bytes, a 2:4 A of 64.
    """
    sums = columns // 2
    results = ", ".join(f'"+f"(d[{i}])' for i in range(sums))
    registers = ", ".join(f"%{i}" for i in range(sums))
    sparse, k = (".sp", 32) if structured else ("", 16)
    name = f"stvm_multiply_2_of_4_{columns}" if structured else f"stvm_multiply_{columns}"
    places, word = (", stvm_word places", f", %{sums + 2}, 0") if structured else ("", "")
    inputs = f'"l"(stvm_tile<{64 if structured else 128}>(a)), "l"(stvm_tile<128>(b))'
    inputs += ', "r"(places), "r"(keep)' if structured else ', "r"(keep)'
    twin = "stvm_products_2_of_4" if structured else "stvm_products"
    given = "places, keep" if structured else "keep"
    return f"""
STVM_FUNCTION void {name}(float* d, const void* a, const void* b{places}, int keep) {{
#ifdef __CUDACC__
  asm volatile("{{ .reg .pred keep; setp.ne.b32 keep, %{sums + (3 if structured else 2)}, 0; "
               "wgmma.mma_async{sparse}.sync.aligned.m64n{columns}k{k}.f32.f16.f16 "
               "{{{registers}}}, %{sums}, %{sums + 1}{word}, keep, 1, 1, 0, 0; }}"
               : {results} : {inputs});
#else
  {twin}<{columns}>(d, a, b, {given});
#endif
}}
"""


PRELUDE = Path(__file__).with_suffix(".h").read_text(encoding="utf-8") + "".join(
    _product(columns, structured) for columns in COLUMNS for structured in (False, True)
)
"""What stands before the code of modules that call these, after that of ``instructions.py``."""


def uses_warpgroups(source: str) -> bool:
    """Whether code calls instructions that only GPUs of compute capability 9.0 have."""
    return "stvm_products_begin" in source


def barrier_init(barrier: Expr, arrivals: int) -> None:
    """Begin counting arrivals."""
    call("barrier_init", barrier, arrivals)


def barrier_expect(barrier: Expr, count: Expr) -> None:
    """Arrive, and announce so many bytes."""
    call("barrier_expect", barrier, count)


def barrier_arrive(barrier: Expr) -> None:
    """Arrive."""
    call("barrier_arrive", barrier)


def barrier_wait(barrier: Expr, parity: Expr) -> None:
    """Wait until a phase of this parity has ended."""
    call("barrier_wait", barrier, parity)


def fence_barriers() -> None:
    """Make barriers visible to copies."""
    call("fence_barriers")


def fence_shared() -> None:
    """Make what this thread wrote to shared memory visible to copies."""
    call("fence_shared")


def copy_bytes(shared: Expr, source: Expr, count: int, barrier: Expr) -> None:
    """Copy ``count`` bytes to shared memory; the barrier gets them."""
    call("copy_bytes", shared, source, count, barrier)


def copy_box(shared: Expr, tensor_map: Expr, column: Expr, row: Expr, barrier: Expr) -> None:
    """Copy a box of a matrix to shared memory; the barrier gets its bytes."""
    call("copy_box", shared, tirx.address_of(tensor_map), column, row, barrier)


def store_box(tensor_map: Expr, column: Expr, row: Expr, shared: Expr) -> None:
    """Copy a box from shared memory to a matrix, as far as it is inside."""
    call("store_box", tirx.address_of(tensor_map), column, row, shared)


def stores_commit() -> None:
    """After the last of some boxes that this thread stores."""
    call("stores_commit")


def stores_wait() -> None:
    """Wait until the boxes that this thread stores have left shared memory."""
    call("stores_wait")


def prefetch_map(tensor_map: Expr) -> None:
    """Fetch a map before the first copy of one of its boxes."""
    call("prefetch_map", tirx.address_of(tensor_map))


def sync_threads(number: Expr, threads: int) -> None:
    """Wait for so many threads."""
    call("sync_threads", number, threads)


def leave_registers() -> None:
    """Leave what a copying warpgroup does not need to the others: 24 a thread stay."""
    call("dec_24")


def take_registers() -> None:
    """Take what the copying warpgroup left: two warpgroups of three get 240 a thread."""
    call("inc_240")


def products_begin() -> None:
    """Before the first of some products."""
    call("products_begin")


def products_commit() -> None:
    """After the last of some products."""
    call("products_commit")


def products_wait(pending: int) -> None:
    """Wait until all but the last ``pending`` groups of products are done."""
    call(f"products_wait_{pending}")


def multiply(columns: int, sums: Buffer, d: int, a: Expr, b: Expr, keep: Expr) -> None:
    """``D = A B^T``, 64 x columns x 16, added to the sums from d on where ``keep`` is not 0."""
    call(f"multiply_{columns}", address(sums, d), a, b, keep)


def multiply_2_of_4(
    columns: int, sums: Buffer, d: int, a: Expr, b: Expr, places: Expr, keep: Expr
) -> None:
    """``D = A B^T``, 64 x columns x 32, A being 2:4 sparse."""
    call(f"multiply_2_of_4_{columns}", address(sums, d), a, b, places, keep)


def pack(low: Expr, high: Expr) -> Expr:
    """Two float32 as float16 in a word."""
    return tirx.call_extern("uint32", "stvm_pack_finite", low, high)


def add_pairs(a: Expr, b: Expr) -> Expr:
    """The sums of two pairs of float16."""
    return tirx.call_extern("uint32", "stvm_add_pairs", a, b)


def store_matrices(row: Expr, words: list[Expr]) -> None:
    """Store four 8 x 8 matrices, transposed."""
    call("store_matrices", row, *words)
