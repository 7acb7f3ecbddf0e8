"""Single kernels of ours, built and timed outside of any model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparse_tvm.vm import runtime

os.environ["TVM_BIND_THREADS"] = "1"  # the scheduler may leave two threads on one core for long
runtime()  # sets the other defaults of the thread pool, before TVM loads

import tvm  # noqa: E402

from sparse_tvm.cpu import usable_cores  # noqa: E402
from sparse_tvm.passes.convert_weights import split_arrays  # noqa: E402
from sparse_tvm.schedules.common.intrinsics import FAST_MATH  # noqa: E402
from sparse_tvm.schedules.common.lane_tiles import LANES, Simd, Tiles  # noqa: E402
from sparse_tvm.schedules.common.matmul import WeightLayout, matmul  # noqa: E402
from sparse_tvm.sparsity.pruning import prune_array  # noqa: E402
from sparse_tvm.targets import Target  # noqa: E402

_REPEAT, _MIN_REPEAT_MS = 150, 1  # short, so that some repeats meet no other process
_ONE_CORE_PER_THREAD = -2


def simd_of(target: Target) -> Simd:
    return Simd(target.lanes, target.registers)


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel and its arguments."""

    module: Any
    arguments: Sequence[Any]

    def seconds(self, threads: int = 1, rounds: int = 1) -> float:
        """Least time of a call: what the kernel can do when the machine lets it."""
        use_threads(threads)
        timer = self.module.time_evaluator(
            "kernel", tvm.cpu(), number=1, repeat=_REPEAT, min_repeat_ms=_MIN_REPEAT_MS
        )
        return float(min(min(timer(*self.arguments).results) for _ in range(rounds)))


def build(function: Any, arguments: Sequence[np.ndarray], target: Target) -> Kernel:
    """Compile a PrimFunc, and copy its arguments to where TVM wants them."""
    context = tvm.transform.PassContext(opt_level=3, config=FAST_MATH)
    with tvm.target.Target(target.tvm_target()) as tvm_target, context:
        executable = tvm.compile(function.with_attr("global_symbol", "kernel"), tvm_target)
    return Kernel(executable.jit(), [tvm.runtime.tensor(array) for array in arguments])


def use_threads(threads: int) -> None:
    """Let parallel regions use this many threads; the pool itself has one per core."""
    cores = [str(core) for core in range(max(threads, usable_cores()))]
    configure = tvm.get_global_func("runtime.config_threadpool")
    configure(_ONE_CORE_PER_THREAD, len(cores), cores)
    configure(_ONE_CORE_PER_THREAD, threads, cores[:threads])


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
