"""What NVIDIA's assembler says of our kernels on each architecture, as a table for docs/cuda.md.

    python scripts/ptxas_table.py [--check]

For each architecture there are the assembler's registers, bytes spilled if there are any, and the
occupancy: the share of a multiprocessor's threads that registers and shared memory let be there at
once, kernels of Hopper's own instructions on it alone. Shared memory is what a thread block asks
for. ``--check`` prints nothing but what spills, and
fails if anything does. No device is needed.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from sparse_tvm.backends.cuda_codegen import compile_kernel, device_source
from sparse_tvm.families import Extents
from sparse_tvm.nvrtc import compile_source
from sparse_tvm.operators import (
    FLOAT32,
    PRECISIONS,
    Activation,
    Attention,
    Bias,
    Dense,
    Layout,
    Residual,
)
from sparse_tvm.schedules.cuda.attention import AttentionProblem, attention
from sparse_tvm.schedules.cuda.families.dense import BLOCKS, CoreDenseFamily, TensorDenseFamily
from sparse_tvm.schedules.cuda.families.sparse import SparseDenseFamily
from sparse_tvm.schedules.cuda.families.warpgroup import WarpgroupDenseFamily
from sparse_tvm.schedules.cuda.row_norm import layer_norm
from sparse_tvm.schedules.cuda.sparse_rows import row_tile
from sparse_tvm.schedules.cuda.tiles import tile_for
from sparse_tvm.schedules.cuda.warpgroup import uses_warpgroups
from sparse_tvm.schedules.cuda.warpgroup_matmul import Problem, warpgroup_matmul
from sparse_tvm.schedules.cuda.warpgroup_tiles import tiles
from sparse_tvm.targets.cuda import CUDA_TARGETS, Gpu

N, K = 3072, 768
EPILOGUE = (Bias(), Activation("gelu"), Residual())
_KEYS, _ALL = (True, False, False, True), (True, True, True, True)
ATTENTIONS = (
    *((batch, 128, 64, _KEYS) for batch in (1, 4, 64)),
    (64, 128, 32, None),
    *((64, 197, size, mask) for size in (64, 80, 96, 128) for mask in (None, _ALL)),
    *((None, None, size, mask) for size in (64, 128) for mask in (_KEYS, _ALL)),
)
"""Batch, rows, features of a head, and mask."""

NORMS = (768, 1024, 4096)
"""Features of a row."""

THREADS = {89: 1536}
REGISTERS, GRANULE = 65536, 256
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


@dataclass(frozen=True)
class Kernel:
    """A kernel as a block asks for it."""

    name: str
    source: str
    threads: int
    shared: int


@dataclass(frozen=True)
class Row:
    """What became of a kernel on one architecture."""

    kernel: Kernel
    gpu: Gpu
    registers: int
    spilled: int

    @property
    def occupancy(self) -> float:
        """Share of a multiprocessor's threads that can be there."""
        most = THREADS.get(self.gpu.capability, 2048)
        warp = -(-self.registers * 32 // GRANULE) * GRANULE
        blocks = min(
            most // self.kernel.threads,
            REGISTERS // (warp * self.kernel.threads // 32),
            self.gpu.shared_bytes // (self.kernel.shared + 1024),
        )
        return blocks * self.kernel.threads / most


def kernels() -> Iterator[Kernel]:
    """Every form of our kernels, for a layer of 768 inputs and 3,072 outputs."""
    target = CUDA_TARGETS[0]
    forms = [("dense", (1, 1)), *(("bsr", block) for block in BLOCKS), ("2:4", (1, 4))]
    for format, block in forms:
        for tokens in (16, 256, 4096):
            layout = Layout(TensorDenseFamily.name, format, block)
            op = Dense(
                layer="", matrix=(N, K), types=PRECISIONS["fp16"], epilogue=EPILOGUE, layout=layout
            )
            tile = tile_for(layout, N, tokens)
            size = " {}x{}".format(*block) if format == "bsr" else ""
            yield Kernel(
                f"{format}{size}, {tile.rows} x {tile.tokens} tile",
                _source(TensorDenseFamily(), op, tokens, "float16", target),
                tile.threads,
                tile.shared_bytes(format == "2:4"),
            )
    for format, block in (("dense", (1, 1)), ("bsr", (64, 64)), ("2:4", (1, 4))):
        yield from _warpgroups(Layout(WarpgroupDenseFamily.name, format, block))
    for n, k, tokens in ((N, K, 1), (N, K, 16), (N, K, 128), (N, K, 4096), (K, N, 4096)):
        layout = Layout(SparseDenseFamily.name, "csr")
        op = Dense(
            layer="", matrix=(n, k), types=PRECISIONS["fp16"], epilogue=EPILOGUE, layout=layout
        )
        tile = row_tile(n, k, tokens)
        yield Kernel(
            f"unstructured, {tile.rows} x {tile.tokens} tile of {k} inputs",
            _source(SparseDenseFamily(), op, tokens, "float16", target),
            tile.threads,
            tile.shared_bytes,
        )
    op = Dense(
        layer="",
        matrix=(N, K),
        types=FLOAT32,
        epilogue=EPILOGUE,
        layout=Layout(CoreDenseFamily.name, "dense"),
    )
    source = _source(CoreDenseFamily(), op, 256, "float32", target)
    yield Kernel("dense in fp32", source, 256, 2 * 16 * 68 * 4)
    for batch, rows, size, mask in ATTENTIONS:
        yield _attention(batch, rows, size, mask)
    for width in NORMS:
        yield _norm(width)


def _warpgroups(layout: Layout) -> Iterator[Kernel]:
    """All tiles of a layout."""
    x, y = Extents((4096, K), "float16"), Extents((4096, N), "float16")
    for tile in tiles(layout):
        problem = Problem(N, K, x, (Extents((N,)), y), y, layout, tile, EPILOGUE, 132)
        name = "bsr 64x64" if layout.format == "bsr" else layout.format
        turns = ", in turns" if tile.alternating else ""
        yield Kernel(
            f"{name}, {tile.rows} x {tile.tokens} tile of warpgroups{turns}",
            device_source(compile_kernel(warpgroup_matmul(problem), CUDA_TARGETS[2])),
            tile.threads,
            tile.shared_bytes(layout.format == "2:4"),
        )


def _norm(width: int) -> Kernel:
    x, remainder = Extents((4096, width), "float16"), Extents((4096, width), "uint8")
    kernel = layer_norm(x, x, 1e-5, remainder.dtype, x, remainder)
    source = device_source(compile_kernel(kernel, CUDA_TARGETS[0]))
    return Kernel(f"layer norm of {width}, residual", source, 128, 0)


def _attention(
    batch: int | None, rows: int | None, size: int, mask: tuple[bool, bool, bool, bool] | None
) -> Kernel:
    heads = N // 4 // size
    x = Extents((batch, rows, heads * size), "float16")
    op = Attention(heads=heads, scale=0.1, mask=mask, types=PRECISIONS["fp16"], sizes=(size, size))
    extents = zip((batch, heads, rows, rows), mask or (), strict=False)
    added = Extents(tuple(n if has else 1 for n, has in extents)) if mask else None
    problem = AttentionProblem(op, x, x, x, added, x)
    kind = "" if mask is None else ", masked queries" if mask[2] else ", masked keys"
    extent = "of any size" if rows is None else f"{problem.queries} queries a block"
    return Kernel(
        f"attention, heads of {size}, {extent}{kind}",
        device_source(compile_kernel(attention(problem), CUDA_TARGETS[0])),
        problem.threads,
        problem.shared_bytes,
    )


def _source(family, op: Dense, tokens: int, dtype: str, target) -> str:
    n, k = op.matrix
    operands = [Extents((tokens, k), dtype), Extents((n,)), Extents((tokens, n), dtype)]
    built = family.build(op, operands, Extents((tokens, n), dtype), target)
    return device_source(compile_kernel(built.function, target))


def rows() -> Iterator[Row]:
    """All kernels on all architectures, each form once."""
    gpus = [target.gpu for target in CUDA_TARGETS if len(target.gpus) == 1]
    seen = set()
    for kernel in kernels():
        if kernel.name in seen:
            continue
        seen.add(kernel.name)
        own = uses_warpgroups(kernel.source)
        for gpu in gpus:
            if own and gpu.capability != 90:
                continue
            log = compile_source(kernel.source, gpu.architecture + ("a" if own else "")).log
            spilled = sum(map(int, _SPILLS.search(log).groups()))
            yield Row(kernel, gpu, int(_REGISTERS.search(log)[1]), spilled)


def _cell(row: Row) -> str:
    spilled = f", {row.spilled} bytes spilled" if row.spilled else ""
    return f"{row.registers}, {row.occupancy:.0%}{spilled}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only look for spills")
    check = parser.parse_args().check
    found = list(rows())
    spilling = [row for row in found if row.spilled]
    if check:
        for row in spilling:
            print(f"{row.kernel.name} on {row.gpu.architecture} spills {row.spilled} bytes")
        return bool(spilling)
    gpus = list(dict.fromkeys(row.gpu.architecture for row in found))
    print(f"| kernel | threads | shared memory | {' | '.join(gpus)} |")
    print("|---" * (3 + len(gpus)) + "|")
    for kernel in dict.fromkeys(row.kernel for row in found):
        by_gpu = {row.gpu.architecture: _cell(row) for row in found if row.kernel == kernel}
        cells = [by_gpu.get(gpu, "") for gpu in gpus]
        size = f"{kernel.shared / 1024:.0f} KiB"
        print(f"| {kernel.name} | {kernel.threads} | {size} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
