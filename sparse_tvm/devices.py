"""Devices: what the runtime needs of the hardware that a model runs on.

A backend names its device, and so does the manifest. Memory for inputs is allocated here, arrays
are copied in and out, and whoever reads a result waits for it first. The CPU copies inputs into
aligned memory, but for large ones that are so already, maps weights where they lie in the file, and
hands outputs over as they are. Tensors that lie on a GPU already are neither copied when they come
in nor when they go out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any, ClassVar, NamedTuple

import numpy as np

from sparse_tvm.errors import ArtifactError, OptionError

ALIGNMENT = 64
"""Bytes: TVM's kernels read inputs with aligned vector loads, and crash on others."""

_POOLED_ALLOCATOR = 2

COPIED_BYTES = 64 * 1024
"""Outputs up to this size are copied, which costs nothing and covers outputs that are constants
of the program; larger ones are handed over as the program allocated them."""


_NOBODY_ELSE = nullcontext()


class Buffer(NamedTuple):
    """Memory of a device for one input.

    Attributes
    ----------
    shape : tuple[int, ...]
        Its extents.
    tensor : tvm_ffi.Tensor
        As programs take it.
    host : np.ndarray | None
        The same memory where NumPy can see it, or memory that is copied there.
    addresses : tuple[int, int]
        Of the tensor, and of the host's memory, where that is another.
    """

    shape: tuple[int, ...]
    tensor: Any
    host: np.ndarray | None = None
    addresses: tuple[int, int] = (0, 0)


class Resident(NamedTuple):
    """A tensor that lies on the device, and the stream that it is computed in.

    The stream is None where nobody has to wait for it any more.
    """

    tensor: Any
    producer: int | None = None


class Device(ABC):
    """A kind of device.

    Attributes
    ----------
    name : str
        As manifests have it.
    code : int
        DLPack's number of the kind.
    is_host : bool
        Whether it is the machine's CPU: calls take its threads, and NumPy sees its memory.
    """

    name: ClassVar[str]
    code: ClassVar[int]
    is_host: ClassVar[bool]

    def __init__(self, tvm_ffi: Any, index: int = 0) -> None:
        self.tvm_ffi, self.index = tvm_ffi, index

    def __str__(self) -> str:
        return f"{self.name}:{self.index}"

    def hardware(self) -> str | None:
        """What the driver calls it; None where there is no driver."""
        return None

    def machine_arguments(self) -> list[int]:
        """What TVM's virtual machine wants to know to run here."""
        return [self.code, self.index, _POOLED_ALLOCATOR]

    @abstractmethod
    def check(self, target: Mapping[str, Any]) -> None:
        """See that code for a target, as the manifest has it, runs on the device.

        Raises
        ------
        DeviceError
            When it does not.
        """

    @abstractmethod
    def stream_of(self, stream: Any) -> int | None:
        """The handle of a stream that a user gave.

        Raises
        ------
        OptionError
            When it is none, or the device has none.
        """

    def submitting(
        self, stream: int | None = None, after: Collection[int] = ()
    ) -> AbstractContextManager[None]:
        """Alone with the device: everything within is asked of it in one stream, in order, and
        after what other streams have been asked."""
        return _NOBODY_ELSE

    @abstractmethod
    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Buffer:
        """Memory for an input."""

    def copies(self, array: np.ndarray) -> bool:
        """Whether arrays of this dtype and shape are copied in, wherever they lie."""
        return True

    def in_place(self, array: np.ndarray) -> Any:
        """An array as a tensor that programs read where it is; None where it has to be copied."""
        return None

    @abstractmethod
    def constant(self, array: np.ndarray) -> Any:
        """A weight as a tensor that programs read; it is never written."""

    def adopt(self, value: Any, stream: int | None) -> Resident:
        """Memory of the device that speaks DLPack, as a tensor for use in a stream.

        This, :meth:`copy_within` and :meth:`duplicate` are not asked of hosts.
        """
        raise NotImplementedError

    @abstractmethod
    def copy_in(self, array: np.ndarray, buffer: Buffer) -> None:
        """Copy an array of the buffer's shape, of any strides and byte order, into it."""

    def copy_within(self, tensor: Any, buffer: Buffer) -> None:
        """Copy a tensor of the device, of the buffer's shape, into it."""
        raise NotImplementedError

    @abstractmethod
    def copy_out(
        self, tensors: Sequence[Any], shared: Callable[[], Sequence[np.ndarray]]
    ) -> list[np.ndarray]:
        """Results as arrays that belong to the caller: none shares memory with another, or with
        those that ``shared`` returns. What is in them is there after :meth:`wait`."""

    def duplicate(self, tensor: Any) -> Any:
        """A copy of a tensor, on the device."""
        raise NotImplementedError

    @abstractmethod
    def wait(self) -> None:
        """Return when all is done that was last submitted."""

    @abstractmethod
    def close(self) -> None:
        """Give back what was kept to be used again."""


