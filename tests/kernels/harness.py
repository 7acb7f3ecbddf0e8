"""What the tests of kernels share: targets, tiles with poisoned padding, guarded outputs."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import tvm
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from tvm import tirx

from sparse_tvm.cpu import allow_amx
from sparse_tvm.schedules.cpu.intrinsics import FAST_MATH
from sparse_tvm.schedules.cpu.lane_tiles import Tiles, symbol
from sparse_tvm.schedules.cpu.simd import LANES, Simd
from sparse_tvm.sparsity.quantise import bf16_values, round_to_bf16
from sparse_tvm.targets import TARGETS, Target, runs_here
from sparse_tvm.vm import _set_pool

RUNNABLE = [target for target in TARGETS.values() if runs_here(target)]
allow_amx()
KERNELS = settings(
    deadline=None,
    max_examples=25,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow],
)
"""Every example compiles a kernel, so a failing one is not made smaller, which took minutes."""

PER_FORM = settings(KERNELS, max_examples=8)
PORTABLE = replace(RUNNABLE[-1], name="128-bit")
"""The code that Arm CPUs get, in this machine's simplest instructions."""

ROUNDED = {
    "float32": lambda w: w,
    "float16": lambda w: w.astype("float16").astype("float32"),
    "bfloat16": lambda w: bf16_values(round_to_bf16(w)),
}
"""What weights become that are stored in a type."""

targets = st.sampled_from(RUNNABLE)
thread_counts = st.sampled_from([1, 2])
_GUARD = 64
_SENTINEL = np.float32(12345.0)


def simd(target: Target) -> Simd:
    portable = Simd(4, 32, by_element=True, zero_point=0)
    return portable if target is PORTABLE else Simd.of(target)


FORMS = [*{simd(target): target for target in RUNNABLE}.values(), PORTABLE]
"""A target for every form that float32 kernels have: the simplest one with such registers."""

every_form = pytest.mark.parametrize("target", FORMS, ids=[target.name for target in FORMS])


def tiles_for(lead: int, rows: int, symbolic: bool) -> Tiles:
    """Extents for a kernel: numbers or symbols."""
    if symbolic:
        return Tiles(symbol("lead"), symbol("tiles"))
    return Tiles(lead, -(-rows // LANES))


def to_tiles(x: np.ndarray) -> np.ndarray:
    """``[lead, rows, features]`` as lane tiles; padding is NaN, for nobody may read it."""
    lead, rows, features = x.shape
    tiles = -(-rows // LANES)
    padded = np.full((lead, tiles * LANES, features), np.nan, np.float32)
    padded[:, :rows] = x
    return np.ascontiguousarray(padded.reshape(lead, tiles, LANES, features).swapaxes(2, 3))


def from_tiles(tiled: np.ndarray, rows: int) -> np.ndarray:
    """``[lead, rows, features]`` out of lane tiles."""
    lead, _, features, _ = tiled.shape
    return tiled.swapaxes(2, 3).reshape(lead, -1, features)[:, :rows]


def compiled(kernel: tirx.PrimFunc, target: Target) -> tvm.runtime.Module:
    """Compile a kernel, called ``kernel``, as artifacts' kernels are."""
    with tvm.transform.PassContext(opt_level=3, config=FAST_MATH):
        return tvm.compile(kernel.with_attr("global_symbol", "kernel"), target=target.tvm_target())


def run(
    kernel: tirx.PrimFunc,
    target: Target,
    threads: int,
    arguments: Sequence[np.ndarray | int],
    out_shape: Sequence[int],
    dtype: str = "float32",
) -> np.ndarray:
    """Compile a kernel, run it on so many threads, and check that it wrote its output only.

    Outputs are of 32 bits; memory starts out as NaN.
    """
    library = compiled(kernel, target)
    memory, out = _guarded(out_shape)
    values = [tvm.runtime.tensor(a) if isinstance(a, np.ndarray) else a for a in arguments]
    _pool(threads).submit(
        library["kernel"], *values, tvm.runtime.from_dlpack(out.view(dtype))
    ).result()
    assert np.all(memory[:_GUARD] == _SENTINEL), "written in front of the output"
    assert np.all(memory[_GUARD + out.size :] == _SENTINEL), "written behind the output"
    return out.view(dtype)


def _guarded(shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Aligned memory with a sentinel around an output of NaN."""
    size = int(np.prod(shape))
    raw = np.empty(size + 2 * _GUARD + 16, np.float32)
    offset = -(raw.ctypes.data // 4) % 16
    memory = raw[offset : offset + size + 2 * _GUARD]
    memory[:] = _SENTINEL
    out = memory[_GUARD : _GUARD + size]
    out[:] = np.nan
    return memory, out.reshape(shape)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """One thread whose kernels run on `threads` threads."""
    return ThreadPoolExecutor(1, initializer=_set_pool, initargs=(threads,))
