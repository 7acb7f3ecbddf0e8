"""How near the inner loops come to a CPU's multiply-add peak, by LLVM's model of the CPU.

Compiles kernels for Arm targets, takes the inner loop with the most multiply-adds of each, and asks
llvm-mca for the cycles of an iteration: what the core needs when every load hits the first cache
and every branch is foreseen. It needs no Arm machine; ``llvm-mca`` is in Debian's ``llvm-19``.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tvm
import typer
from tvm import tirx

from sparse_tvm.cli.console import stdout_console
from sparse_tvm.cli.tables import plain_table
from sparse_tvm.operators import Layout
from sparse_tvm.schedules.arm.instructions import CODE, MULTIPLY_ADD
from sparse_tvm.schedules.arm.units import BFDOT, DOTS
from sparse_tvm.schedules.cpu.attention import attention
from sparse_tvm.schedules.cpu.attention_operands import AttentionProblem, InTiles
from sparse_tvm.schedules.cpu.bf16_attention import Bf16Attention
from sparse_tvm.schedules.cpu.bf16_dot import with_code
from sparse_tvm.schedules.cpu.cost import dense_rows
from sparse_tvm.schedules.cpu.dot_attention import dot_attention
from sparse_tvm.schedules.cpu.dot_matmul import dot_matmul
from sparse_tvm.schedules.cpu.intrinsics import FAST_MATH
from sparse_tvm.schedules.cpu.lane_tiles import Tiles
from sparse_tvm.schedules.cpu.low_matmul import LowMatmul
from sparse_tvm.schedules.cpu.matmul import matmul
from sparse_tvm.schedules.cpu.simd import LANES, Simd
from sparse_tvm.targets import Target, get_target

CPUS = ("cortex-a72", "neoverse-n1", "neoverse-n2", "neoverse-v1", "neoverse-v2")
TOOLS = ("llvm-mca-22", "llvm-mca-21", "llvm-mca-20", "llvm-mca-19", "llvm-mca")
HIDDEN, HEADS, TOKENS = 768, 12, 128
ITERATIONS = 200
ENOUGH = 0.95

_LABEL = re.compile(r"^(\.L\w+):")
_BRANCH = re.compile(r"^\s+(?:b\.\w+|cbn?z|tbn?z)\s+(?:.*,\s*)?(\.L\w+)")
_FMA = re.compile(r"^\s+(?:fml[as]|sdot|bfdot|smmla|bfmmla)\s+v\d+\.4s")


@dataclass(frozen=True)
class Loop:
    """An inner loop.

    Attributes
    ----------
    code : str
        One iteration, without its label.
    fmas : int
        Its vector multiply-adds, dot products or products of pairs, of which a CPU has as many a
        cycle.
    """

    code: str
    fmas: int

    @property
    def others(self) -> int:
        """Its other instructions."""
        return len(self.code.splitlines()) - self.fmas

    @property
    def weaves(self) -> bool:
        """Whether it brings words of two lines beside each other."""
        return bool(re.search(r"^\s+zip2\s", self.code, re.MULTILINE)) and not self.fmas

    @property
    def spills(self) -> int:
        """Accesses to the stack."""
        return len(re.findall(r"\[sp\b", self.code))


def main(
    cpu: Annotated[list[str] | None, typer.Option(help="Repeatable.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table here.")] = None,
) -> None:
    """Print each kernel's share of the multiply-add peak on each CPU."""
    targets = [get_target(name) for name in cpu or CPUS]
    columns = [dict(shares(target)) for target in targets]
    header = ["kernel", *[target.name for target in targets]]
    titles = dict.fromkeys(title for column in columns for title in column)
    rows = [[title, *[column.get(title, "-") for column in columns]] for title in titles]
    table = plain_table(*header, numbers=header[1:])
    for row in rows:
        table.add_row(*row)
    stdout_console().print(table)
    if markdown:
        lines = [f"| {' | '.join(header)} |", f"|---|{'---:|' * len(targets)}"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        markdown.write_text("\n".join([*lines, ""]), encoding="utf-8")


def shares(target: Target) -> Iterator[tuple[str, str]]:
    """Titles of kernels and what their inner loops reach."""
    simd, tiles = Simd.of(target), Tiles(1, TOKENS // LANES)
    dense = dense_rows(HIDDEN, simd)
    for title, format, rows in (
        (f"dense, {dense} rows", "dense", dense),
        ("CSR", "csr", 1),
        ("BSR 2x1", "bsr", 2),
        ("BSR 4x1", "bsr", 4),
    ):
        layout = Layout("matmul", format, (rows, 1))
        kernel = matmul(tiles, TOKENS, HIDDEN, HIDDEN, layout, [], simd)
        yield title, cell([longest_loop(kernel, target)], target)
    for dot in DOTS:
        if not target.has(*dot.features):
            continue
        precision = dot.precision
        problem = LowMatmul(tiles, HIDDEN, HIDDEN, precision, rows=TOKENS)
        columns = precision.unit * dot.depth
        for title, rows, sparse in (
            (f", dense, {dense} rows", dense, False),
            (f" {dot.depth}x{columns}", dot.depth, True),
            (f" 4x{columns}", 4, True),
        ):
            multiply_add = MULTIPLY_ADD[dot.name]
            kernel = dot_matmul(problem, rows, sparse, simd, multiply_add, depth=dot.depth)
            kernel = with_code(kernel, CODE.get(dot.name))
            yield f"{dot.name}{title}", cell([longest_loop(kernel, target)], target)
            if dot.depth > 1 and not sparse:
                weaving = next(
                    loop for loop in inner_loops(assembly(kernel, target)) if loop.weaves
                )
                cycles, _ = cycles_of(weaving, target)
                yield f"{dot.name}, weaving two lines", f"{cycles:.1f} cycles"
    size = HIDDEN // HEADS
    rows = InTiles(tiles, HEADS, size)
    problem = AttentionProblem(rows, rows, rows, tiles, None, TOKENS, size**-0.5, None)
    yield from attention_cells("attention", attention(problem, simd), target)
    if target.has(*BFDOT.features):
        scale = size**-0.5
        low = Bf16Attention(tiles, tiles, TOKENS, HEADS, size, size, scale)
        kernel = dot_attention(low, simd, MULTIPLY_ADD[BFDOT.name])
        kernel = with_code(kernel, CODE[BFDOT.name])
        yield from attention_cells("bfdot attention", kernel, target)


def attention_cells(title: str, kernel: tirx.PrimFunc, target: Target) -> Iterator[tuple[str, str]]:
    """The two products of an attention."""
    loops = [loop for loop in inner_loops(assembly(kernel, target)) if loop.fmas]
    exponentials = max(range(len(loops)), key=lambda i: loops[i].others)  # between the two
    yield f"{title}, scores", cell(loops[:exponentials], target)
    yield f"{title}, values", cell(loops[exponentials + 1 :], target)


def longest_loop(kernel: tirx.PrimFunc, target: Target) -> Loop:
    """The inner loop with the most multiply-adds."""
    return max(inner_loops(assembly(kernel, target)), key=lambda loop: loop.fmas)


def assembly(function: tirx.PrimFunc, target: Target) -> str:
    """A kernel's code for a target."""
    with tvm.transform.PassContext(opt_level=3, config=FAST_MATH):
        built = tvm.compile(
            function.with_attr("global_symbol", "kernel"),
            target=tvm.target.Target(target.tvm_target()),
        )
    return str(built.mod.inspect_source("asm"))


def inner_loops(code: str) -> Iterator[Loop]:
    """Loops without a label inside, in order."""
    label, body = "", list[str]()
    for line in code.splitlines():
        if found := _LABEL.match(line):
            label, body = found[1], []
            continue
        if line.lstrip().startswith("//"):  # around instructions that are named as such
            continue
        body.append(line)
        branch = _BRANCH.match(line)
        if branch and branch[1] == label:
            yield Loop("\n".join(body), sum(bool(_FMA.match(each)) for each in body))


def cell(loops: Sequence[Loop], target: Target) -> str:
    """The least share of the peak, what bounds it where that is less, and spills if any."""
    shares, bounds = zip(*[reached(loop, target) for loop in loops], strict=True)
    text = f"{min(shares):.0%}"
    if min(bounds) < ENOUGH:
        text += f" of {min(bounds):.0%}"
    spills = max(loop.spills for loop in loops)
    return text + (f", {spills} spills" if spills else "")


def reached(loop: Loop, target: Target) -> tuple[float, float]:
    """Shares of the multiply-add peak: with all dependencies, and by each unit's work alone."""
    least = loop.fmas * target.costs.fma
    cycles, bound = cycles_of(loop, target)
    return least / cycles, min(1.0, least / bound)


def cycles_of(loop: Loop, target: Target) -> tuple[float, float]:
    """Cycles of an iteration: with all dependencies, and by each unit's work alone."""
    tool = next((name for name in TOOLS if shutil.which(name)), None)
    if tool is None:
        raise SystemExit("llvm-mca is missing: apt-get install llvm-19")
    command = [tool, f"-mtriple={target.triple}", f"-mcpu={target.name}", "-json"]
    done = subprocess.run(
        [*command, f"-iterations={ITERATIONS}"],
        input=loop.code,
        capture_output=True,
        text=True,
        check=True,
    )
    summary: dict[str, float] = json.loads(done.stdout)["CodeRegions"][0]["SummaryView"]
    return summary["TotalCycles"] / summary["Iterations"], summary["BlockRThroughput"]


if __name__ == "__main__":
    typer.run(main)
