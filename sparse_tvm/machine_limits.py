"""What this machine can do, measured with small kernels from the same code generator.

Measured are the FMA peak, and the bandwidth of reading sequentially and of reading rows of 256
bytes in random order, which is what a sparse layer does with its input. The thread pool is
configured for it, so another process measures:
``python -m sparse_tvm.machine_limits TARGET THREADS`` prints a :class:`MachineLimits` as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np

from sparse_tvm.cpu import use_threads
from sparse_tvm.families import Work
from sparse_tvm.targets import Target, get_target

ROW_BYTES = 256
_NEAR, _FAR = 16 << 10, 192 << 10  # fit into the first and the second cache
_JOBS = 8  # of the kernels: threads share them
_READS = 64 << 20
"""Bytes that a call of a bandwidth kernel reads."""

_REPEAT, _MIN_REPEAT_MS = 150, 1  # short, so that some repeats meet no other process


@dataclass(frozen=True)
class MachineLimits:
    """What bounds kernels on so many threads.

    Attributes
    ----------
    flops : float
        FLOP/s of FMAs between registers.
    near : float
        Bytes/s of rows read at random from the first cache.
    far : float
        Bytes/s read sequentially from the second cache.
    """

    flops: float
    near: float
    far: float

    def seconds(self, work: Work) -> float:
        """The least time for some work: the roofline."""
        flops = self.flops * work.rate
        return max(work.flops / flops, work.near_bytes / self.near, work.bytes / self.far)


def measured_limits(target: str, threads: int) -> MachineLimits | None:
    """Measure in a process of its own; None where that fails, as without the compiler."""
    command = [sys.executable, "-m", "sparse_tvm.machine_limits", target, str(threads)]
    environment = {**os.environ, "TVM_BIND_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if ended.returncode:
        return None
    return MachineLimits(**json.loads(ended.stdout.splitlines()[-1]))


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel and its arguments."""

    module: Any
    arguments: Sequence[Any]

    def seconds(self, threads: int = 1, rounds: int = 1) -> float:
        """Least time of a call: what the kernel can do when the machine lets it."""
        import tvm

        use_threads(threads)
        timer = self.module.time_evaluator(
            "kernel", tvm.cpu(), number=1, repeat=_REPEAT, min_repeat_ms=_MIN_REPEAT_MS
        )
        return float(min(min(timer(*self.arguments).results) for _ in range(rounds)))


def build(function: Any, arguments: Sequence[np.ndarray], target: Target) -> Kernel:
    """Compile a PrimFunc, and copy its arguments to where TVM wants them."""
    import tvm

    from sparse_tvm.schedules.cpu.intrinsics import FAST_MATH

    context = tvm.transform.PassContext(opt_level=3, config=FAST_MATH)
    with tvm.target.Target(target.tvm_target()) as tvm_target, context:
        executable = tvm.compile(function.with_attr("global_symbol", "kernel"), tvm_target)
    return Kernel(executable.jit(), [tvm.runtime.tensor(array) for array in arguments])


class Machine:
    """What this machine can do; every figure is measured once."""

    def __init__(self, target: Target) -> None:
        from sparse_tvm.schedules.cpu.simd import Simd

        self.target, self.simd = target, Simd.of(target)
        self.flops = cache(self._flops)
        self.bandwidth = cache(self._bandwidth)

    def _flops(self, threads: int) -> float:
        """FLOP/s of independent FMAs between registers."""
        from tvm.script.ir_builder import tirx as T

        from sparse_tvm.schedules.cpu.lane_tiles import Registers, argument, prim_func, ramp

        simd, steps = self.simd, 20000
        with prim_func() as result:
            factors = argument("factors", (2, simd.lanes))
            y = argument("y", (_JOBS, simd.lanes))
            with T.parallel(0, _JOBS) as job:
                acc = Registers(simd.accumulators, 1, simd)
                factor, term = (factors[i, ramp(0, simd)] for i in range(2))
                acc.fill(lambda row, _: term * T.broadcast(T.float32(row), simd.lanes))
                with T.serial(0, steps):
                    for row in range(acc.rows):
                        acc.set(row, 0, acc.get(row, 0) * factor + term)
                T.buffer_store(y, _sum(acc), [job, ramp(0, simd)])
        arrays = [
            np.full((2, simd.lanes), 0.5, np.float32),
            np.zeros((_JOBS, simd.lanes), np.float32),
        ]
        seconds = build(result["func"], arrays, self.target).seconds(threads, rounds=3)
        return 2 * _JOBS * steps * simd.accumulators * simd.lanes / seconds

    def _bandwidth(self, size: int, pattern: str, threads: int) -> float:
        """Bytes/s of reading rows of an array of ``size`` bytes, again and again.

        Each job reads all of it, as each job of a layer does with its input, but no more than
        its share of ``_READS``.
        """
        from tvm.script.ir_builder import tirx as T

        from sparse_tvm.schedules.cpu.lane_tiles import (
            Registers,
            argument,
            prim_func,
            ramp,
            scalar,
        )

        simd, rows = self.simd, size // ROW_BYTES
        vectors = ROW_BYTES // (4 * simd.lanes)
        share = _READS // _JOBS // ROW_BYTES
        count, steps = min(rows, share), max(1, share // rows)
        rng = np.random.default_rng(0)
        with prim_func() as result:
            x = argument("x", (rows, ROW_BYTES // 4))
            order = argument("order", (rows,), "int32")
            y = argument("y", (_JOBS, simd.lanes))
            with T.parallel(0, _JOBS) as job:
                acc = Registers(2, vectors, simd)
                acc.fill(lambda row, vector: T.broadcast(T.float32(0), simd.lanes))
                with T.serial(0, steps), T.serial(0, count // 2) as i:
                    for half in range(2):
                        at = job * count % rows + i * 2 + half
                        row = scalar(order[at]) if pattern == "random" else at
                        for v in range(vectors):
                            operand = x[row, ramp(v * simd.lanes, simd)]
                            acc.set(half, v, acc.get(half, v) + operand)
                T.buffer_store(y, _sum(acc), [job, ramp(0, simd)])
        arrays = [
            rng.standard_normal((rows, ROW_BYTES // 4), np.float32),
            rng.permutation(rows).astype(np.int32),
            np.zeros((_JOBS, simd.lanes), np.float32),
        ]
        seconds = build(result["func"], arrays, self.target).seconds(threads, rounds=3)
        return _JOBS * steps * (count // 2 * 2) * ROW_BYTES / seconds


def _sum(acc: Any) -> Any:
    total = acc.get(0, 0)
    for i in range(1, acc.rows * acc.vectors):
        total = total + acc.get(*divmod(i, acc.vectors))
    return total


def main(arguments: Sequence[str]) -> None:
    """Print the limits of this machine as JSON."""
    target, threads = arguments
    machine = Machine(get_target(target))
    limits = MachineLimits(
        machine.flops(int(threads)),
        machine.bandwidth(_NEAR, "random", int(threads)),
        machine.bandwidth(_FAR, "sequential", int(threads)),
    )
    print(json.dumps(asdict(limits)))


if __name__ == "__main__":
    main(sys.argv[1:])
