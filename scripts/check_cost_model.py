"""Check ``schedules/cpu/cost.py``: predicted against measured cycles, and the choices made.

For BERT-base's layer shapes, pruned more and more, every format the compiler would consider is
predicted and timed. A choice is wrong where the format predicted to be best is slower than dense,
or clearly slower than the best.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import typer
from kernel_timing import matmul_kernel, random_weight, simd_of

from sparse_tvm.cli.console import stdout_console
from sparse_tvm.cli.tables import plain_table
from sparse_tvm.cpu import cpu_model
from sparse_tvm.schedules.cpu.cost import dense_rows, matmul_cycles, part_counts
from sparse_tvm.schedules.cpu.matmul import WeightLayout
from sparse_tvm.schedules.cpu.simd import LANES
from sparse_tvm.sparsity.formats import occupied_blocks
from sparse_tvm.targets import TARGETS, Target, runs_here

TOKENS = 128
SHAPES = ((768, 768), (3072, 768), (768, 3072))
UNSTRUCTURED = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
BLOCKS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99)
CASES = [(s, "unstructured") for s in UNSTRUCTURED] + [(s, "4x1") for s in BLOCKS]
LAYOUTS = (
    WeightLayout("csr", (1, 1)),
    *(WeightLayout("bsr", (rows, 1)) for rows in (2, 4, 8, 16)),
)
HOPELESS = 2.0
"""Formats predicted this many times slower than the best are not timed."""

CLEARLY = 1.1


def main(
    target: Annotated[list[str] | None, typer.Option(help="Repeatable; all by default.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table here.")] = None,
) -> None:
    """Compare the cost model with measured kernels on this machine, one thread."""
    different = {
        (each.vector_bits, each.costs): name for name, each in TARGETS.items() if runs_here(each)
    }
    names = target or list(different.values())
    lines = [f"{cpu_model()}, {TOKENS} tokens, 1 thread", ""]
    for name in names:
        lines += check(TARGETS[name])
    if markdown:
        markdown.write_text("\n".join(lines), encoding="utf-8")


def check(target: Target) -> list[str]:
    """Measure one target; print the table and return it as Markdown."""
    cases = [
        (shape, sparsity, structure, dict(measure(target, shape, sparsity, structure)))
        for shape in SHAPES
        for sparsity, structure in CASES
    ]
    dense = {shape: dense_cycles(target, shape) for shape in SHAPES}
    figures = [pair for *_, measured in cases for pair in measured.values()] + [*dense.values()]
    # Predictions are in cycles of a clock that we do not know.
    clock = median(predicted / seconds for predicted, seconds in figures)
    header = ["N x K", "zeros", "choice", "us", "dense", "best", "us", "predicted / measured", ""]
    table = plain_table(*header, numbers=("zeros", "us", "dense", "predicted / measured"))
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    wrong = 0
    for shape, sparsity, structure, measured in cases:
        every = {**measured, "dense": dense[shape]}
        choice = min(every, key=lambda name: every[name][0])
        best = min(every, key=lambda name: every[name][1])
        seconds, least = every[choice][1], every[best][1]
        verdict = ""
        if seconds > dense[shape][1] * 1.02:
            verdict = f"slower than dense: {seconds / dense[shape][1]:.2f}"
        elif seconds > CLEARLY * least:
            verdict = f"not the best: {seconds / least:.2f}"
        wrong += bool(verdict)
        ratios = ", ".join(
            f"{name} {predicted / measured / clock:.2f}"
            for name, (predicted, measured) in every.items()
        )
        row = [
            f"{shape[0]} x {shape[1]}",
            f"{sparsity:.0%} {structure}",
            choice,
            f"{seconds * 1e6:.0f}",
            f"{dense[shape][1] * 1e6:.0f}",
            best,
            f"{least * 1e6:.0f}",
            ratios,
            verdict,
        ]
        table.add_row(*row)
        lines.append(f"| {' | '.join(row)} |")
    title = (
        f"{target.name}: {wrong} of {len(cases)} choices are wrong; "
        f"predicted cycles fit a clock of {clock / 1e9:.1f} GHz"
    )
    stdout_console().print(title, table, sep="\n")
    return [title, "", *lines, ""]


def measure(
    target: Target, shape: tuple[int, int], sparsity: float, structure: str
) -> Iterator[tuple[str, tuple[float, float]]]:
    """Predicted cycles and measured seconds of the sparse formats worth a look."""
    w = random_weight(shape, sparsity, structure)
    mask = w != 0
    predicted = {
        layout: _cycles(target, shape, layout, int(occupied_blocks(mask, layout.block).sum()))
        for each in LAYOUTS
        for layout in in_parts(each, shape[1], target)
    }
    limit = HOPELESS * min(*predicted.values(), dense_cycles_predicted(target, shape))
    for layout, cycles in predicted.items():
        if cycles <= limit:
            name = "csr" if layout.format == "csr" else f"{layout.block[0]}x1"
            name += f" in {layout.parts}" if layout.parts > 1 else ""
            yield name, (cycles, matmul_kernel(w, layout, TOKENS, target).seconds())


def in_parts(layout: WeightLayout, k_in: int, target: Target) -> list[WeightLayout]:
    """The layout in every number of parts that the compiler would consider."""
    return [replace(layout, parts=n) for n in part_counts(k_in, layout.block[0], target)]


def dense_cycles(target: Target, shape: tuple[int, int]) -> tuple[float, float]:
    """Predicted cycles and measured seconds of the dense kernel."""
    layout = _dense(target, shape)
    kernel = matmul_kernel(random_weight(shape, 0, ""), layout, TOKENS, target)
    return dense_cycles_predicted(target, shape), kernel.seconds()


def dense_cycles_predicted(target: Target, shape: tuple[int, int]) -> float:
    layout = _dense(target, shape)
    return _cycles(target, shape, layout, -(-shape[0] // layout.block[0]) * shape[1])


def _dense(target: Target, shape: tuple[int, int]) -> WeightLayout:
    return WeightLayout("dense", (dense_rows(shape[0], simd_of(target)), 1))


def _cycles(target: Target, shape: tuple[int, int], layout: WeightLayout, blocks: int) -> float:
    return matmul_cycles(shape, layout, blocks, target) * np.ceil(TOKENS / LANES)


if __name__ == "__main__":
    typer.run(main)
