"""CUDA graphs: what a program launches kernel by kernel, the device gets as one.

A launch costs the host 2 to 5 us, which is as long as a small model's kernel runs. TVM finds the
kernels whose operands lie at fixed addresses, which are weights and memory that is kept from run to
run, and has them captured at the first run. Left to be launched by themselves are those that read
an input or write an output, as these may lie anywhere.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax
from tvm.relax.utils import copy_with_new_vars

from sparse_tvm.vm import ONE_BY_ONE

_CONFIGURATION = {"relax.backend.use_cuda_graph": True}


def _with_graphs(module: tvm.IRModule, _context: Any) -> tvm.IRModule:
    """Rewrite ``main``, planned memory and all, and keep it as it was under another name.

    That one is for timing kernels, and for devices that refuse. A program with nothing to capture,
    such as one of unknown sizes, stays as it is.
    """
    with tvm.transform.PassContext(config=_CONFIGURATION):
        captured = relax.transform.RewriteCUDAGraph()(module)
    if len(captured.functions) == len(module.functions):
        return module
    plain = copy_with_new_vars(module["main"]).with_attr("global_symbol", ONE_BY_ONE)
    captured[ONE_BY_ONE] = plain
    return captured


capture_graphs = tvm.transform.module_pass(_with_graphs, opt_level=0, name="CaptureGraphs")
"""The pass; it takes the place of TVM's ``RewriteCUDAGraph``."""
