"""Runs on the host that are like the last one: what dtypes and shapes decide is decided once.

Where the library has the whole program as one function (`sparse_tvm.backends.straight_program`),
such runs call that, instead of TVM's virtual machine, unless they need much memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparse_tvm.devices import COPIED_BYTES, Device

Signature = list[tuple[np.dtype[Any], tuple[int, ...]]]
"""Dtype and shape of each input, which are all that decides how a run goes."""

_MOST_WORKSPACE = 32 << 20
"""Bytes: what takes more spends little of its time in the machine, and would need them twice.
Convolutional networks of 13 MB still lose 4 % there."""


def signature_of(values: Sequence[Any]) -> Signature | None:
    """The signature of arrays; None where not all are NumPy's own."""
    signature = []
    for value in values:
        if type(value) is not np.ndarray:
            return None
        signature.append((value.dtype, value.shape))
    return signature


def matching(signature: Signature, values: Sequence[Any]) -> bool:
    """Whether values are NumPy's own arrays, of a signature."""
    if len(values) != len(signature):
        return False
    for value, (dtype, shape) in zip(values, signature, strict=True):
        if type(value) is not np.ndarray or value.dtype is not dtype or value.shape != shape:
            return False
    return True


@dataclass(frozen=True, slots=True)
class Repeat:
    """What a run did that the next one of its signature can do again.

    Attributes
    ----------
    signature : Signature
        Of its inputs; the object itself tells that inputs are of it.
    memory : list[Any]
        Arrays that inputs are copied to; None for those that may be read where they are.
    function : Callable[..., Any]
        The program.
    arguments : list[Any]
        Of the function.
    outputs : list[Any] | None
        Arrays that the function writes, to be copied; None where it returns tensors.
    in_place : bool
        Whether there are inputs without memory: each run has arguments of its own for these.
    """

    signature: Signature
    memory: list[Any]
    function: Callable[..., Any]
    arguments: list[Any]
    outputs: list[Any] | None = None
    in_place: bool = False


class Straight:
    """The whole program as one function.

    Parameters
    ----------
    function : Callable[..., int]
        As :data:`sparse_tvm.vm.STRAIGHT` describes it.
    tensors : Sequence[Any]
        The program's weights, then its constants, which it reads by their addresses.
    device : Device
        A host.
    """

    def __init__(
        self, function: Callable[..., int], tensors: Sequence[Any], device: Device
    ) -> None:
        self._function, self._tensors, self._device = function, tensors, device
        self._addresses, addresses = self._memory((len(tensors),), np.int64)
        addresses[...] = [tensor.data_ptr() for tensor in tensors]

    def repeat(
        self,
        signature: Signature,
        memory: list[np.ndarray | None],
        inputs: Sequence[Any],
        results: Sequence[np.ndarray],
    ) -> Repeat | None:
        """A repeat of a run with `results`; None where these, or what lies between, are large.

        ``inputs`` are the tensors of that run, and ``memory`` as :class:`Repeat` has it.
        """
        if any(result.nbytes > COPIED_BYTES for result in results):
            return None
        shapes = [*(shape for _, shape in signature), *(each.shape for each in results)]
        if any(0 in shape for shape in shapes):
            return None  # NumPy's strides of nothing are not those that kernels expect
        outputs = [self._memory(result.shape, result.dtype) for result in results]
        tensors = [*inputs, *(tensor for tensor, _ in outputs)]
        size, needed = 0, 1
        while needed > size:
            size = needed
            if size > _MOST_WORKSPACE:
                return None
            arguments = [*tensors, self._memory((size,), np.uint8)[0], self._addresses]
            needed = self._function(*arguments)
        in_place = any(each is None for each in memory)
        hosts = [host for _, host in outputs]
        return Repeat(signature, memory, self._function, arguments, hosts, in_place)

    def _memory(self, shape: tuple[int, ...], dtype: Any) -> tuple[Any, np.ndarray]:
        """Aligned memory as a tensor and an array."""
        buffer = self._device.allocate(shape, np.dtype(dtype))
        assert buffer.host is not None
        return buffer.tensor, buffer.host
