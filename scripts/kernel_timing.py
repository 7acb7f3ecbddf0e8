"""Single kernels of ours, built and timed outside of any model."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from sparse_tvm.vm import runtime

os.environ["TVM_BIND_THREADS"] = "1"  # the scheduler may leave two threads on one core for long
runtime()  # sets the other defaults of the thread pool, before TVM loads

from sparse_tvm.machine import Kernel, build  # noqa: E402
from sparse_tvm.passes.convert_weights import split_arrays  # noqa: E402
from sparse_tvm.schedules.cpu.lane_tiles import Tiles  # noqa: E402
from sparse_tvm.schedules.cpu.matmul import WeightLayout, matmul  # noqa: E402
from sparse_tvm.schedules.cpu.simd import LANES, Simd  # noqa: E402
from sparse_tvm.sparsity.pruning import prune_array  # noqa: E402
from sparse_tvm.targets import Target  # noqa: E402


def simd_of(target: Target) -> Simd:
    return Simd.of(target)


def random_weight(shape: tuple[int, int], sparsity: float, structure: str) -> np.ndarray:
    """A weight ``[N, K]`` pruned by magnitude."""
    w = np.random.default_rng(0).standard_normal(shape, np.float32)
    return prune_array(w, sparsity, structure) if sparsity else w


def matmul_kernel(
    w: np.ndarray, layout: WeightLayout, tokens: int, target: Target, epilogue: Sequence[str] = ()
) -> Kernel:
    """A layer's kernel on ``tokens`` tokens."""
    n, k = w.shape
    rng = np.random.default_rng(1)
    tiles = tokens // LANES
    function = matmul(Tiles(1, tiles), n, k, layout, epilogue, simd_of(target))
    extras = [
        rng.standard_normal((n,) if step == "bias" else (1, tiles, n, LANES), np.float32)
        for step in epilogue
        if step in ("bias", "residual")
    ]
    x = rng.standard_normal((1, tiles, k, LANES), np.float32)
    y = np.zeros((1, tiles, n, LANES), np.float32)
    return build(function, [x, *split_arrays(w, layout).values(), *extras, y], target)
