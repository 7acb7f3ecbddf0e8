"""Inputs of a model: what a caller gives is checked, and brought to where the program reads it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from sparse_tvm.devices import ALIGNMENT, Buffer, Device, Resident
from sparse_tvm.errors import InputError
from sparse_tvm.spec import TensorSpec

_HOST_MEMORY = {1, 3, 11, 13}
"""DLPack's kinds of devices whose memory NumPy sees: CPUs, pinned and managed memory."""

_KINDS = {2: "cuda", 4: "opencl", 8: "metal", 10: "rocm"}


class StagedInput:
    """Memory of the device for one input, which takes arrays of any layout."""

    def __init__(self, spec: TensorSpec, device: Device) -> None:
        self.spec, self._device = spec, device
        self._dtype, self._name = np.dtype(spec.dtype), spec.dtype
        self._dtypes = self._dtype, self._dtype.newbyteorder()
        self._symbolic = any(isinstance(dim, str) for dim in spec.shape)
        shape = tuple(0 if isinstance(dim, str) else dim for dim in spec.shape)
        self.buffer = device.allocate(shape, self._dtype)

    def checked(self, value: Any, sizes: dict[str, int], stream: int | None) -> Any:
        """Return `value` as an array, or `Resident`, of this input's dtype and shape.

        `sizes` holds what the symbolic dimensions stand for, and learns from this shape. A tensor
        of the device will be read in `stream`.
        """
        if not isinstance(value, np.ndarray):
            is_there = _is_elsewhere(value)
            value = self._as_tensor(value, stream) if is_there else self._as_array(value)
        if isinstance(value, Resident):
            shape = value.tensor.shape
            if self.spec.only is not None:
                raise self._mismatch("is read here", hint="move it to the host")
        else:
            shape = value.shape
            if value.dtype not in self._dtypes:
                raise self._wrong_dtype(value.dtype, f".astype({self._name!r})")
            if self.spec.only is not None and (value != self.spec.only).any():
                wrong = value[value != self.spec.only].flat[0]
                raise self._mismatch(
                    f"is {wrong}, but must be {self.spec.only}: what the model does for other "
                    "values could not be compiled for these sizes"
                )
        if self._symbolic:
            self._check_symbolic(shape, sizes)
        elif shape != self.spec.shape:
            raise self._wrong_shape(shape)
        return value

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Size of a value of a shape."""
        return math.prod(shape) * self._dtype.itemsize

    def fill(self, value: Any) -> Any:
        """Return `value` as the program may read it: copied into the buffer, unless it lies on
        the device and is aligned."""
        if isinstance(value, np.ndarray):
            there = self._device.in_place(value)
            if there is not None:
                return there
        copy: Callable[[Any, Buffer], None] = self._device.copy_in
        if isinstance(value, Resident):
            value, copy = value.tensor, self._device.copy_within
            if value.data_ptr() % ALIGNMENT == 0:
                return value
        if value.shape != self.buffer.shape:
            self.buffer = self._device.allocate(value.shape, self._dtype)
        copy(value, self.buffer)
        return self.buffer.tensor

    def _as_tensor(self, value: Any, stream: int | None) -> Resident:
        """A tensor of the device over the memory of one that speaks DLPack."""
        kind, index = value.__dlpack_device__()
        device = self._device
        if (kind, index) != (device.code, device.index):
            place = f"{_KINDS.get(kind, f'device {kind}')}:{index}"
            hint = f"move it to {'the host' if device.is_host else device}"
            raise self._mismatch(f"is on {place}, and the model on {device}", hint=hint)
        try:
            adopted = device.adopt(value, stream)
        except (BufferError, ValueError, TypeError, RuntimeError) as error:
            raise self._mismatch(f"cannot be read: {error}") from error
        if adopted.tensor.dtype != self._name:
            raise self._wrong_dtype(adopted.tensor.dtype, f".to(torch.{self._name})")
        if not adopted.tensor.is_contiguous():
            raise self._mismatch("is not contiguous", hint="call .contiguous() on it")
        return adopted

    def _as_array(self, value: Any) -> np.ndarray:
        # Ragged lists, and tensors of another device or that need gradients, are refused.
        try:
            array = np.from_dlpack(value) if _speaks_dlpack(value) else np.asarray(value)
        except (BufferError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise self._mismatch(f"is not an array: {error}") from error
        is_plain = isinstance(value, (list, tuple, bool, int, float))
        if is_plain and np.can_cast(array.dtype, self._dtype, "same_kind"):
            return array.astype(self._dtype)
        return array

    def _check_symbolic(self, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
        if len(shape) != len(self.spec.shape):
            raise self._wrong_shape(shape)
        for size, dim in zip(shape, self.spec.shape, strict=True):
            if isinstance(dim, str) and sizes.setdefault(dim, size) != size:
                raise self._wrong_shape(shape, f" where {dim} is {sizes[dim]} in another place")
            if not isinstance(dim, str) and size != dim:
                raise self._wrong_shape(shape)

    def _wrong_dtype(self, found: Any, how: str) -> InputError:
        problem = f"has dtype {found}, expected {self._name}"
        return self._mismatch(problem, hint=f"convert it with {how}")

    def _wrong_shape(self, shape: tuple[int, ...], why: str = "") -> InputError:
        found, expected = (", ".join(map(str, dims)) for dims in (shape, self.spec.shape))
        return self._mismatch(f"has shape [{found}], expected [{expected}]{why}")

    def _mismatch(self, problem: str, hint: str | None = None) -> InputError:
        return InputError(f"input {self.spec.name!r} {problem}", hint=hint)


def _speaks_dlpack(value: Any) -> bool:
    return hasattr(value, "__dlpack__") and not isinstance(value, np.generic)


def _is_elsewhere(value: Any) -> bool:
    """Whether a value lies in memory that NumPy does not see."""
    return hasattr(value, "__dlpack_device__") and value.__dlpack_device__()[0] not in _HOST_MEMORY
