"""Lower kernels: our operators become calls of TIR kernels.

Matches every ``sparse_tvm.*`` call and turns it into ``call_tir`` of the kernel built for its
shapes, format and epilogue. Calls for which the same kernel was built share it, so BERT-base's 73
layers need a handful. The program remembers which layers each kernel serves, for the profiler.
"""

from __future__ import annotations

from typing import Any

from tvm import relax, tirx

from sparse_tvm.passes import dialect
from sparse_tvm.passes.graph import Rewrite, shape_of
from sparse_tvm.passes.program import Program
from sparse_tvm.schedules.cpu.attention import Mask, attention
from sparse_tvm.schedules.cpu.batch_matmul import Operand, batch_matmul
from sparse_tvm.schedules.cpu.conv2d import Conv2d, conv2d, depthwise_conv2d
from sparse_tvm.schedules.cpu.lane_tiles import Tiles, symbol
from sparse_tvm.schedules.cpu.matmul import WeightLayout, matmul
from sparse_tvm.schedules.cpu.normalize import layer_norm
from sparse_tvm.schedules.cpu.pack import pack, unpack
from sparse_tvm.schedules.cpu.simd import Simd
from sparse_tvm.targets import Target

KERNEL_ATTRIBUTE = "sparse_tvm.kernel"
"""Marks functions that are scheduled already."""

_Kernel = tuple[str, tirx.PrimFunc]
"""A kernel and its title."""

_OPAQUE = 8  # relax.op_pattern: nothing may be fused into it


def lower_kernels(program: Program, target: Target) -> Program:
    """Apply the pass."""
    return _LowerKernels(program, Simd.of(target)).run()


