"""Kernels on the emulated GPU, compared with NumPy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tvm
from emulated_gpu import build, table_of
from tvm.runtime import _ffi_api

from sparse_tvm.backends.cuda_codegen import compile_kernel, device_source
from sparse_tvm.cuda_device import Cuda
from sparse_tvm.targets.cuda import CUDA_TARGETS
from sparse_tvm.vm import runtime

SM80, SM90 = CUDA_TARGETS[0], CUDA_TARGETS[2]


def run(
    function: tvm.tirx.PrimFunc, arrays: Sequence[np.ndarray], output: Any, target: Any = SM80
) -> np.ndarray:
    """Run a kernel on copies of arrays, with its threads in both orders; return what it wrote.

    ``output`` is an array of the result's shape and type; the kernel's is filled with NaNs first.
    """
    module = compile_kernel(function, target)
    table = table_of(_ffi_api.ModulePackImportsToTensor(module).numpy().tobytes())
    library = runtime().load_module(str(build(device_source(module), table)))
    module.clear_imports()
    module.import_module(library)
    device = Cuda(runtime())
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for backwards in (False, True):
            if backwards:
                patch.setenv("STVM_BACKWARDS", "1")
            else:
                patch.delenv("STVM_BACKWARDS", raising=False)
            operands = [device.constant(array) for array in arrays]
            result = device.constant(np.full(output.shape, np.nan, output.dtype))
            module["kernel"](*operands, result)
            (array,) = device.copy_out([result], list)
            device.wait()
            found.append(array)
    np.testing.assert_array_equal(found[0], found[1])
    assert "STVM_BACKWARDS" not in os.environ
    return found[0]
