"""The three forms in which the importer carries a tensor, and what can be done in all of them.

``Known``, where each element is a number or an expression of symbolic sizes: shapes, mostly.
``IndexExpression``, where an element is an expression of its own indices: positions and masks.
``Tensor``, where elements are known at run time only. The rule of an operator that moves elements
is written once, over any of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from sparse_tvm.frontends.importer.sizes import Size

INTEGERS = ("int64", "int32")


class NotInForm(Exception):
    """Raised where a result cannot be carried in the form of the inputs."""


class Form(ABC):
    """A tensor; shapes may be symbolic. Any method may raise `NotInForm`."""

    @property
    @abstractmethod
    def sizes_of_axes(self) -> list[Size]:
        """The shape."""

    @abstractmethod
    def reshape(self, shape: Sequence[Size]) -> Form:
        """Return the elements, in order, in another shape without -1."""

    @abstractmethod
    def squeeze(self, axes: Sequence[int]) -> Form:
        """Drop axes of size 1; they count from 0."""

    @abstractmethod
    def expand_dims(self, axes: Sequence[int]) -> Form:
        """Add axes of size 1; they count from 0, in the result."""

    @abstractmethod
    def transpose(self, order: Sequence[int]) -> Form:
        """Return the axes in another order."""

    @abstractmethod
    def broadcast_to(self, shape: Sequence[Size]) -> Form:
        """Repeat along axes of size 1, and along new first axes."""

    @abstractmethod
    def slice(self, window: Mapping[int, tuple[Size, Size, int]]) -> Form:
        """Cut from first to before last with a step, by axis, within its bounds."""

    @abstractmethod
    def concat(self, others: Sequence[Any], axis: int) -> Any:
        """Join with tensors of the same form along an axis that counts from 0."""

    @abstractmethod
    def astype(self, dtype: str) -> Form:
        """Convert the elements, as ONNX's Cast does."""
