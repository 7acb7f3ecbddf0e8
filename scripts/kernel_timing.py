"""Single kernels of ours, built and timed outside of any model."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from sparse_tvm.vm import runtime

os.environ["TVM_BIND_THREADS"] = "1"  # the scheduler may leave two threads on one core for long
runtime()  # sets the other defaults of the thread pool, before TVM loads

from sparse_tvm.families import Extents  # noqa: E402
from sparse_tvm.machine_limits import Kernel, build  # noqa: E402
from sparse_tvm.operators import Bias, Dense, Layout, Step  # noqa: E402
from sparse_tvm.schedules.cpu.families.matmul import MatmulFamily  # noqa: E402
from sparse_tvm.schedules.cpu.simd import LANES, Simd  # noqa: E402
from sparse_tvm.sparsity.masks import prune_array  # noqa: E402
from sparse_tvm.targets import Target  # noqa: E402


def simd_of(target: Target) -> Simd:
    return Simd.of(target)


def random_weight(shape: tuple[int, int], sparsity: float, structure: str) -> np.ndarray:
    """A weight ``[N, K]`` pruned by magnitude."""
    w = np.random.default_rng(0).standard_normal(shape, np.float32)
    return prune_array(w, sparsity, structure) if sparsity else w


def matmul_kernel(
    w: np.ndarray, layout: Layout, tokens: int, target: Target, epilogue: Sequence[Step] = ()
) -> Kernel:
    """A layer's kernel on ``tokens`` tokens."""
    n, k = w.shape
    rng = np.random.default_rng(1)
    tiles, family = tokens // LANES, MatmulFamily()
    op = Dense(layer="layer", matrix=(n, k), epilogue=tuple(epilogue), layout=layout)
    extras = [
        rng.standard_normal((n,) if isinstance(step, Bias) else (1, tiles, n, LANES), np.float32)
        for step in epilogue
        if step.operand
    ]
    x = rng.standard_normal((1, tiles, k, LANES), np.float32)
    y = np.zeros((1, tiles, n, LANES), np.float32)
    operands = [x, *family.pack(op, w, layout, target).values(), *extras]
    *extents, output = [Extents(a.shape, str(a.dtype)) for a in (*operands, y)]
    extents.append(Extents((tokens,), "int64", numbers=True))
    return build(family.build(op, extents, output, target).function, [*operands, y], target)
