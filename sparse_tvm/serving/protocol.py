"""The Open Inference Protocol's tensors: checked, decoded and encoded, for REST and gRPC alike.

Nothing a client sends gets past here unchecked: names, dtypes, ranks, sizes, element counts, and
the ranges of integers where the model's manifest gives them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sparse_tvm.serving.limits import Limits
from sparse_tvm.serving.refusal import invalid
from sparse_tvm.spec import TensorSpec

DATATYPES = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
}
"""NumPy's names of element types, and the protocol's."""

_LONGEST_QUOTE = 80
_MAX_DIMENSION = 1 << 31
_MAX_TIMEOUT = 1e18
_TIMEOUT_DIGITS = 18


@dataclass(frozen=True)
class Call:
    """An inference request, decoded and fit for the model.

    Parameters
    ----------
    arrays : dict[str, np.ndarray]
        One per input of the model, with exactly its dtype and a shape that fits.
    sizes : dict[str, int]
        What the symbolic dimensions stand for.
    outputs : dict[str, bool | None]
        The wanted outputs, and whether each should come in binary; empty for all.
    binary : bool
        Whether outputs come in binary where nothing else is said.
    id : str
        The client's name for the request.
    timeout : float | None
        Seconds that the client will wait.
    """

    arrays: dict[str, np.ndarray]
    sizes: dict[str, int]
    outputs: dict[str, bool | None] = field(default_factory=dict)
    binary: bool = False
    id: str = ""
    timeout: float | None = None


class Shapes:
    """Checks that the inputs of one request fit the model, and each other."""

    def __init__(self, specs: Sequence[TensorSpec], limits: Limits) -> None:
        self.specs = {spec.name: spec for spec in specs}
        self._limits = limits
        self.sizes: dict[str, int] = {}
        self.arrays: dict[str, np.ndarray] = {}

    def expect(self, name: Any, datatype: Any, shape: Any) -> tuple[TensorSpec, list[int]]:
        """Return the spec and shape of an input that a client announces.

        Raises
        ------
        Refusal
            When the model has no such input, or takes another dtype or shape.
        """
        spec = self.specs.get(name) if isinstance(name, str) else None
        if spec is None:
            takes = ", ".join(self.specs)
            raise invalid(f"the model has no input {quoted(name)}; it takes {takes}")
        if name in self.arrays:
            raise invalid(f"input {name!r} comes twice")
        if datatype != DATATYPES.get(spec.dtype):
            raise invalid(
                f"input {name!r} has datatype {quoted(datatype)}, the model takes "
                f"{DATATYPES.get(spec.dtype, spec.dtype)}"
            )
        return spec, self._shape(spec, shape)

    def add(self, spec: TensorSpec, array: np.ndarray) -> None:
        """Take the decoded input.

        Raises
        ------
        Refusal
            When it holds an integer that the model has no entry for.
        """
        low, high = self._limits.values.get(spec.name, (None, None))
        if low is not None and (array.min() < low or array.max() > high):
            raise invalid(f"input {spec.name!r} has values outside {low} to {high}")
        self.arrays[spec.name] = array

    def complete(self) -> dict[str, np.ndarray]:
        """Return all inputs.

        Raises
        ------
        Refusal
            When one is missing.
        """
        missing = [name for name in self.specs if name not in self.arrays]
        if missing:
            raise invalid(f"input {', '.join(map(repr, missing))} is missing")
        return self.arrays

    def _shape(self, spec: TensorSpec, shape: Any) -> list[int]:
        plain = isinstance(shape, (list, tuple)) and all(type(size) is int for size in shape)
        if not plain or len(shape) != len(spec.shape):
            raise self._wrong(spec, shape)
        for size, dim in zip(shape, spec.shape, strict=True):
            if not 0 < size < _MAX_DIMENSION or (isinstance(dim, int) and size != dim):
                raise self._wrong(spec, shape)
            if isinstance(dim, int):
                continue
            if self.sizes.setdefault(dim, size) != size:
                raise self._wrong(spec, shape, f"; {dim} is {self.sizes[dim]} in another input")
            low, high = self._limits.sizes.get(dim, (1, _MAX_DIMENSION))
            if not low <= size <= high:
                raise self._wrong(spec, shape, f" with {dim} from {low} to {high}")
        return list(shape)

    def _wrong(self, spec: TensorSpec, shape: Any, why: str = "") -> Exception:
        expected = ", ".join(map(str, spec.shape))
        return invalid(
            f"input {spec.name!r} has shape {quoted(shape)}, the model takes [{expected}]{why}"
        )


def from_numbers(spec: TensorSpec, values: Any, shape: Sequence[int]) -> np.ndarray:
    """Return the array for as many numbers as its shape says.

    Parameters
    ----------
    values : sequence of numbers
        A list, or what an array can be made of.

    Raises
    ------
    Refusal
        When there are too many or too few, or numbers that the dtype cannot hold.
    """
    if len(values) != math.prod(shape):
        raise invalid(
            f"input {spec.name!r} has {len(values)} elements, its shape says {quoted(shape)}"
        )
    dtype = np.dtype(spec.dtype)
    try:
        # Integers beyond int64 beside smaller ones would become floats.
        beyond = dtype == np.uint64 and len(values) > 0 and min(values) >= 0
        array = np.asarray(values, np.uint64 if beyond else None)
    except (ValueError, TypeError, OverflowError):
        array = np.empty(0, object)
    if not _fits(array, dtype):
        raise invalid(f"the data of input {spec.name!r} do not fit {DATATYPES[spec.dtype]}")
    return array.astype(dtype).reshape(shape)


def from_bytes(spec: TensorSpec, data: Any, shape: Sequence[int]) -> np.ndarray:
    """Return the array over raw little-endian bytes.

    Raises
    ------
    Refusal
        When they are too many or too few.
    """
    dtype = np.dtype(spec.dtype)
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise invalid(f"input {spec.name!r} has {len(data)} bytes, its shape takes {expected}")
    array = np.frombuffer(data, dtype).reshape(shape)
    if dtype == np.bool_ and array.view(np.uint8).max(initial=0) > 1:
        raise invalid(f"input {spec.name!r} has bytes that are neither 0 nor 1")
    return array


def check_outputs(names: Sequence[Any], specs: Sequence[TensorSpec]) -> None:
    """Refuse wanted outputs that the model does not have."""
    known = [spec.name for spec in specs]
    for name in names:
        if name not in known:
            raise invalid(f"the model has no output {quoted(name)}; it returns {', '.join(known)}")


def timeout_of(timeout: Any) -> float | None:
    """Return the seconds in Triton's ``timeout`` parameter, which counts microseconds.

    Raises
    ------
    Refusal
        When it is no such number.
    """
    if timeout in (None, 0, "0"):
        return None
    if isinstance(timeout, str) and timeout.isdecimal() and len(timeout) <= _TIMEOUT_DIGITS:
        timeout = int(timeout)
    # NaN is not comparable, and an integer may be too large for a float.
    plain = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    if not plain or not 0 < timeout < _MAX_TIMEOUT:
        raise invalid("timeout must be a positive number of microseconds")
    return float(timeout) / 1e6


def describe(spec: TensorSpec) -> dict[str, Any]:
    """Return a tensor's metadata; symbolic dimensions are -1."""
    return {
        "name": spec.name,
        "datatype": DATATYPES.get(spec.dtype, spec.dtype),
        "shape": [-1 if isinstance(dim, str) else dim for dim in spec.shape],
    }


def _fits(array: np.ndarray, dtype: np.dtype[Any]) -> bool:
    """Whether JSON numbers have the right kind and range."""
    if dtype.kind == "b":
        return array.dtype.kind == "b"
    if dtype.kind == "f":
        return array.dtype.kind in "iuf"
    if array.dtype.kind not in "iu":
        return False
    limits = np.iinfo(dtype)
    return array.size == 0 or (int(array.min()) >= limits.min and int(array.max()) <= limits.max)


def quoted(value: Any) -> str:
    """Return a client's word for an error message, cut where it is long."""
    text = repr(value[:_LONGEST_QUOTE] if isinstance(value, str) else value)
    return text if len(text) <= _LONGEST_QUOTE else text[: _LONGEST_QUOTE - 3] + "..."
