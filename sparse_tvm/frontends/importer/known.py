"""Tensors whose elements are known: numbers, and expressions of symbolic sizes.

``Shape -> Gather -> Unsqueeze -> Concat -> Reshape`` and its like, which exporters write into
graphs, compute nothing but sizes. Evaluated on small arrays, none of them becomes a run-time
operator, and all shapes stay known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparse_tvm.frontends.importer.forms import INTEGERS, Form, NotInForm
from sparse_tvm.frontends.importer.sizes import Size

MAX_ELEMENTS = 64
"""Larger arrays are not shapes."""


@dataclass(frozen=True)
class Known(Form):
    """A tensor whose elements are known, at least as expressions.

    Attributes
    ----------
    elements : np.ndarray
        An array of objects: Python numbers, and expressions where sizes are symbolic.
    dtype : str
        The tensor's element type.
    """

    elements: np.ndarray
    dtype: str

    @classmethod
    def of(cls, array: np.ndarray) -> Known:
        """Wrap an array of numbers."""
        return cls(_objects(array.tolist(), array.shape), array.dtype.name)

    @classmethod
    def shape(cls, sizes: Sequence[Size]) -> Known:
        """Wrap a shape."""
        return cls(_objects(list(sizes), (len(sizes),)), "int64")

    @classmethod
    def scalar(cls, value: Any, dtype: str) -> Known:
        """Wrap one number or size."""
        return cls(_objects(value, ()), dtype)

    @property
    def is_constant(self) -> bool:
        """Whether all elements are numbers."""
        return all(isinstance(e, int | float) for e in self.elements.flat)

    def constant(self) -> np.ndarray:
        """Return the elements of a constant."""
        if not self.is_constant:
            raise NotInForm
        return self.elements.astype(self.dtype)

    def sizes(self) -> list[Size]:
        """Return the elements of a vector, or of a scalar."""
        return list(self.elements.flat)

    @property
    def sizes_of_axes(self) -> list[Size]:
        """See `Form`."""
        return list(self.elements.shape)

    def reshape(self, shape: Sequence[Size]) -> Known:
        """See `Form`."""
        return self._of(self.elements.reshape(_numbers(shape)))

    def squeeze(self, axes: Sequence[int]) -> Known:
        """See `Form`."""
        return self._of(self.elements.squeeze(tuple(axes)))

    def expand_dims(self, axes: Sequence[int]) -> Known:
        """See `Form`."""
        return self._of(np.expand_dims(self.elements, tuple(axes)))

    def transpose(self, order: Sequence[int]) -> Known:
        """See `Form`."""
        return self._of(self.elements.transpose(tuple(order)))

    def broadcast_to(self, shape: Sequence[Size]) -> Known:
        """See `Form`."""
        wanted = _numbers(shape)
        if math.prod(wanted) > MAX_ELEMENTS:
            raise NotInForm
        return self._of(np.broadcast_to(self.elements, wanted))

    def slice(self, window: Mapping[int, tuple[Size, Size, int]]) -> Known:
        """See `Form`."""
        cuts: list[Any] = [slice(None)] * self.elements.ndim
        for axis, (first, last, step) in window.items():
            [begin, end] = _numbers((first, last))
            cuts[axis] = slice(begin, end if end >= 0 else None, step)
        return self._of(self.elements[tuple(cuts)])

    def concat(self, others: Sequence[Known], axis: int) -> Known:
        """See `Form`."""
        return self._of(np.concatenate([self.elements, *(o.elements for o in others)], axis))

    def take(self, indices: Any, axis: int) -> Known:
        """Return the elements at indices, which may be negative, along an axis."""
        return self._of(np.take(self.elements, np.asarray(indices, np.int64), axis))

    def astype(self, dtype: str) -> Known:
        """See `Form`."""
        return Known(map_elements(lambda value: _cast(value, dtype), self.elements), dtype)

    def _of(self, elements: Any) -> Known:
        array = elements if isinstance(elements, np.ndarray) else _objects(elements, ())
        return Known(array, self.dtype)


def map_elements(function: Callable[..., Any], *arrays: np.ndarray) -> np.ndarray:
    """Apply a function to the elements of arrays that are broadcast to one shape."""
    shape = np.broadcast_shapes(*(array.shape for array in arrays))
    if math.prod(shape) > MAX_ELEMENTS:
        raise NotInForm
    result = np.empty(shape, object)
    operands = [np.broadcast_to(array, shape) for array in arrays]
    for index in np.ndindex(shape):
        result[index] = function(*(operand[index] for operand in operands))
    return result


def _objects(values: Any, shape: tuple[int, ...]) -> np.ndarray:
    array = np.empty(shape, object)
    array[...] = np.array(values, object).reshape(shape) if shape else values
    return array


def _numbers(sizes: Sequence[Size]) -> tuple[int, ...]:
    if not all(isinstance(size, int) for size in sizes):
        raise NotInForm
    return tuple(sizes)


def _cast(value: Any, dtype: str) -> Any:
    if isinstance(value, bool | int | float):
        return np.asarray(value).astype(dtype).item()
    if dtype in INTEGERS:
        return value
    raise NotInForm
