"""Quantised programs as the real numbers that their integers stand for.

PyTorch's pt2e and torchao write integers, scales and zero points as operators of their own. Here
what is rounded at run time stays a real number: steps from the zero point, whole ones, which are
multiplied by the scale where the program has a product of integers or dequantises. Stored integers
are dequantised as ``quantized_decomposed`` does it, which becomes ``DequantizeLinear``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from sparse_tvm.frontends.torch.decompose import copied_graph, parts_of

_BYTES = {(-128, 127), (0, 255)}
_OPERATORS = re.compile(
    # A tensor that is made of others, as torchao's are, is asked for them.
    r"(quantized_decomposed|torchao)\..*|export\.access_subclass_inner_tensor\..*"
)


def import_operators() -> None:
    """Let PyTorch know pt2e's operators, without which programs that have them cannot be read."""
    import torch.ao.quantization.fx._decomposed  # noqa: F401


def with_real_numbers(program: Any) -> Any:
    """Return a program whose products are of real numbers, and any other as it is.

    Parameters
    ----------
    program : torch.export.ExportedProgram
        Left as it is.
    """
    import torch

    if not any(_OPERATORS.fullmatch(str(node.target)) for node in _calls(program.graph)):
        return program
    import_operators()
    graph = copied_graph(program)
    for node in list(_calls(graph)):
        if node.target == torch.ops.aten._int_mm.default:
            _multiply_signed(graph, node)
            _multiply_reals(graph, node)
        elif node.target == torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)  # it knows of integers
    plain = torch.export.ExportedProgram(**{**parts_of(program), "graph": graph})
    decomposed = plain.run_decompositions(_decompositions())
    graph = copied_graph(decomposed)
    _Products(graph).rewrite()
    graph.eliminate_dead_code()
    return torch.export.ExportedProgram(**{**parts_of(decomposed), "graph": graph})


def _calls(graph: Any) -> Iterator[Any]:
    return (node for node in graph.nodes if node.op == "call_function")


def _multiply_signed(graph: Any, product: Any) -> None:
    """Let a product read the signed bytes that were made unsigned for it.

    Where the CPU multiplies unsigned bytes with signed ones, torchao adds 128 to the activations,
    and takes 128 times the sum of each column off the product.
    """
    import torch

    aten, shift = torch.ops.aten, 128
    x, w = product.args
    added = _source(x, aten.to.dtype, torch.uint8)
    signed = _source(_source(added, aten.add.Tensor, shift), aten.to.dtype, torch.int32)
    takers = [user for user in product.users if user.target in (aten.sub_.Tensor, aten.sub.Tensor)]
    if signed is None or len(takers) != 1:
        return
    total = _source(takers[0].args[1], aten.mul.Tensor, shift)
    if _source(total, aten.sum.dim_IntList, [0]) is w:
        product.args = (signed, w)
        takers[0].replace_all_uses_with(product)
        graph.erase_node(takers[0])


def _source(node: Any, target: Any, second: Any) -> Any:
    """What a call of an operator with such a second argument computes from; None if it is none."""
    called = node is not None and node.target == target and len(node.args) > 1
    return node.args[0] if called and node.args[1] == second else None


