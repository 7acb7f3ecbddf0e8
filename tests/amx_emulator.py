"""AMX on a CPU without it: its instructions run in a handler of SIGILL (``amx_emulator.c``).

The code is what a CPU with AMX gets, byte for byte; what surrounds the tiles runs on this one.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

from sparse_tvm.cpu import host_features
from sparse_tvm.schedules.x86.units import AMX_FEATURES
from sparse_tvm.targets import TARGETS, Target

_SOURCE = Path(__file__).with_suffix(".c")
_COUNTED = ("configures", "loads", "stores", "zeros", "products")
_AMX = tuple(feature for feature in AMX_FEATURES if feature.startswith("amx"))


def emulated_target() -> Target | None:
    """A target with this machine's AVX-512 and AMX; none where that is missing, or AMX is there."""
    level = TARGETS["avx512-bf16"]
    beside = set(level.features) | {one for one in AMX_FEATURES if one not in _AMX}
    here = host_features()
    if "amx-tile" in here or not beside <= here:
        return None
    extra = sorted(set(AMX_FEATURES) - set(level.features))
    return replace(
        level,
        name="emulated-amx",
        aliases=(),
        features=(*level.features, *extra),
        attributes=(*level.attributes, *(f"+{feature}" for feature in extra)),
    )


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
