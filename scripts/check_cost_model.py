"""Check ``schedules/cpu/cost.py``: predicted against measured cycles, and the choices made.

For BERT-base's layer shapes, pruned more and more, every format the compiler would consider is
predicted and timed. A choice is wrong where the format predicted to be best is slower than dense,
or clearly slower than the best.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import typer
from kernel_timing import matmul_kernel, random_weight

from sparse_tvm.cli.console import stdout_console
from sparse_tvm.cli.tables import plain_table
from sparse_tvm.cpu import cpu_model
from sparse_tvm.families import Wish
from sparse_tvm.operators import Dense, Layout
from sparse_tvm.schedules.cpu.families.matmul import MatmulFamily
from sparse_tvm.sparsity.statistics import MeasuredWeight
from sparse_tvm.targets import TARGETS, Target, runs_here

TOKENS = 128
SHAPES = ((768, 768), (3072, 768), (768, 3072))
UNSTRUCTURED = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
BLOCKS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99)
CASES = [(s, "unstructured") for s in UNSTRUCTURED] + [(s, "4x1") for s in BLOCKS]
FAMILY = MatmulFamily()
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
    dense = {shape: dense_seconds(target, shape) for shape in SHAPES}
    figures = [pair for *_, measured in cases for pair in measured.values()] + [*dense.values()]
    # Our machine's clock need not be the target's.
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
        f"predicted seconds fit a clock of {target.costs.ghz * clock:.1f} GHz"
    )
    stdout_console().print(title, table, sep="\n")
    return [title, "", *lines, ""]


def measure(
    target: Target, shape: tuple[int, int], sparsity: float, structure: str
) -> Iterator[tuple[str, tuple[float, float]]]:
    """Predicted and measured seconds of the sparse layouts worth a look."""
    w = random_weight(shape, sparsity, structure)
    predicted = predictions(target, w)
    limit = HOPELESS * min(predicted.values())
    for layout, seconds in predicted.items():
        if layout.sparse and seconds <= limit:
            parts = layout.get("parts", 1)
            name = "csr" if layout.format == "csr" else f"{layout.block[0]}x1"
            name += f" in {parts}" if parts > 1 else ""
            yield name, (seconds, matmul_kernel(w, layout, TOKENS, target).seconds())


def dense_seconds(target: Target, shape: tuple[int, int]) -> tuple[float, float]:
    """Predicted and measured seconds of the dense kernel that the compiler would choose."""
    w = random_weight(shape, 0, "")
    offers = FAMILY.candidates(_layer(w), MeasuredWeight(w), target, Wish("dense"))
    predicted = predictions(target, w)
    dense = min(offers, key=lambda layout: predicted[layout])
    return predicted[dense], matmul_kernel(w, dense, TOKENS, target).seconds()


def predictions(target: Target, w: np.ndarray) -> dict[Layout, float]:
    """Predicted seconds of every layout that the compiler would consider."""
    op, weight = _layer(w), MeasuredWeight(w)
    return {
        layout: FAMILY.cost(op, layout, weight, TOKENS, target)
        for layout in FAMILY.candidates(op, weight, target)
    }


def _layer(w: np.ndarray) -> Dense:
    return Dense(layer="layer", matrix=(w.shape[0], w.shape[1]))


if __name__ == "__main__":
    typer.run(main)
