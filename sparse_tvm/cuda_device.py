"""NVIDIA's GPUs for the runtime: TVM's CUDA part, the CUDA runtime and the driver; no compiler."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from sparse_tvm.cudart import LEGACY_STREAM, CudaRuntime
from sparse_tvm.devices import Buffer, Cpu, Device, Resident, register_device
from sparse_tvm.errors import DeviceError, OptionError
from sparse_tvm.pinned import PinnedMemory
from sparse_tvm.vm import tvm_library

_DRIVER = "libcuda.so.1"
_CUDA_RUNTIME = "libcudart.so.13"
_INSTALL_RUNTIME = "pip install 'nvidia-cuda-runtime>=13.0,<14'"
_NAME_BYTES = 256
_HOPPER = 90
"""Artifacts for it alone use instructions that no other device has."""

_MAJOR, _MINOR = 75, 76  # of CUdevice_attribute: compute capability


class Cuda(Device):
    """One GPU: weights and activations stay in its memory, arrays of the host are copied.

    Runs of all models on a GPU are submitted one after the other, each in its stream, and a stream
    waits for the one before: TVM hands memory from one run to the next as soon as it is submitted.

    Raises
    ------
    DeviceError
        When there is no driver, no such device, or no CUDA runtime.
    """

    name: ClassVar[str] = "cuda"
    code: ClassVar[int] = 2
    is_host: ClassVar[bool] = False

    def __init__(self, tvm_ffi: Any, index: int = 0) -> None:
        super().__init__(tvm_ffi, index)
        self.capability = capability_of(index)
        self._cudart = cuda_runtime()
        self._queue = _queue(self._cudart, index)
        self._stream = self._queue.stream
        self._pinned = PinnedMemory(self._cudart)
        self._device = tvm_ffi.device(self.name, index)
        self._allocate = tvm_ffi.get_global_func("runtime.TVMTensorAllocWithScope")

    def hardware(self) -> str | None:
        """Such as NVIDIA H200."""
        return name_of(self.index)

    def machine_arguments(self) -> list[int]:
        """The GPU, and the CPU for shapes."""
        pooled = super().machine_arguments()
        return [*pooled, Cpu.code, 0, pooled[-1]]

    def check(self, target: Mapping[str, Any]) -> None:
        """Refuse devices older than all of the target's, and any but Hopper where it is alone."""
        made_for = [int(name.removeprefix("sm_")) for name in target.get("architectures", ())]
        if made_for and self.capability < min(made_for):
            raise DeviceError(
                f"the artifact is for GPUs of compute capability {min(made_for) / 10} and newer; "
                f"cuda:{self.index} has {self.capability / 10}",
                hint="compile for an older --target, or for the CPU",
            )
        if made_for == [_HOPPER] and self.capability // 10 != _HOPPER // 10:
            raise DeviceError(
                f"the artifact is for GPUs of compute capability 9.0 alone; cuda:{self.index} has "
                f"{self.capability / 10}",
                hint="compile with --target cuda, or for the device's own architecture",
            )

    def stream_of(self, stream: Any) -> int | None:
        """A ``cudaStream_t`` as a number, or of PyTorch's streams and those like them."""
        if stream is None:
            return None
        handle = getattr(stream, "cuda_stream", getattr(stream, "ptr", stream))
        if hasattr(stream, "__cuda_stream__"):
            _version, handle = stream.__cuda_stream__()
        if not isinstance(handle, int) or isinstance(handle, bool):
            raise OptionError(
                f"{type(stream).__name__} is not a CUDA stream",
                hint="give a cudaStream_t as a number, or a torch.cuda.Stream",
            )
        return handle or LEGACY_STREAM

    @contextmanager
    def submitting(self, stream: int | None = None, after: Collection[int] = ()) -> Iterator[None]:
        """Submit to a stream, by default the device's own, after all that came before."""
        with self._queue.turn:
            self._stream = self._queue.stream if stream is None else stream
            before = self._cudart.current_device()
            if before != self.index:
                self._cudart.use_device(self.index)
            self._queue.begin(self._stream)
            for other in after:
                self._queue.follow(other, self._stream)
            try:
                with self.tvm_ffi.use_raw_stream(self._device, self._stream):
                    yield
            finally:
                self._queue.end(self._stream)
                if before != self.index:
                    self._cudart.use_device(before)

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Buffer:
        """Memory of the GPU, and pinned memory to write inputs into."""
        tensor = self._allocate(list(shape), self.tvm_ffi.dtype(str(dtype)), self._device, None)
        host = self._pinned.array(shape, dtype)
        return Buffer(shape, tensor, host, (tensor.data_ptr(), _address(host)))

    def constant(self, array: np.ndarray) -> Any:
        """A copy on the GPU."""
        plain = np.ascontiguousarray(array)
        shape, dtype = plain.shape, self.tvm_ffi.dtype(str(plain.dtype))
        tensor = self._allocate(list(shape), dtype, self._device, None)
        self._copy(tensor.data_ptr(), _address(plain), plain.nbytes)
        self.wait()
        return tensor

    def adopt(self, value: Any, stream: int | None) -> Resident:
        """Take a tensor's memory; have its library order its work before ours, or do it later.

        PyTorch would make an event for each of its tensors, which takes longer than all else here.
        """
        if isinstance(value, self.tvm_ffi.Tensor):  # ours, ordered by the queue
            return Resident(value)
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(value, torch.Tensor) and _is_plain(value):
            producer = torch.cuda.current_stream(self.index).cuda_stream
            return Resident(self.tvm_ffi.from_dlpack(value), producer or LEGACY_STREAM)
        chosen = self._queue.stream if stream is None else stream
        return Resident(self.tvm_ffi.from_dlpack(value.__dlpack__(stream=chosen)))

    def copy_in(self, array: np.ndarray, buffer: Buffer) -> None:
        """Copy into the pinned memory, and let the GPU fetch it."""
        assert buffer.host is not None
        np.copyto(buffer.host, array)
        self._copy(*buffer.addresses, buffer.host.nbytes)

    def copy_within(self, tensor: Any, buffer: Buffer) -> None:
        """Copy on the GPU."""
        self._copy(buffer.tensor.data_ptr(), tensor.data_ptr(), _nbytes(tensor))

    def copy_out(
        self, tensors: Sequence[Any], shared: Callable[[], Sequence[np.ndarray]]
    ) -> list[np.ndarray]:
        """Let the GPU write into pinned memory, which becomes the caller's."""
        arrays = []
        for tensor in tensors:
            array = self._pinned.array(tuple(tensor.shape), np.dtype(str(tensor.dtype)))
            self._copy(_address(array), tensor.data_ptr(), array.nbytes)
            arrays.append(array)
        return arrays

    def duplicate(self, tensor: Any) -> Any:
        """A copy on the GPU."""
        copy = self._allocate(list(tensor.shape), tensor.dtype, self._device, None)
        self._copy(copy.data_ptr(), tensor.data_ptr(), _nbytes(tensor))
        return copy

    def wait(self) -> None:
        """Wait for the stream of the last submission."""
        self._cudart.synchronize(self._stream)

    def close(self) -> None:
        """Free pinned memory, and the blocks on the GPU that TVM keeps for further runs."""
        self._pinned.close()
        self.tvm_ffi.get_global_func("vm.builtin.memory_manager.clear")()

    def _copy(self, target: int, source: int, nbytes: int) -> None:
        if nbytes:
            self._cudart.copy(target, source, nbytes, self._stream)


