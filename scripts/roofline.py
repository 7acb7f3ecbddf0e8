"""How near our kernels come to what this machine can do.

Measures the machine with small kernels from the same code generator: the FMA peak, and the
bandwidth of reading sequentially, and of reading rows of 256 bytes in random order, which is what
a sparse layer does with its input. Then it times the kernels of BERT-base's layers and compares
each with its bound: the longest of its FMAs at the peak, its operands' loads at the bandwidth
measured for exactly as many rows as its input has, and its weights at sequential bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from kernel_timing import matmul_kernel, random_weight, simd_of

from sparse_tvm.backends import get_backend
from sparse_tvm.cli.console import stdout_console
from sparse_tvm.cli.tables import plain_table
from sparse_tvm.cpu import cpu_model, usable_cores
from sparse_tvm.machine_limits import ROW_BYTES, Kernel, Machine, build
from sparse_tvm.operators import Activation, Bias, Dense, Layout, Residual, Step
from sparse_tvm.passes.formats import FormatOptions
from sparse_tvm.passes.layout_choice import choose
from sparse_tvm.report.tables import human_bytes
from sparse_tvm.schedules.cpu.attention import attention
from sparse_tvm.schedules.cpu.attention_operands import AttentionProblem, InTiles
from sparse_tvm.schedules.cpu.lane_tiles import Tiles
from sparse_tvm.schedules.cpu.normalize import layer_norm
from sparse_tvm.schedules.cpu.simd import LANES, group_of
from sparse_tvm.sparsity.statistics import MeasuredWeight
from sparse_tvm.targets import get_target

TOKENS = 128
HIDDEN, HEADS, INTERMEDIATE = 768, 12, 3072
LAYERS = ((HIDDEN, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
SIZES = (16 << 10, 192 << 10, 768 << 10, 8 << 20, 256 << 20)


def main(
    target: Annotated[str, typer.Option(help="As sparse-tvm compile --target.")] = "native",
    threads: Annotated[list[int] | None, typer.Option(help="Repeatable.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables here.")] = None,
) -> None:
    """Measure this machine's limits and our kernels' distance from them."""
    counts = list(dict.fromkeys(threads or [1, usable_cores()]))
    machine = Machine(get_target(target))
    lines = [f"{cpu_model()}, target {machine.target.name}, {TOKENS} tokens", ""]
    lines += show(["limit", *map(_threads, counts)], machine_rows(machine, counts))
    header = ["kernel", "MFLOP", "bound by", *[c for n in counts for c in (_threads(n), "reached")]]
    lines += show(header, kernel_rows(machine, counts))
    if markdown:
        markdown.write_text("\n".join(lines), encoding="utf-8")


@dataclass(frozen=True)
class Work:
    """A kernel and what it has to do.

    Attributes
    ----------
    title : str
        For the table.
    kernel : Kernel
        Ready to run.
    flops : float
        Two per multiply-add that counts: zeros do not.
    loads, rows : float, int
        Bytes of operands read into registers, in units of rows, from an array of so many rows.
    weights : float
        Bytes of weights, read once per group of tiles.
    """

    title: str
    kernel: Kernel
    flops: float
    loads: float
    rows: int
    weights: float

    def bounds(self, machine: Machine, threads: int) -> dict[str, float]:
        """Least seconds for each resource."""
        random = machine.bandwidth(self.rows * ROW_BYTES, "random", threads)
        sequential = machine.bandwidth(SIZES[3], "sequential", threads)
        return {
            "FMA": self.flops / machine.flops(threads),
            "loads": self.loads / random,
            "weights": self.weights / sequential,
        }


def layer_work(
    machine: Machine, shape: tuple[int, int], sparsity: float, format: str, structure: str
) -> Work:
    """One linear layer, with its bias, in the layout that the compiler chooses for this format."""
    w = random_weight(shape, sparsity, structure)
    options = FormatOptions(format, (4, 1) if format == "bsr" else None)
    op, backend = Dense(layer="layer", matrix=shape), get_backend("cpu")
    layout = choose(op, MeasuredWeight(w), options, backend, machine.target).layout
    parts = layout.get("parts", 1)
    kernel = matmul_kernel(w, layout, TOKENS, machine.target, [Bias()])
    groups = TOKENS // LANES // group_of(layout, simd_of(machine.target))
    nnz = np.count_nonzero(w)
    name = layout.format + (f" {layout.block[0]}x1" if layout.format == "bsr" else "")
    name += f" {sparsity:.0%}" if layout.sparse else ""
    name += f" in {parts} parts" if parts > 1 else ""
    return Work(
        f"{name}, {shape[1]} to {shape[0]}",
        kernel,
        flops=2.0 * TOKENS * nnz,
        loads=4.0 * TOKENS * nnz / layout.block[0],
        rows=shape[1] // parts // 2 * 2,
        weights=float(groups * (nnz * 4 + (nnz / layout.block[0] * 2 if layout.sparse else 0))),
    )


def works(machine: Machine) -> Iterator[Work]:
    """The kernels of BERT-base."""
    simd = simd_of(machine.target)
    for shape in LAYERS:
        yield layer_work(machine, shape, 0, "dense", "unstructured")
        for sparsity in (0.8, 0.9, 0.95):
            yield layer_work(machine, shape, sparsity, "csr", "unstructured")
        for sparsity in (0.8, 0.9, 0.95):
            yield layer_work(machine, shape, sparsity, "bsr", "4x1")
    rng = np.random.default_rng(0)
    tiles, shape = Tiles(1, TOKENS // LANES), (1, TOKENS // LANES, HIDDEN, LANES)
    x = [rng.standard_normal(shape, np.float32) for _ in range(4)]
    size = HIDDEN // HEADS
    rows = InTiles(tiles, HEADS, size)
    problem = AttentionProblem(rows, rows, rows, tiles, None, TOKENS, size**-0.5, None)
    function = attention(problem, simd)
    yield Work(
        f"attention, {HEADS} x {size}",
        build(function, x, machine.target),
        flops=4.0 * TOKENS * TOKENS * HIDDEN,
        loads=0.0,
        rows=TOKENS,
        weights=0.0,
    )
    gains = [rng.standard_normal(HIDDEN, np.float32) for _ in range(2)]
    yield Work(
        f"layer norm, {HIDDEN}",
        build(layer_norm(tiles, HIDDEN, 1e-12, simd), [x[0], *gains, x[1]], machine.target),
        flops=7.0 * TOKENS * HIDDEN,
        loads=3 * 4.0 * TOKENS * HIDDEN,
        rows=HIDDEN,
        weights=0.0,
    )


def machine_rows(machine: Machine, counts: Sequence[int]) -> Iterator[list[str]]:
    yield ["FMA", *[f"{machine.flops(n) / 1e9:.0f} GFLOP/s" for n in counts]]
    for pattern in ("sequential", "random"):
        for size in SIZES:
            what = f"{pattern}, {human_bytes(size)}"
            rates = [machine.bandwidth(size, pattern, n) / 1e9 for n in counts]
            yield [what, *[f"{rate:.0f} GB/s" for rate in rates]]


def kernel_rows(machine: Machine, counts: Sequence[int]) -> Iterator[list[str]]:
    for work in works(machine):
        cells: list[str] = []
        for n in counts:
            seconds, bounds = work.kernel.seconds(n), work.bounds(machine, n)
            bound = max(bounds, key=lambda name: bounds[name])
            cells += [
                f"{seconds * 1e3:.3f} ms, {work.flops / seconds / 1e9:.0f} GFLOP/s",
                f"{bounds[bound] / seconds:.0%}",
            ]
            if n == counts[0]:
                first = bound
        yield [work.title, f"{work.flops / 1e6:.1f}", first, *cells]
    yield from epilogue_rows(machine, counts)


def epilogue_rows(machine: Machine, counts: Sequence[int]) -> Iterator[list[str]]:
    """What steps fused behind a layer cost."""
    w = random_weight((INTERMEDIATE, HIDDEN), 0.95, "unstructured")

    def seconds_of(steps: list[Step]) -> Callable[[int], float]:
        layout = Layout("matmul", "csr")
        return matmul_kernel(w, layout, TOKENS, machine.target, steps).seconds

    plain = seconds_of([Bias()])
    for steps in ([Bias(), Residual()], [Bias(), Activation("gelu")]):
        fused = seconds_of(steps)
        extra = [1e3 * (fused(n) - plain(n)) for n in counts]
        cells = [text for ms in extra for text in (f"{ms:+.3f} ms", "")]
        yield [f"{steps[-1]} behind {HIDDEN} to {INTERMEDIATE}", "", "", *cells]


def show(header: Sequence[str], rows: Iterator[list[str]]) -> list[str]:
    """Print a table and return it as Markdown."""
    table = plain_table(*header, numbers=header[1:])
    lines = [f"| {' | '.join(header)} |", f"| --- |{' ---: |' * (len(header) - 1)}"]
    for row in rows:
        table.add_row(*row)
        lines.append(f"| {' | '.join(row)} |")
    stdout_console().print(table)
    return [*lines, ""]


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


if __name__ == "__main__":
    typer.run(main)
