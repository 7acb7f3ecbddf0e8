"""The binding of the CUDA runtime, against NVIDIA's library on a machine without a driver."""

from __future__ import annotations

import ctypes
import inspect
import re

import pytest

from sparse_tvm import cudart
from sparse_tvm.cuda_device import _CUDA_RUNTIME, Cuda, _installed
from sparse_tvm.errors import DeviceError


@pytest.fixture
def library() -> ctypes.CDLL:
    (path,) = _installed("nvidia", f"cu13/lib/{_CUDA_RUNTIME}")
    return ctypes.CDLL(str(path))


def test_the_library_has_what_is_called(library):
    names = set(re.findall(r"\bcuda[A-Z]\w+", inspect.getsource(cudart)))
    assert len(names - {"cudaStreamLegacy"}) > 10
    for name in names - {"cudaStreamLegacy"}:
        assert hasattr(library, name)


def test_failures_are_told_in_its_words(library):
    runtime = cudart.CudaRuntime(library)
    message = r"CUDA failed in cudaStreamCreateWithFlags: .*driver.* \(error \d+\)"
    with pytest.raises(DeviceError, match=message):
        runtime.create_stream()


@pytest.mark.parametrize(
    ("capability", "architectures", "refusal"),
    [
        (80, ["sm_80"], None),
        (100, ["sm_80", "sm_90"], None),
        (75, ["sm_80", "sm_90"], r"8\.0 and newer; cuda:0 has 7\.5"),
        (90, ["sm_90"], None),
        (100, ["sm_90"], r"9\.0 alone; cuda:0 has 10\.0"),
    ],
)
def test_devices_that_code_was_not_made_for(capability, architectures, refusal):
    device = object.__new__(Cuda)
    device.capability, device.index = capability, 0
    if refusal is None:
        device.check({"architectures": architectures})
        return
    with pytest.raises(DeviceError, match=refusal):
        device.check({"architectures": architectures})
