"""Lower kernels: our operators become calls of TIR kernels.

Matches every ``sparse_tvm.*`` call and turns it into ``call_tir`` of the kernel built for its
shapes, format and epilogue. Calls that agree in all of these share one kernel, so BERT-base's 73
layers need a handful. The program remembers which layers each kernel serves, for the profiler.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tvm import relax, tirx

from sparse_tvm.passes import dialect
from sparse_tvm.passes.graph import Rewrite, shape_of
from sparse_tvm.passes.program import Program
from sparse_tvm.schedules.common.attention import Mask, attention
from sparse_tvm.schedules.common.lane_tiles import LaneTiles, Simd
from sparse_tvm.schedules.common.matmul import WeightLayout, matmul
from sparse_tvm.schedules.common.normalize import layer_norm
from sparse_tvm.schedules.common.pack import pack, unpack
from sparse_tvm.targets import Target

KERNEL_ATTRIBUTE = "sparse_tvm.kernel"
"""Marks functions that are scheduled already."""

_OPAQUE = 8  # relax.op_pattern: nothing may be fused into it


def lower_kernels(program: Program, target: Target) -> Program:
    """Apply the pass."""
    return _LowerKernels(program, Simd(target.lanes, target.registers)).run()


class _LowerKernels(Rewrite):
    def __init__(self, program: Program, simd: Simd) -> None:
        super().__init__(program)
        self._simd = simd
        self._kernels: dict[str, Any] = {}

    def rewrite(self, var: relax.Var, value: Any) -> Any:
        found = dialect.match(value)
        if found is None:
            return None
        build, title = getattr(self, f"_{found.name}")(found, var)
        layer = found.attributes.pop("layer", None)
        key = json.dumps([found.name, title, found.attributes, shape_of(found.args[0])])
        if key not in self._kernels:
            function = build().with_attrs({KERNEL_ATTRIBUTE: found.name, "op_pattern": _OPAQUE})
            self._kernels[key] = self.builder.add_func(function, title)
        kernel = self._kernels[key]
        calls = self.program.kernels.setdefault(
            kernel.name_hint, {"kind": found.name, "layers": []}
        )
        calls["layers"].append(layer or found.name)
        if layer is not None:
            report = self.program.reports.get(layer)
            if report is not None:
                report.kernel = title
        return relax.call_tir(kernel, [self.new(arg) for arg in found.args], var.ty)

    def _dense(self, found: dialect.DialectCall, var: relax.Var) -> tuple[Callable[[], Any], str]:
        attributes = found.attributes
        n, k = attributes["weight"]
        layout = WeightLayout(attributes["format"], tuple(attributes["block"]))
        tiles = LaneTiles(*attributes["tiles"])
        rows, columns = layout.block
        steps = attributes["epilogue"]
        size = f"_{rows}x{columns}" if layout.format != "csr" else ""
        title = "_".join([layout.format + size, f"{n}x{k}", *steps])

        def build() -> tirx.PrimFunc:
            return matmul(tiles, n, k, layout, steps, self._simd)

        return build, title

    _sparse_dense = _dense

    def _attention(
        self, found: dialect.DialectCall, var: relax.Var
    ) -> tuple[Callable[[], Any], str]:
        attributes = found.attributes
        heads, scale = attributes["heads"], attributes["scale"]
        queries, keys = LaneTiles(*attributes["tiles"]), LaneTiles(*attributes["key_tiles"])
        mask = Mask(*attributes["mask"]) if attributes["mask"] else None
        head_size, value_size = (shape_of(found.args[i])[2] // heads for i in (0, 2))

        def build() -> tirx.PrimFunc:
            return attention(queries, keys, heads, head_size, value_size, scale, mask, self._simd)

        return build, f"attention_{heads}x{head_size}"

    def _layer_norm(
        self, found: dialect.DialectCall, var: relax.Var
    ) -> tuple[Callable[[], Any], str]:
        tiles, features = LaneTiles(*found.attributes["tiles"]), shape_of(var)[2]
        epsilon = found.attributes["epsilon"]
        return lambda: layer_norm(tiles, features, epsilon, self._simd), f"layer_norm_{features}"

    def _pack(self, found: dialect.DialectCall, var: relax.Var) -> tuple[Callable[[], Any], str]:
        tiles, features = LaneTiles(*found.attributes["tiles"]), shape_of(var)[2]
        return lambda: pack(tiles, features, self._simd), f"pack_{features}"

    def _unpack(self, found: dialect.DialectCall, var: relax.Var) -> tuple[Callable[[], Any], str]:
        tiles, features = LaneTiles(*found.attributes["tiles"]), shape_of(var)[2]
        return lambda: unpack(tiles, features, self._simd), f"unpack_{features}"