def _is_plain(tensor: Any) -> bool:
    """Whether PyTorch would hand a tensor over: it needs no gradient, and is what it seems."""
    return not (tensor.requires_grad or tensor.is_neg())


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def _nbytes(tensor: Any) -> int:
    return int(tensor.numel()) * np.dtype(str(tensor.dtype)).itemsize


class _Queue:
    """Turns of all models on one GPU, whatever their streams.

    Nobody else uses the GPU through us while a graph is captured, when CUDA would refuse it.
    """

    def __init__(self, cudart: CudaRuntime, index: int) -> None:
        before = cudart.current_device()
        cudart.use_device(index)
        self._cudart, self.turn = cudart, threading.Lock()
        self.stream = cudart.create_stream()
        self._last, self._others = cudart.create_event(), cudart.create_event()
        self._was_elsewhere = False
        cudart.use_device(before)

    def begin(self, stream: int) -> None:
        """Let a stream wait for the last turn, unless that was in the same stream of ours.

        Others' streams may be gone when the next turn comes, so those are marked at once.
        """
        elsewhere = stream != self.stream
        if elsewhere and not self._was_elsewhere:
            self._cudart.record(self._last, self.stream)
        if elsewhere or self._was_elsewhere:
            self._cudart.wait_for(self._last, stream)

    def follow(self, other: int, stream: int) -> None:
        """Let a stream wait for what somebody has asked of another."""
        if other != stream:
            self._cudart.record(self._others, other)
            self._cudart.wait_for(self._others, stream)

    def end(self, stream: int) -> None:
        """Note where the turn was."""
        self._was_elsewhere = stream != self.stream
        if self._was_elsewhere:
            self._cudart.record(self._last, stream)


