"""NVIDIA's GPUs for the runtime: TVM's CUDA part, the CUDA runtime and the driver; no compiler."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from sparse_tvm.devices import Buffer, Cpu, Device, register_device
from sparse_tvm.errors import DeviceError

_DRIVER = "libcuda.so.1"
_CUDA_RUNTIME = "libcudart.so.13"
_INSTALL_RUNTIME = "pip install 'nvidia-cuda-runtime>=13.0,<14'"
_MAJOR, _MINOR = 75, 76  # of CUdevice_attribute: compute capability


class Cuda(Device):
    """One GPU: weights and activations stay in its memory, inputs and outputs are copied.

    Raises
    ------
    DeviceError
        When there is no driver, no such device, or no CUDA runtime.
    """

    name: ClassVar[str] = "cuda"
    code: ClassVar[int] = 2

    def __init__(self, tvm_ffi: Any, index: int = 0) -> None:
        super().__init__(tvm_ffi, index)
        self.capability = capability_of(index)
        _load_tvm_runtime()
        self._device = tvm_ffi.device(self.name, index)
        self._function = tvm_ffi.get_global_func

    def machine_arguments(self) -> list[int]:
        """The GPU, and the CPU for shapes."""
        pooled = super().machine_arguments()
        return [*pooled, Cpu.code, 0, pooled[-1]]

    def check(self, target: Mapping[str, Any]) -> None:
        """Refuse devices older than all architectures of the target."""
        made_for = [int(name.removeprefix("sm_")) for name in target.get("architectures", ())]
        if made_for and self.capability < min(made_for):
            raise DeviceError(
                f"the artifact is for GPUs of compute capability {min(made_for) / 10} and newer; "
                f"cuda:{self.index} has {self.capability / 10}",
                hint="compile for an older --target, or for the CPU",
            )

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Buffer:
        """Memory of the GPU, which NumPy does not see."""
        allocate = self._function("runtime.TVMTensorAllocWithScope")
        tensor = allocate(list(shape), self.tvm_ffi.dtype(str(dtype)), self._device, None)
        return Buffer(shape, tensor)

    def constant(self, array: np.ndarray) -> Any:
        """A copy on the GPU."""
        buffer = self.allocate(array.shape, array.dtype)
        self.copy_in(array, buffer)
        return buffer.tensor

    def copy_in(self, array: np.ndarray, buffer: Buffer) -> None:
        """Copy through memory in the buffer's order and byte order."""
        if array.size:
            plain = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
            copy = self._function("runtime.TVMTensorCopyFromBytes")
            copy(buffer.tensor, ctypes.c_void_p(plain.ctypes.data), plain.nbytes)

    def copy_out(self, tensors: Sequence[Any], shared: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Copies."""
        copy = self._function("runtime.TVMTensorCopyToBytes")
        arrays = []
        for tensor in tensors:
            array = np.empty(tuple(tensor.shape), np.dtype(str(tensor.dtype)))
            if array.size:
                copy(tensor, ctypes.c_void_p(array.ctypes.data), array.nbytes)
            arrays.append(array)
        return arrays

    def wait(self) -> None:
        """Wait for the stream that kernels run on."""
        self._function("runtime.Device_StreamSync")(self._device, 0)


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


def _driver() -> Any:
    try:
        return ctypes.CDLL(_DRIVER)
    except OSError as error:
        raise DeviceError(
            f"the artifact needs an NVIDIA GPU, and there is no driver here ({_DRIVER})",
            hint="install NVIDIA's driver, 580 or newer; or compile for this machine's CPU",
        ) from error


@cache
def _load_tvm_runtime() -> None:
    """Load the CUDA runtime, and TVM's part for CUDA, which registers itself."""
    places = [_CUDA_RUNTIME, *map(str, _installed("nvidia", f"cu13/lib/{_CUDA_RUNTIME}"))]
    for place in places:
        try:
            ctypes.CDLL(place, ctypes.RTLD_GLOBAL)
            break
        except OSError:
            continue
    else:
        raise DeviceError(f"{_CUDA_RUNTIME} is not installed", hint=_INSTALL_RUNTIME)
    parts = _installed("tvm", "lib/libtvm_runtime_cuda.so")
    if not parts:
        raise DeviceError(
            "TVM's runtime here has no part for CUDA (libtvm_runtime_cuda.so)",
            hint="pip install apache-tvm, whose wheel for Linux on x86-64 has it",
        )
    try:
        ctypes.CDLL(str(parts[0]), ctypes.RTLD_LOCAL)
    except OSError as error:
        raise DeviceError(f"TVM's part for CUDA cannot be loaded: {error}") from error


def _installed(package: str, path: str) -> list[Path]:
    """Where a file of an installed package is."""
    spec = find_spec(package)
    places = [] if spec is None else spec.submodule_search_locations or ()
    return [found for place in places if (found := Path(place) / path).exists()]
