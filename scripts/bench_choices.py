"""Whether the compiler's own choice is ever slower than dense: layers of every sparsity and length.

    python scripts/bench_choices.py                     # in every precision the CPU computes in
    python scripts/bench_choices.py --precision int8 --tokens 16
    python scripts/bench_choices.py --tokens 1 --copies 12       # weights come from memory

A layer is pruned without structure, and its weight stored as the compiler chooses for so many
tokens, in each precision. Where that is not dense, both kernels compute the same pruned layer in
turns, their outputs are compared with NumPy's, and medians are printed. It fails where the choice
is clearly slower than dense in the same precision.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer
from bench_precision import Form, Timed, medians
from kernel_timing import random_weight

from sparse_tvm.backends import get_backend
from sparse_tvm.cli.console import stdout_console
from sparse_tvm.cli.tables import plain_table
from sparse_tvm.cpu import allow_amx, cpu_model, use_threads
from sparse_tvm.families import Wish
from sparse_tvm.operators import PRECISIONS, Dense, Layout
from sparse_tvm.targets import Target, get_target

NAMES = list(PRECISIONS)
SHAPES = ["768x3072", "3072x768"]
TOKENS = [1, 16, 128, 1024]
SPARSITIES = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
NOISE = 1.05
"""A choice may be measured this much slower than dense and still count as not slower."""


def main(
    precision: Annotated[list[str], typer.Option(help="Repeatable.")] = NAMES,
    shape: Annotated[list[str], typer.Option(help="Outputs x inputs; repeatable.")] = SHAPES,
    tokens: Annotated[list[int], typer.Option(help="Repeatable.")] = TOKENS,
    threads: Annotated[int, typer.Option(help="Of every kernel.")] = 1,
    seconds: Annotated[float, typer.Option(help="Of timing, per kernel.")] = 0.3,
    copies: Annotated[int, typer.Option(help="Of each weight, in turn: too many for caches.")] = 1,
) -> None:
    """Compare choices with dense kernels on this machine."""
    target = get_target("native")
    allow_amx()
    use_threads(threads)
    columns = ["layer", "tokens", "zeros", "choice", "us", "dense us", "gain"]
    title = f"{cpu_model()}, target {target.name}, {threads} threads"
    table = plain_table(title, *columns, numbers=("tokens", "zeros", "us", "dense us", "gain"))
    failures = []
    for name in precision:
        _, refusal = layer(name, (64, 64), target)
        if refusal is not None:
            print(f"{name}: {refusal}")
            continue
        for size in shape:
            for count in tokens:
                for zeros, layout, times in compared(name, size, count, target, seconds, copies):
                    one, dense = (1e6 * value for value in times)
                    row = f"{size} {name}", f"{count}", f"{zeros:.0%}", _named(layout)
                    table.add_row(*row, f"{one:.1f}", f"{dense:.1f}", f"{dense / one:.2f}")
                    if one > NOISE * dense:
                        failures.append(f"{' '.join(row)}: {one / dense:.2f} times dense's time")
    stdout_console().print(table)
    if failures:
        sys.exit("\n".join(failures))


def compared(
    precision: str, size: str, tokens: int, target: Target, seconds: float, copies: int
) -> list[tuple[float, Layout, tuple[float, float]]]:
    """Each sparsity at which the choice is not dense: the choice, its seconds and dense's."""
    n, k = map(int, size.split("x"))
    auto, dense = (
        Form(title, "unstructured", precision, wish=wish)
        for title, wish in (("auto", None), ("dense", Wish("dense")))
    )
    calls: dict[object, Callable[[], None]] = {}
    chosen = {}
    for zeros in SPARSITIES:
        w = random_weight((n, k), zeros, "unstructured")
        op, _ = layer(precision, (n, k), target)
        if auto.layout(op, w, target, tokens).sparse:
            kernel = Timed(auto, w, tokens, target, copies)
            chosen[zeros] = kernel.layout
            calls[zeros] = kernel
            if "dense" not in calls:
                calls["dense"] = Timed(dense, w, tokens, target, copies)
    if not chosen:
        return []
    times = {key: t / copies for key, t in medians(calls, seconds * len(calls)).items()}
    return [(zeros, layout, (times[zeros], times["dense"])) for zeros, layout in chosen.items()]


def layer(precision: str, matrix: tuple[int, int], target: Target) -> tuple[Dense, str | None]:
    op = Dense(layer="layer", matrix=matrix)
    return get_backend("cpu").in_precision(op, precision, target)


def _named(layout: Layout) -> str:
    rows, columns = layout.block
    block = f" {rows}x{columns}" if layout.format == "bsr" else ""
    more = "".join(f", {key} {value}" for key, value in layout.parameters)
    return f"{layout.family} {layout.format}{block}{more}"


if __name__ == "__main__":
    typer.run(main)