class _LowerKernels(Rewrite):
    def __init__(self, program: Program, simd: Simd) -> None:
        super().__init__(program)
        self._simd = simd

    def rewrite(self, var: relax.Var, value: Any) -> Any:
        found = dialect.match(value)
        if found is None:
            return None
        title, function = getattr(self, f"_{found.name}")(found, var)
        marked = function.with_attrs({KERNEL_ATTRIBUTE: found.name, "op_pattern": _OPAQUE})
        kernel = self.builder.add_func(marked, title)  # the one that is there, if it is the same
        self._note(kernel.name_hint, found.name, found.attributes.get("layer"), title)
        args = []
        for arg in found.args:
            if isinstance(arg, relax.ShapeExpr):  # numbers are in the kernel already
                args += [dim for dim in arg.values if not isinstance(dim, tirx.IntImm)]
            else:
                args.append(self.new(arg))
        return relax.call_tir(kernel, args, var.ty)

    def _note(self, function: str, kind: str, layer: str | None, title: str) -> None:
        """Remember which layer this call serves."""
        kernel = self.program.kernels.setdefault(function, {"kind": kind, "layers": []})
        kernel["layers"].append(layer or kind)
        if layer in self.program.reports:
            self.program.reports[layer].kernel = title

    def _dense(self, found: dialect.DialectCall, var: relax.Var) -> _Kernel:
        attributes = found.attributes
        n, k = attributes["weight"]
        layout = WeightLayout(attributes["format"], tuple(attributes["block"]), attributes["parts"])
        tiles = _tiles(found.args[0])
        rows, columns = layout.block
        steps = attributes["epilogue"]
        size = f"_{rows}x{columns}" if layout.format != "csr" else ""
        parts = [f"{layout.parts}parts"] if layout.parts > 1 else []
        title = "_".join([layout.format + size, f"{n}x{k}", *parts, *steps])
        return title, matmul(tiles, n, k, layout, steps, self._simd)

    _sparse_dense = _dense

    def _attention(self, found: dialect.DialectCall, var: relax.Var) -> _Kernel:
        attributes = found.attributes
        heads, scale = attributes["heads"], attributes["scale"]
        mask = Mask(*attributes["mask"]) if attributes["mask"] else None
        head_size, value_size = (shape_of(found.args[i])[2] // heads for i in (0, 2))
        queries, keys = _tiles(found.args[0]), _tiles(found.args[1])
        keys = Tiles(queries.lead, keys.per_lead)
        (key_rows,) = found.args[-1].values
        count = int(key_rows) if isinstance(key_rows, tirx.IntImm) else None

        return f"attention_{heads}x{head_size}", attention(
            queries, keys, count, heads, head_size, value_size, scale, mask, self._simd
        )

    def _layer_norm(self, found: dialect.DialectCall, var: relax.Var) -> _Kernel:
        tiles, features = _tiles(found.args[0]), shape_of(var)[2]
        epsilon = found.attributes["epsilon"]
        return f"layer_norm_{features}", layer_norm(tiles, features, epsilon, self._simd)

    def _pack(self, found: dialect.DialectCall, var: relax.Var) -> _Kernel:
        return "pack", pack(*_extents(found.args[0]))

    def _unpack(self, found: dialect.DialectCall, var: relax.Var) -> _Kernel:
        return "unpack", unpack(*_extents(var))

    def _conv2d(self, found: dialect.DialectCall, var: relax.Var) -> _Kernel:
        conv, attributes = _conv(found), found.attributes
        layout = WeightLayout(attributes["format"], tuple(attributes["block"]))
        batch, out = _batched(var)
        shapes = (batch, *shape_of(found.args[0])[1:]), out
        steps = attributes["epilogue"]
        size = f"_{layout.block[0]}x1" if layout.format != "csr" else ""
        title = "_".join(["conv2d", layout.format + size, _size(conv), *map(_step, steps)])
        return title, conv2d(conv, batch, shapes, layout, steps, self._simd)

    def _depthwise_conv2d(self, found: dialect.DialectCall, var: relax.Var) -> _Kernel:
        conv, steps = _conv(found), found.attributes["epilogue"]
        batch, out = _batched(var)
        shapes = (batch, *shape_of(found.args[0])[1:]), out
        title = "_".join(["depthwise_conv2d", _size(conv), *map(_step, steps)])
        return title, depthwise_conv2d(conv, batch, shapes, steps, self._simd)

    def _matmul(self, found: dialect.DialectCall, var: relax.Var) -> _Kernel:
        a, b = (
            Operand(_fresh(arg, name), axes)
            for arg, name, axes in zip(found.args, "ab", found.attributes["axes"], strict=True)
        )
        out = _fresh(var, "y")
        size = "x".join("?" if not isinstance(d, int) else str(d) for d in out)
        return f"matmul_{size}", batch_matmul(a, b, out, self._simd)


def _fresh(expr: Any, name: str) -> list[Any]:
    """Extents for a kernel: numbers, or a fresh symbol for each extent that is not one."""
    return [
        dim if isinstance(dim, int) else symbol(f"{name}{i}")
        for i, dim in enumerate(shape_of(expr))
    ]


def _conv(found: dialect.DialectCall) -> Conv2d:
    extents = found.attributes["conv"]
    plain: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in extents.items()
    }
    return Conv2d(**plain)


def _size(conv: Conv2d) -> str:
    (height, width), (kernel_height, kernel_width) = conv.size, conv.kernel
    return f"{conv.out_channels}x{conv.channels}x{kernel_height}x{kernel_width}_on_{height}x{width}"


def _step(step: str) -> str:
    return step.partition(":")[0]


def _batched(expr: Any) -> tuple[Any, tuple[Any, ...]]:
    """Batch size for a kernel, and the shape with it."""
    batch, *rest = shape_of(expr)
    batch = batch if isinstance(batch, int) else symbol("batch")
    return batch, (batch, *rest)


def _extents(expr: Any) -> list[Any]:
    """Extents for a kernel: numbers, or a fresh symbol for each extent that is not one."""
    names = ("lead", "rows", "features")
    return [
        dim if isinstance(dim, int) else symbol(name)
        for dim, name in zip(shape_of(expr), names, strict=True)
    ]


def _tiles(expr: Any) -> Tiles:
    """Extents of a tiled activation for a kernel, see :func:`_extents`."""
    lead, per_lead, _, _ = shape_of(expr)
    return Tiles(
        lead if isinstance(lead, int) else symbol("lead"),
        per_lead if isinstance(per_lead, int) else symbol("tiles"),
    )