class Cpu(Device):
    """The machine's own cores and memory."""

    name: ClassVar[str] = "cpu"
    code: ClassVar[int] = 1
    is_host: ClassVar[bool] = True

    def __str__(self) -> str:
        return self.name

    def check(self, target: Mapping[str, Any]) -> None:
        """What the CPU must have is checked before it is asked."""

    def stream_of(self, stream: Any) -> int | None:
        """None, as calls return when they are done."""
        if stream is not None:
            raise OptionError("a model on the CPU runs in no stream", hint="leave out `stream`")
        return None

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Buffer:
        """Aligned memory, seen from both sides."""
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        memory = np.empty(nbytes + ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % ALIGNMENT
        host = memory[start : start + nbytes].view(dtype).reshape(shape)
        return Buffer(shape, self.tvm_ffi.from_dlpack(host), host)

    def copies(self, array: np.ndarray) -> bool:
        """Small ones, and indices, for what is checked of them has to hold until they are read."""
        return array.nbytes <= COPIED_BYTES or array.dtype.kind != "f"

    def in_place(self, array: np.ndarray) -> Any:
        """Large arrays that are aligned, as outputs of ours are: a decoder's caches come back."""
        suits = (
            not self.copies(array)
            and array.ctypes.data % ALIGNMENT == 0
            and array.flags.c_contiguous
            and array.flags.writeable  # others cannot be handed over
            and array.dtype.isnative
        )
        return self.tvm_ffi.from_dlpack(array) if suits else None

    def constant(self, array: np.ndarray) -> Any:
        """The array itself."""
        return self.tvm_ffi.from_dlpack(array)

    def copy_in(self, array: np.ndarray, buffer: Buffer) -> None:
        """Copy with NumPy, which sees to strides and byte order."""
        assert buffer.host is not None
        buffer.host[...] = array

    def copy_out(
        self, tensors: Sequence[Any], shared: Callable[[], Sequence[np.ndarray]]
    ) -> list[np.ndarray]:
        """Large results as they are, unless their memory is also somebody else's."""
        others: Sequence[np.ndarray] | None = None
        owned: list[np.ndarray] = []
        for tensor in tensors:
            array = np.from_dlpack(tensor)
            if array.nbytes <= COPIED_BYTES:
                owned.append(array.copy())
                continue
            if others is None:
                others = shared()
            if not array.flags.writeable or any(
                np.may_share_memory(array, other) for other in (*others, *owned)
            ):
                array = array.copy()
            owned.append(array)
        return owned

    def wait(self) -> None:
        """A call returns when it is done."""

    def close(self) -> None:
        """NumPy's memory ends with its arrays, and what TVM keeps serves other models."""


def parse_device(text: str) -> tuple[str, int]:
    """Kind and index of a device as users name it: ``cpu``, ``cuda``, ``cuda:1``.

    Raises
    ------
    OptionError
        When it is no such name.
    """
    kind, colon, number = text.partition(":")
    known = [*_KINDS, *_MODULES]
    well_formed = number.isdecimal() if colon else not number
    if kind not in known or not well_formed or (kind == Cpu.name and int(number or 0)):
        raise OptionError(f"there is no device {text!r}", hint="such as cpu, cuda or cuda:1")
    return kind, int(number or 0)


_KINDS: dict[str, type[Device]] = {Cpu.name: Cpu}

_MODULES = {"cuda": "sparse_tvm.cuda_device"}
"""Kinds that register themselves when their module is imported, by name."""


def register_device(kind: type[Device]) -> None:
    """Let artifacts run on devices of another kind."""
    _KINDS[kind.name] = kind


def open_device(name: str, tvm_ffi: Any, index: int = 0) -> Device:
    """A device by the name that a manifest gives.

    Raises
    ------
    ArtifactError
        When this runtime knows no such kind.
    DeviceError
        When there is no device of the kind here, or what drives it is missing.
    """
    if name in _MODULES:
        import_module(_MODULES[name])
    if name not in _KINDS:
        known = ", ".join({**_KINDS, **_MODULES})
        raise ArtifactError(f"this runtime has no device {name!r}", hint=f"it has: {known}")
    return _KINDS[name](tvm_ffi, index)