def _multiply_reals(graph: Any, node: Any) -> None:
    """Make a product of integers one of float32."""
    import torch

    with graph.inserting_before(node):
        operands = [
            graph.call_function(torch.ops.aten.to.dtype, (arg, torch.float32)) for arg in node.args
        ]
    for operand, arg in zip(operands, node.args, strict=True):
        operand.meta["val"] = arg.meta["val"].to(torch.float32)
    node.target, node.args = torch.ops.aten.mm.default, tuple(operands)


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """What quantised operators are made of; those of stored integers and 256 steps may stay."""
    import torch

    def steps(x: Any, scale: Any, low: Any, high: Any) -> Any:
        """Whole steps from the zero point."""
        if isinstance(low, torch.Tensor):
            return torch.round(torch.minimum(torch.maximum(x / scale, low), high))
        return torch.round(torch.clamp(x / scale, low, high))

    def bounds(zero: Any, low: int, high: int) -> tuple[Any, Any]:
        """The least and the largest step; a zero point that was found here counts from `low`."""
        if isinstance(zero, torch.Tensor) and zero.dtype.is_floating_point:
            return 0.0 - zero, float(high - low) - zero
        return low - zero, high - zero

    def find_scale(x: Any, symmetric: bool, low: int, high: int, eps: float, dims: Any) -> Any:
        """A scale and a zero point that counts from `low`, for all indices of `dims`."""
        if symmetric:
            peak = torch.amax(torch.abs(x), dims, keepdim=True)
            scale = torch.clamp(peak / ((high - low) / 2), min=eps)
            return scale, torch.full_like(scale, (high + low + 1) // 2 - low)
        least = torch.clamp(torch.amin(x, dims, keepdim=True), max=0.0)
        largest = torch.clamp(torch.amax(x, dims, keepdim=True), min=0.0)
        scale = torch.clamp((largest - least) / float(high - low), min=eps)
        return scale, torch.clamp(torch.round((0.0 - least) / scale), 0, high - low)

    def of_tensor(symmetric: bool) -> Callable[..., Any]:
        def choose(x: Any, low: int, high: int, eps: float, dtype: Any) -> Any:
            dims = list(range(x.dim()))
            found = find_scale(x, symmetric, low, high, eps, dims)
            return tuple(value.reshape(()) for value in found)

        return choose

    def quantise(x: Any, scale: Any, zero: Any, low: int, high: int, dtype: Any) -> Any:
        if not isinstance(scale, torch.Tensor) and (low, high) in _BYTES:
            return NotImplemented
        return steps(x, scale, *bounds(zero, low, high))

    def dequantise(x: Any, scale: Any, *_: Any, **__: Any) -> Any:
        return x * scale if x.dtype.is_floating_point else NotImplemented

    def reduced(x: Any, block: list[int]) -> list[int] | None:
        """The dimensions that share a scale, if each is whole or single."""
        dims = [axis for axis, size in enumerate(block) if size != 1]
        return dims if all(block[axis] == x.shape[axis] for axis in dims) else None

    def spread(parameter: Any, x: Any, block: list[int]) -> Any:
        """A scale or zero point so that it broadcasts."""
        dims = reduced(x, block)
        assert dims is not None
        shape = [1 if a in dims else n for a, n in enumerate(x.shape)]
        # A row's scale stays one where there is a single row; a tensor's has no dimensions.
        one_row = len(dims) < x.dim() and all(isinstance(n, int) and n == 1 for n in shape)
        return parameter.reshape(() if parameter.numel() == 1 and not one_row else shape)

    def choose_affine(
        x: Any,
        mapping: str,
        block: list[int],
        dtype: Any,
        low: int = -128,
        high: int = 127,
        eps: float | None = None,
        *_: Any,
    ) -> Any:
        dims, keeps = reduced(x, block), len(_) == 3 and bool(_[2])
        if dims is None or mapping not in ("SYMMETRIC", "ASYMMETRIC"):
            return NotImplemented
        least = torch.finfo(x.dtype).eps if eps is None else eps
        found = find_scale(x, mapping == "SYMMETRIC", low, high, least, dims)
        return found if keeps else tuple(torch.squeeze(value, dims) for value in found)

    def quantise_affine(
        x: Any,
        block: list[int],
        scale: Any,
        zero: Any,
        dtype: Any,
        low: int = -128,
        high: int = 127,
    ) -> Any:
        if reduced(x, block) is None:
            return NotImplemented
        shift = 0 if zero is None else spread(zero, x, block)
        if isinstance(shift, torch.Tensor) and not shift.dtype.is_floating_point:
            shift = shift.to(torch.float32) - float(low)
        return steps(x, spread(scale, x, block), *bounds(shift, low, high))

    def dequantise_affine(x: Any, block: list[int], scale: Any, *_: Any, **__: Any) -> Any:
        floats = x.dtype.is_floating_point and reduced(x, block) is not None
        return x * spread(scale, x, block) if floats else NotImplemented

    integers = torch.ops.quantized_decomposed
    table = {
        integers.choose_qparams.tensor: of_tensor(False),
        integers.choose_qparams_symmetric.tensor: of_tensor(True),
        integers.quantize_per_tensor.default: quantise,
        integers.quantize_per_tensor.tensor: quantise,
        integers.dequantize_per_tensor.default: dequantise,
        integers.dequantize_per_tensor.tensor: dequantise,
    }
    if hasattr(torch.ops.torchao, "quantize_affine"):  # where torchao is there, and not else
        table |= {
            torch.ops.torchao.choose_qparams_affine.default: choose_affine,
            torch.ops.torchao.quantize_affine.default: quantise_affine,
            torch.ops.torchao.dequantize_affine.default: dequantise_affine,
        }
    return table


class _Products:
    """Moves scales behind products of steps and stored integers into their operands."""

    def __init__(self, graph: Any) -> None:
        import torch

        self._graph, self._aten = graph, torch.ops.aten

    def rewrite(self) -> None:
        """Change the graph in place."""
        aten = self._aten
        for node in list(self._graph.nodes):
            if node.target == aten.view.default:
                self._skip_views(node)
        for node in list(self._graph.nodes):
            if node.target == aten.mm.default:
                self._product(node)

    def _skip_views(self, node: Any) -> None:
        """Read what a view of a view had been, where that is of the same shape."""
        inner = node.args[0]
        if inner.target != self._aten.view.default:
            return
        source = inner.args[0]
        if _shape(source) == _shape(node):
            node.replace_all_uses_with(source, lambda user: user.op != "output")

    def _product(self, node: Any) -> None:
        x, cast = node.args
        stored = self._stored(cast)
        if stored is None:
            return
        end, of_rows, of_columns = self._scales(node)
        with self._graph.inserting_before(end):
            w = self._weight(stored, of_columns)
            for scale in of_rows:
                x = self._scaled(x, scale)
        # What is no matrix is viewed as one, and the product as what that was.
        view = next(iter(end.users)) if len(end.users) == 1 else None
        viewed = [x.target, view and view.target] == [self._aten.view.default] * 2
        if viewed and _shape(x.args[0])[:-1] == _shape(view)[:-1]:
            end, x = view, x.args[0]
        end.target, end.args = self._aten.matmul.default, (x, w)

    def _stored(self, cast: Any) -> Any:
        """The stored integers ``[N, K]`` whose transposition a product casts and reads."""
        aten = self._aten
        if cast.target != aten._to_copy.default:
            return None
        turned = cast.args[0]
        if turned.target not in (aten.t.default, aten.permute.default):
            return None
        stored = turned.args[0]
        return stored if stored.op == "placeholder" else None

    def _scales(self, node: Any) -> tuple[Any, list[Any], list[Any]]:
        """Return the last multiplication behind a product, and the scales of rows and columns."""
        aten, columns = self._aten, _shape(node)[-1]
        of_rows, of_columns = [], []
        while len(node.users) == 1:
            (user,) = node.users
            if user.target == aten._to_copy.default:
                node = user
                continue
            if user.target != aten.mul.Tensor or not hasattr(user.args[1], "meta"):
                break
            scale = user.args[1] if user.args[0] is node else user.args[0]
            shape = _shape(scale)
            if len(shape) == 2 and shape[1] == 1:
                of_rows.append(scale)
            elif shape in ([columns], [1], []):
                of_columns.append(scale)
            else:
                break
            node = user
        return node, of_rows, of_columns

    def _scaled(self, x: Any, scale: Any) -> Any:
        """Multiply steps by their scale, and look at them as a matrix afterwards."""
        aten = self._aten
        viewed = all(value.target == aten.view.default for value in (x, scale))
        if not viewed or len(_shape(scale.args[0])) not in (0, len(_shape(x.args[0]))):
            return self._emit(aten.mul.Tensor, (x, scale), x)
        product = self._emit(aten.mul.Tensor, (x.args[0], scale.args[0]), x.args[0])
        return self._emit(aten.view.default, (product, *x.args[1:]), x)

    def _weight(self, stored: Any, scales: list[Any]) -> Any:
        """The real numbers of a weight, ``[K, N]``."""
        import torch

        integers = torch.ops.quantized_decomposed
        like = stored.meta["val"]
        scale = scales[0] if scales else self._one()
        for other in scales[1:]:
            scale = self._emit(self._aten.mul.Tensor, (scale, other), scale)
        real = self._graph.call_function(
            integers.dequantize_per_channel.default,
            (stored, scale, None, 0, -128, 127, torch.int8),
        )
        real.meta["val"] = like.new_empty(like.shape, dtype=torch.float32)
        turned = self._graph.call_function(self._aten.t.default, (real,))
        turned.meta["val"] = real.meta["val"].t()
        return turned

    def _one(self) -> Any:
        import torch

        one = self._graph.call_function(self._aten.full.default, ([1], 1.0))
        one.meta["val"] = torch.ones(1)
        return one

    def _emit(self, target: Any, args: tuple[Any, ...], like: Any) -> Any:
        node = self._graph.call_function(target, args)
        node.meta = dict(like.meta)
        return node


def _shape(node: Any) -> list[Any]:
    return list(node.meta["val"].shape)