@cache
def _queue(cudart: CudaRuntime, index: int) -> _Queue:
    return _Queue(cudart, index)


register_device(Cuda)


def capability_of(index: int) -> int:
    """Compute capability of a device, 90 for 9.0, by the driver.

    Raises
    ------
    DeviceError
        When there is no driver, or no such device.
    """
    driver = _driver()
    count = ctypes.c_int()
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status or not count.value:
        raise DeviceError(
            f"the artifact needs an NVIDIA GPU, and the driver finds none (error {status})",
            hint="`nvidia-smi` lists what the driver sees",
        )
    if not 0 <= index < count.value:
        raise DeviceError(f"there is no cuda:{index}", hint=f"there are {count.value} GPUs")
    device, value, found = ctypes.c_int(), ctypes.c_int(), []
    driver.cuDeviceGet(ctypes.byref(device), index)
    for attribute in (_MAJOR, _MINOR):
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        found.append(value.value)
    return found[0] * 10 + found[1]


def name_of(index: int) -> str:
    """What the driver calls a device."""
    name = ctypes.create_string_buffer(_NAME_BYTES)
    driver, device = _driver(), ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, _NAME_BYTES, device)
    return name.value.decode()


def _driver() -> Any:
    try:
        return ctypes.CDLL(_DRIVER)
    except OSError as error:
        raise DeviceError(
            f"the artifact needs an NVIDIA GPU, and there is no driver here ({_DRIVER})",
            hint="install NVIDIA's driver, 580 or newer; or compile for this machine's CPU",
        ) from error


@cache
def cuda_runtime() -> CudaRuntime:
    """Load the CUDA runtime, and TVM's part for CUDA, which registers itself.

    Raises
    ------
    DeviceError
        When one of them is not installed.
    """
    places = [_CUDA_RUNTIME, *map(str, _installed("nvidia", f"cu13/lib/{_CUDA_RUNTIME}"))]
    for place in places:
        try:
            library = ctypes.CDLL(place, ctypes.RTLD_GLOBAL)
            break
        except OSError:
            continue
    else:
        raise DeviceError(f"{_CUDA_RUNTIME} is not installed", hint=_INSTALL_RUNTIME)
    part = tvm_library("libtvm_runtime_cuda.so")
    if part is None:
        raise DeviceError(
            "TVM's runtime here has no part for CUDA (libtvm_runtime_cuda.so)",
            hint="pip install apache-tvm, whose wheel for Linux on x86-64 has it",
        )
    try:
        ctypes.CDLL(str(part), ctypes.RTLD_LOCAL)
    except OSError as error:
        raise DeviceError(f"TVM's part for CUDA cannot be loaded: {error}") from error
    return CudaRuntime(library)


def _installed(package: str, path: str) -> list[Path]:
    """Where a file of an installed package is."""
    spec = find_spec(package)
    places = [] if spec is None else spec.submodule_search_locations or ()
    return [found for place in places if (found := Path(place) / path).exists()]
