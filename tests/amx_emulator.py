"""AMX on a CPU without it: its instructions run in a handler of SIGILL (``amx_emulator.c``).

The code is what a CPU with AMX gets, byte for byte; what surrounds the tiles runs on this one.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from sparse_tvm.cpu import host_features
from sparse_tvm.schedules.x86.units import AMX_FEATURES
from sparse_tvm.targets import TARGETS, Target

_SOURCE = Path(__file__).with_suffix(".c")
_COUNTED = ("configures", "loads", "stores", "zeros", "products")
_TARGET = TARGETS["sapphirerapids"]
_NOT_USED = {"avx512fp16", "avxvnni"}
"""What the target has besides AMX, and kernels in int8 and bf16 make nothing of."""


@cache
def emulated_target() -> Target | None:
    """The target with AMX, where this CPU has all of it that kernels use but for AMX itself."""
    amx = {feature for feature in AMX_FEATURES if feature.startswith("amx")}
    here = host_features()
    if amx & here or not set(_TARGET.features) - amx - _NOT_USED <= here:
        return None
    return _TARGET


def cpuinfo() -> str:
    """What /proc/cpuinfo says, with the features that are emulated or not used."""
    flags = "amx_tile amx_int8 amx_bf16 avx512_fp16 avx_vnni"
    return Path("/proc/cpuinfo").read_text().replace(" sse2 ", f" sse2 {flags} ")


@cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "amx_emulator.so"
        compiler = next(filter(shutil.which, ("gcc", "clang", "cc")))
        options = ["-O3", "-march=native", "-fno-strict-aliasing", "-fPIC", "-shared"]
        subprocess.run([compiler, *options, "-o", library, _SOURCE], check=True)
        return ctypes.CDLL(str(library))


@cache
def emulate() -> None:
    """Run AMX's instructions from now on, in all threads of this process."""
    if _library().amx_install():
        raise OSError("no handler of SIGILL could be installed")


def counts() -> dict[str, int]:
    """How many instructions of each kind were run so far."""
    numbers = (ctypes.c_uint64 * len(_COUNTED))()
    _library().amx_counts(numbers)
    return dict(zip(_COUNTED, numbers, strict=True))
