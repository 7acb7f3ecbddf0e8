"""From scheduled kernels to a library with device code for every architecture of a target.

TVM generates LLVM code for the host and CUDA C++ for the device. It would put the C++ into the
library and compile that when it is loaded, by Python. Here NVIDIA's compiler makes a fat binary of
it, which takes the place of the C++ among the modules that the library carries.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm
from tvm import relax
from tvm.relax.backend.cuda.pipeline import finalize_passes
from tvm.runtime import _ffi_api

from sparse_tvm.errors import BuildError
from sparse_tvm.linker import Linker
from sparse_tvm.nvrtc import fat_binary
from sparse_tvm.passes.cuda.capture_graphs import capture_graphs
from sparse_tvm.passes.program import Program
from sparse_tvm.schedules.cuda import instructions, warpgroup
from sparse_tvm.targets.cuda import CudaTarget

_BLOB = "__tvm_ffi__library_bin"
"""The symbol by which TVM finds the modules in a library."""

_SOURCE, _BINARY = b"cuda", b"fatbin"
"""Formats of device code, as TVM marks it."""


@dataclass(frozen=True)
class Code:
    """What is generated for one program.

    Attributes
    ----------
    executable : tvm.relax.VMExecutable
        Host code and program, with the device's source.
    source : str
        CUDA C++, empty where a program has no kernels.
    binary : bytes
        The fat binary.
    """

    executable: Any
    source: str
    binary: bytes


def generate(program: Program, target: CudaTarget) -> Code:
    """Generate code for ``main(inputs..., weights)``, weights being one tuple.

    Raises
    ------
    BuildError
        When code generation fails, or NVIDIA's compiler refuses the code or is not there.
    """
    executable = _executable(program, target)
    source = device_source(executable.mod)
    capabilities = [gpu.capability for gpu in target.gpus]
    return Code(executable, source, fat_binary(source, capabilities) if source else b"")


def write_library(code: Code, target: CudaTarget, path: Path) -> None:
    """Link the library.

    Raises
    ------
    BuildError
        When no linker works.
    """

    def pack(module: Any, is_system: bool, prefix: str, directory: str) -> str:
        blob = with_binary(_ffi_api.ModulePackImportsToTensor(module).numpy().tobytes(), code)
        return _object_source(blob, Path(directory))

    code.executable.export_library(str(path), fcompile=Linker(target.triple), fpack_imports=pack)


def compile_kernel(function: Any, target: CudaTarget) -> Any:
    """TVM's module of one kernel: host code, importing what has the device's source."""
    module = tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")})
    with source_only():
        return tvm.compile(module, target=tvm.target.Target(target.tvm_target())).mod


def device_source(module: Any) -> str:
    """The CUDA C++ of a module, with the instructions that our kernels call before it."""
    if module.kind == "cuda":
        source = str(module.inspect_source())
        return prelude_of(source) + source
    return next(filter(None, map(device_source, module.imports)), "")


def prelude_of(source: str) -> str:
    """The instructions that stand before the code of a module."""
    parts = [instructions.PRELUDE]
    if warpgroup.uses_warpgroups(source):
        parts.append(warpgroup.PRELUDE)
    return "".join(parts)


def with_binary(blob: bytes, code: Code) -> bytes:
    """The serialised modules with the fat binary in place of the source.

    A blob is its length, then modules of which the one for CUDA is its kind, its length, and in
    that the format, the table of functions and the code, each text after its own length.
    """
    kind, source = _text(b"cuda"), code.source.removeprefix(prelude_of(code.source)).encode()
    tail = _text(source)
    start = blob.find(kind + b"", 8)
    while start >= 0:
        at = start + len(kind)
        (length,) = struct.unpack_from("<Q", blob, at)
        end = at + 8 + length
        content = blob[at + 8 : end]
        if content.startswith(_text(_SOURCE)) and content.endswith(tail):
            table = content[len(_text(_SOURCE)) : -len(tail)]
            changed = _text(_text(_BINARY) + table + _text(code.binary))
            body = blob[8:at] + changed + blob[end:]
            return struct.pack("<Q", len(body)) + body
        start = blob.find(kind, start + 1)
    return blob


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _object_source(blob: bytes, directory: Path) -> str:
    """Assembler source of the blob, for whatever linker there is."""
    data, source = directory / "modules.bin", directory / "modules.s"
    data.write_bytes(blob)
    source.write_text(
        f'.section .rodata\n.globl {_BLOB}\n.balign 16\n{_BLOB}:\n.incbin "{data}"\n'
        '.section .note.GNU-stack,"",%progbits\n'
    )
    return str(source)


def _executable(program: Program, target: CudaTarget) -> Any:
    with tvm.target.Target(target.tvm_target()) as tvm_target, source_only():
        finish = tvm.transform.Sequential(
            [
                relax.transform.BundleModelParams(),
                relax.transform.ToNonDataflow(),
                relax.transform.RemovePurityChecking(),
                relax.transform.CallTIRRewrite(),
                *_finalize_passes(tvm_target),
            ]
        )
        try:
            with tvm.transform.PassContext(opt_level=3):
                return tvm.compile(program.module, target=tvm_target, relax_pipeline=finish)
        except Exception as error:
            text = str(error).strip().splitlines()
            reason = text[-1] if text else repr(error)
            raise BuildError(f"code generation failed: {reason}") from error


def _finalize_passes(target: Any) -> list[Any]:
    """TVM's, with graphs by our pass, which keeps the program without them, too."""
    return [
        capture_graphs if each.info.name == "RewriteCUDAGraph" else each
        for each in finalize_passes(target)
    ]


@contextmanager
def source_only() -> Iterator[None]:
    """Keep TVM from compiling device code itself, as it does where there is a driver."""
    variable = "TVM_COMPILE_FORCE_FALLBACK"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        yield
    finally:
        del os.environ[variable]
        if before is not None:
            os.environ[variable] = before
