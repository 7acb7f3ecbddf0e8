"""Tensors whose elements are known at run time only: Relax expressions, kept plain.

What is built here is what the passes look for: nothing is emitted where nothing changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import tvm
from tvm import relax, tirx

from sparse_tvm.frontends.importer.forms import Form
from sparse_tvm.frontends.importer.known import Known
from sparse_tvm.frontends.importer.sizes import Size, Sizes, is_number
from sparse_tvm.spec import LARGEST_SIZE


class Scope(Protocol):
    """The function that is being built."""

    sizes: Sizes

    def normalize(self, value: relax.Expr) -> relax.Expr:
        """Infer the type of an expression."""

    def definition(self, value: relax.Expr) -> relax.Expr:
        """Return what a variable is bound to."""

    def demand_fitting(self, shape: Sequence[Size], target: Sequence[Size]) -> None:
        """Demand that each size of a shape is 1 or that of the target, whatever the inputs are."""


@dataclass(frozen=True)
class Tensor(Form):
    """A tensor of the program.

    Attributes
    ----------
    value : relax.Expr
        With its type inferred.
    scope : Scope
        The function that it is in.
    """

    value: relax.Expr
    scope: Scope

    @property
    def dtype(self) -> str:
        """The element type."""
        return str(self.value.ty.dtype)

    @property
    def sizes_of_axes(self) -> list[Size]:
        """See `Form`."""
        return shape_of(self.value)

    def argument_of(self, operator: str) -> relax.Expr | None:
        """Return the first argument of a call of an operator, if this is the call's value."""
        call = self.scope.definition(self.value)
        if isinstance(call, relax.Call) and call.op == tvm.ir.Op.get(f"relax.{operator}"):
            return call.args[0]
        return None

    def before(self, operator: str) -> Tensor:
        """Look through a call of an operator, if this is the call's value."""
        argument = self.argument_of(operator)
        return self if argument is None else replace(self, value=argument)

    def reshape(self, shape: Sequence[Size]) -> Tensor:
        """See `Form`."""
        # Masks are flattened to be gathered from, and given their shape again.
        plain = self.before("reshape") if self.dtype in ("bool", "int64", "int32") else self
        if self.scope.sizes.same(plain.sizes_of_axes, shape):
            return plain
        return self._of(relax.op.reshape(plain.value, list(shape)))

    def squeeze(self, axes: Sequence[int]) -> Tensor:
        """See `Form`."""
        return self._of(relax.op.squeeze(self.value, list(axes)))

    def expand_dims(self, axes: Sequence[int]) -> Tensor:
        """See `Form`."""
        return self._of(relax.op.expand_dims(self.value, list(axes)))

    def transpose(self, order: Sequence[int]) -> Tensor:
        """See `Form`."""
        return self._of(relax.op.permute_dims(self.value, list(order))) if order else self

    def broadcast_to(self, shape: Sequence[Size]) -> Tensor:
        """See `Form`."""
        if self.scope.sizes.same(self.sizes_of_axes, shape):
            return self
        self.scope.demand_fitting(self.sizes_of_axes, shape)
        return self._of(relax.op.broadcast_to(self.before("broadcast_to").value, list(shape)))

    def slice(self, window: Mapping[int, tuple[Size, Size, int]]) -> Tensor:
        """See `Form`."""
        extents, same = self.sizes_of_axes, self.scope.sizes.equal
        cut = {
            axis: bounds
            for axis, bounds in window.items()
            if not (is_number(bounds[0], 0) and same(bounds[1], extents[axis]) and bounds[2] == 1)
        }
        if not cut:
            return self
        begins, ends, steps = zip(*cut.values(), strict=True)
        if all(step > 0 for step in steps):
            part = relax.op.strided_slice(
                self.value, list(cut), list(begins), list(ends), list(steps), assume_inbound=True
            )
        else:
            # Going down, TVM takes an end of -1 to count from the end: before the first is lower.
            lower = [-LARGEST_SIZE if is_number(end, -1) else end for end in ends]
            part = relax.op.strided_slice(self.value, list(cut), list(begins), lower, list(steps))
        return self._of(part)

    def concat(self, others: Sequence[Tensor], axis: int) -> Tensor:
        """See `Form`."""
        return self._of(relax.op.concat([self.value, *(other.value for other in others)], axis))

    def astype(self, dtype: str) -> Tensor:
        """Convert the elements, none of which may be infinite or NaN if they become integers."""
        return self if dtype == self.dtype else self._of(relax.op.astype(self.value, dtype))

    def _of(self, value: relax.Expr) -> Tensor:
        return replace(self, value=self.scope.normalize(value))


def shape_of(value: relax.Expr) -> list[Size]:
    """Return a tensor's sizes, plain numbers as ints."""
    return [int(s) if isinstance(s, tirx.IntImm) else s for s in value.ty.shape]


def materialise(value: Known) -> relax.Expr:
    """Return a tensor of known elements: a constant, or one computed from symbolic sizes."""
    if value.is_constant:
        return relax.const(value.constant(), value.dtype)
    elements = [_vector_of(size) for size in value.sizes()]
    vector = elements[0] if len(elements) == 1 else relax.op.concat(elements, 0)
    if value.dtype != "int64":
        vector = relax.op.astype(vector, value.dtype)
    return relax.op.reshape(vector, value.elements.shape)


def _vector_of(size: Size) -> relax.Expr:
    """Return a tensor of one element; the largest number there is has no successor to count to."""
    if isinstance(size, int):
        return relax.const(np.array([size], np.int64), "int64")
    return relax.op.arange(size, size + 1, 1, "int64")
