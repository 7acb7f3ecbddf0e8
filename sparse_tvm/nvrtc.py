"""CUDA C++ to code for devices, with NVIDIA's compiler from PyPI and without a device.

NVRTC needs neither a host compiler nor the toolkit. One source is compiled for every architecture
asked for; the results, with PTX for devices newer than all of them, become one fat binary, from
which the driver takes what fits.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sparse_tvm.errors import BuildError
from sparse_tvm.extras import install_command
from sparse_tvm.schedules.cuda.warpgroup import uses_warpgroups

_OPTIONS = (b"--std=c++17", b"--use_fast_math", b"--ptxas-options=-v")

_HEADERS = {
    "cuda/std/cstdint": """#pragma once
namespace cuda { namespace std {
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long;
using uint64_t = unsigned long;
} }
""",
    "cuda/std/type_traits": """#pragma once
namespace cuda { namespace std {
template <class T> struct is_integral;
template <class T> struct is_signed;
template <class T> struct is_unsigned;
template <class T> struct is_floating_point;
template <class T, class U> struct is_same { static constexpr bool value = false; };
template <class T> struct is_same<T, T> { static constexpr bool value = true; };
template <class T, class U> inline constexpr bool is_same_v = is_same<T, U>::value;
template <bool B, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { using type = T; };
template <bool B, class T, class F> struct conditional { using type = T; };
template <class T, class F> struct conditional<false, T, F> { using type = F; };
} }
""",
}
"""What TVM's code includes and hardly uses, in place of a hundred files of another package."""


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a source.

    Attributes
    ----------
    code : bytes
        A cubin, or PTX.
    log : str
        What the assembler says of each kernel: registers, shared memory, spills.
    """

    code: bytes
    log: str


def fat_binary(source: str, capabilities: Sequence[int]) -> bytes:
    """Compile a source for several architectures.

    Parameters
    ----------
    source : str
        CUDA C++.
    capabilities : Sequence[int]
        As 80 for ``sm_80``; PTX is added for the last.

    Raises
    ------
    BuildError
        When NVIDIA's compiler packages are not installed, or refuse the source.
    """
    _require()
    from cuda.bindings import nvfatbin

    own = uses_warpgroups(source)  # instructions that later devices do not have: no PTX for these
    names = [f"{each}a" if own else str(each) for each in capabilities]
    jobs = [f"sm_{name}" for name in names] + ([] if own else [f"compute_{names[-1]}"])
    # The compiler runs outside of Python's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(lambda job: compile_source(source, job).code, jobs))
    handle = nvfatbin.create([], 0)
    try:
        for name, cubin in zip(names, made, strict=False):
            nvfatbin.add_cubin(handle, cubin, len(cubin), name, "kernels")
        if not own:
            nvfatbin.add_ptx(handle, made[-1], len(made[-1]), names[-1], "kernels", "")
        result = bytearray(nvfatbin.size(handle))
        nvfatbin.get(handle, result)
    finally:
        nvfatbin.destroy(handle)
    return bytes(result)


def compile_source(source: str, architecture: str) -> Compiled:
    """Compile for ``sm_80`` to a cubin, or for ``compute_80`` to PTX.

    Raises
    ------
    BuildError
        As :func:`fat_binary`.
    """
    _require()
    from cuda.bindings import nvrtc

    options = [*_OPTIONS, f"--gpu-architecture={architecture}".encode()]
    options += [f"--include-path={_headers()}".encode()]
    names, texts = [name.encode() for name in _HEADERS], [t.encode() for t in _HEADERS.values()]
    program = _checked(
        nvrtc.nvrtcCreateProgram(source.encode(), b"kernels.cu", len(names), texts, names)
    )
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        text = log.rstrip(b"\0").decode(errors="replace")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            first = next((line for line in text.splitlines() if "error" in line), text[:200])
            raise BuildError(f"NVIDIA's compiler refuses the code for {architecture}: {first}")
        binary = architecture.startswith("sm_")
        size = nvrtc.nvrtcGetCUBINSize if binary else nvrtc.nvrtcGetPTXSize
        code = bytearray(_checked(size(program)))
        _checked((nvrtc.nvrtcGetCUBIN if binary else nvrtc.nvrtcGetPTX)(program, code))
        return Compiled(bytes(code), text)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _checked(result: tuple[Any, ...]) -> Any:
    from cuda.bindings import nvrtc

    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise BuildError(f"NVIDIA's compiler fails: {status.name}")
    return values[0] if values else None


def _require() -> None:
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None or _headers() is None:
        raise BuildError("NVIDIA's compiler is not installed", hint=install_command("cuda"))


def _headers() -> Path | None:
    """Where the headers of the CUDA runtime are, which code with 16-bit floats includes."""
    spec = find_spec("nvidia")
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        found = Path(place) / "cu13" / "include"
        if (found / "cuda_fp16.h").exists():
            return found
    return None
