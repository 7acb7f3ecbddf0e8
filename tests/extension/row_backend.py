"""A backend as another package would bring it: activations as they are, one plain kernel.

It shows how little a backend is: a target, a kernel family, and which passes lead to kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from sparse_tvm.backends import Backend, BackendTarget
from sparse_tvm.families import Extents, Kernel, WeightedFamily, Wish, Work
from sparse_tvm.operators import Bias, Dense, Layout
from sparse_tvm.sparsity.formats import CSR
from sparse_tvm.sparsity.statistics import WeightStatistics


@dataclass(frozen=True)
class RowTarget:
    """Any x86 CPU, without vectors."""

    name: str = "plain-rows"

    def tvm_target(self) -> dict[str, Any]:
        return {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64"}

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "triple": "x86_64-linux-gnu", "cpu": "x86-64", "features": []}


class RowDense(WeightedFamily[Dense]):
    """``y[row, n] = sum(w[n, k] * x[row, k]) + bias[n]``, the weight in compressed sparse rows."""

    name: ClassVar[str] = "row_dense"
    operator: ClassVar[type[Dense]] = Dense

    def refuses(self, op: Dense, target: RowTarget) -> str | None:
        known = all(isinstance(step, Bias) for step in op.epilogue)
        return None if known else "only a bias may follow a layer"

    def candidates(
        self, op: Dense, weight: WeightStatistics, target: RowTarget, wish: Wish | None = None
    ) -> Sequence[Layout]:
        found = [Layout(self.name, "dense"), Layout(self.name, "csr")]
        return [layout for layout in found if wish is None or wish.format == layout.format]

    def cost(
        self, op: Dense, layout: Layout, weight: WeightStatistics, tokens: int, target: RowTarget
    ) -> float:
        visited = weight.nonzeros * 1.5 if layout.sparse else op.matrix[0] * op.matrix[1]
        return tokens * visited * 1e-9

    def pack(
        self, op: Dense, w: np.ndarray, layout: Layout, target: RowTarget
    ) -> dict[str, np.ndarray]:
        if layout.sparse:
            csr = CSR.from_dense(w)
            data, indices, indptr = csr.data, csr.indices, csr.indptr
        else:
            n, k = w.shape
            data, indices, indptr = w.ravel(), np.tile(np.arange(k), n), k * np.arange(n + 1)
        arrays = {"data": data, "indices": indices, "indptr": indptr}
        dtypes = {"data": np.float32, "indices": np.int32, "indptr": np.int32}
        return {name: np.ascontiguousarray(a, dtypes[name]) for name, a in arrays.items()}

    def build(
        self, op: Dense, operands: Sequence[Extents], output: Extents, target: RowTarget
    ) -> Kernel:
        from tvm.script.ir_builder import tirx as T

        from sparse_tvm.schedules.cpu.lane_tiles import argument, prim_func, symbol

        rows = symbol("rows") if output.shape[0] is None else output.shape[0]
        n, k = op.matrix
        with prim_func() as result:
            x = argument("x", (rows, k))
            nonzeros = symbol("nonzeros")
            data = argument("data", (nonzeros,))
            indices = argument("indices", (nonzeros,), "int32")
            indptr = argument("indptr", (n + 1,), "int32")
            biases = [argument(f"bias_{i}", (n,)) for i, _ in enumerate(op.epilogue)]
            y = argument("y", (rows, n))
            with T.serial(0, rows) as row, T.serial(0, n) as i:
                T.buffer_store(y, sum((b[i] for b in biases), T.float32(0)), [row, i])
                with T.serial(0, indptr[i + 1] - indptr[i]) as p:
                    at = indptr[i] + p
                    total = y[row, i] + data[at] * x[row, indices[at]]
                    T.buffer_store(y, total, [row, i])
        return Kernel(f"{op.stored.format}_rows_{n}x{k}", result["func"])

    def work(
        self, op: Dense, operands: Sequence[Extents], output: Extents, nonzeros: int | None = None
    ) -> Work:
        rows = output.shape[0] or 0
        count = op.matrix[0] * op.matrix[1] if nonzeros is None else nonzeros
        return Work(flops=2.0 * rows * count)


class RowBackend(Backend):
    """Layers on rows; everything else by TVM's own loops."""

    name: ClassVar[str] = "rows"

    def __init__(self) -> None:
        super().__init__([RowDense()])

    @property
    def targets(self) -> Sequence[RowTarget]:
        return [RowTarget()]

    def find_target(self, name: str) -> RowTarget | None:
        return RowTarget() if name == RowTarget.name else None

    def phases(self) -> Sequence[Any]:
        from sparse_tvm.passes.cpu.legalize import legalize
        from sparse_tvm.passes.infrastructure import Phase
        from sparse_tvm.passes.lower_kernels import lower_kernels

        return [Phase("lower", (legalize, lower_kernels))]

    def generate(self, program: Any, target: BackendTarget) -> Any:
        from sparse_tvm.backends.codegen import generate

        return generate(program, target)

    def write_library(self, code: Any, target: BackendTarget, path: Path) -> None:
        from sparse_tvm.linker import Linker

        code.export_library(str(path), fcompile=Linker())
