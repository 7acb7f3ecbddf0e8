"""A GPU that is played on a CPU: whole artifacts for CUDA run, the kernels' source as C++.

TVM's device API for CPUs stands in for CUDA's, ``emulated_cudart.py`` for the CUDA runtime and for
TVM's graphs, and where the driver would load a fat binary, the source is compiled with ``gpu.h``
and called instead. Everything else is what users get: program, host code, launch parameters, memory
plan, weights.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from emulated_cudart import EmulatedCudart, EmulatedGraphs

from sparse_tvm import cuda_device
from sparse_tvm.backends import cuda_codegen
from sparse_tvm.vm import runtime

_HEADER = Path(__file__).with_name("gpu.h")
_DYNAMIC = re.compile(r"extern __shared__ __align__\(\d+\) (\w+) (\w+)\[\];")
_KERNEL = r'extern "C" __global__ void (?:__launch_bounds__\([\d, ]+\) )?{}\(([^)]*)\) \{{'
_DIMENSIONS = {
    f"{name}.{axis}": f"{field}.{axis}"
    for name, field in (("blockIdx", "grid"), ("threadIdx", "block"))
    for axis in "xyz"
}

_EARLY = "tirx.use_programtic_dependent_launch"  # says how, and comes with no size

_built = Path(tempfile.gettempdir()) / "sparse-tvm-emulated-gpu"


@dataclass(frozen=True)
class Entry:
    """A kernel as the table of functions has it."""

    name: str
    tags: tuple[str, ...]


@contextmanager
def emulated_gpu(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compile for, and run on, the emulated GPU."""
    ffi = runtime()
    ffi.register_global_func("device_api.cuda", ffi.get_global_func("device_api.cpu"), True)
    ffi.register_global_func("ffi.Module.load_from_bytes.cuda", _load, True)
    ffi.register_global_func("runtime.cuTensorMapEncodeTiled", _encode_tensor_map, True)
    patch.setattr(cuda_codegen, "fat_binary", lambda source, _capabilities: source.encode())
    patch.setattr(cuda_device, "capability_of", lambda _index: 90)
    patch.setattr(cuda_device, "name_of", lambda _index: "emulated GPU")
    cudart = EmulatedCudart()
    patch.setattr(cuda_device, "cuda_runtime", lambda: cudart)
    graphs = EmulatedGraphs()
    ffi.register_global_func("tests.emulated_graphs", lambda: graphs, True)
    for name in ("run_or_capture", "get_cached_alloc"):
        ffi.register_global_func(f"vm.builtin.cuda_graph.{name}", getattr(graphs, name), True)
    yield


def _load(serialised: Any) -> Any:
    """What the driver would make of a module: here a library of emulated kernels."""
    reader = _Reader(bytes(serialised))
    assert reader.text() == "fatbin"
    table = reader.table()
    return runtime().load_module(str(build(reader.text(), table)))


def table_of(blob: bytes) -> list[Entry]:
    """The kernels of the module for CUDA among serialised ones."""
    kind = struct.pack("<Q", 4) + b"cuda"
    reader = _Reader(blob[blob.index(kind) + len(kind) + 8 :])
    assert reader.text() == "cuda"
    return reader.table()


def build(source: str, table: list[Entry]) -> Path:
    """Compile CUDA C++ for this CPU and return the library."""
    text = as_cpp(source, table)
    key = hashlib.sha256((text + _HEADER.read_text()).encode()).hexdigest()[:16]
    library = _built / f"{key}.so"
    if not library.exists():
        _built.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as directory:
            code = Path(directory) / "kernels.cpp"
            code.write_text(text)
            made = Path(directory) / "kernels.so"
            options = ["-std=gnu++20", "-O1", "-w", "-shared", "-fPIC", f"-I{_HEADER.parent}"]
            command = ["g++", *options, str(code), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[:4000]
            # Other processes may be waiting for it: it appears whole.
            placed = library.with_suffix(f".{os.getpid()}")
            placed.write_bytes(made.read_bytes())
            placed.replace(library)
    return library


def as_cpp(source: str, table: list[Entry]) -> str:
    """The source with a function that TVM's host code can call for each kernel."""
    prelude = cuda_codegen.prelude_of(source)
    kernels = source.removeprefix(prelude)
    kernels = kernels[kernels.index('extern "C" __global__') :]
    kernels = _DYNAMIC.sub(r"\1* \2 = gpu::dynamic_shared<\1>();", kernels)
    callers = [_caller(kernels, entry) for entry in table]
    return "\n".join(['#include "gpu.h"', prelude, kernels, _ABI, *callers])


_ABI = """
struct Argument { int32_t type; uint32_t length; union { int64_t i; double f; void* p; }; };
"""


def _caller(kernels: str, entry: Entry) -> str:
    found = re.search(_KERNEL.format(re.escape(entry.name)), kernels)
    assert found is not None, entry.name
    types = [parameter.strip().rsplit(" ", 1)[0] for parameter in found[1].split(",")]
    values = ", ".join(_value(kind, i) for i, kind in enumerate(types))
    sizes = [tag for tag in entry.tags if tag != _EARLY]
    launch = [
        f"{_DIMENSIONS[tag]} = a[{i}].i;" if tag in _DIMENSIONS else f"bytes = a[{i}].i;"
        for i, tag in enumerate(sizes, len(types))
    ]
    return f"""
extern "C" int __tvm_ffi_{entry.name}(void*, const Argument* a, int32_t n, Argument* result) {{
  if (n != {len(types) + len(sizes)}) abort();
  dim grid{{1, 1, 1}}, block{{1, 1, 1}};
  size_t bytes = 0;
  {" ".join(launch)}
  gpu::launch([](void* p) {{ const Argument* a = (const Argument*)p; {entry.name}({values}); }},
              (void*)a, grid, block, bytes);
  result->type = 0;
  return 0;
}}"""


def _value(kind: str, i: int) -> str:
    """An argument as a parameter of this type."""
    if kind.endswith("CUtensorMap"):
        return f"*(const CUtensorMap*)a[{i}].p"
    return f"({kind.replace('__restrict__', '')})a[{i}].{'p' if '*' in kind else 'i'}"


def _encode_tensor_map(*arguments: Any) -> None:
    """What the driver does for copies of boxes: here the map is ``gpu.h``'s ``CUtensorMap``."""
    tensor_map, _, rank, data, *rest = arguments
    sizes, strides, box = rest[:rank], rest[rank : 2 * rank - 1], rest[2 * rank - 1 : 3 * rank - 1]
    packed = struct.pack("<Q5q", _address(data), *sizes, *strides, *box)
    ctypes.memmove(_address(tensor_map), packed, len(packed))


def _address(handle: Any) -> int:
    return int(handle.value if hasattr(handle, "value") else handle)


class _Reader:
    """TVM's serialisation of a module for CUDA."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def number(self) -> int:
        (value,) = struct.unpack_from("<Q", self._data, self._at)
        self._at += 8
        return int(value)

    def _skip(self, count: int) -> None:
        self._at += count

    def text(self) -> str:
        size = self.number()
        value = self._data[self._at : self._at + size]
        self._at += size
        return value.decode()

    def table(self) -> list[Entry]:
        return [self._entry() for _ in range(self.number())]

    def _entry(self) -> Entry:
        self.text()
        name = self.text()
        self._skip(4 * self.number())
        tags = tuple(self.text() for _ in range(self.number()))
        self._skip(4 * self.number())
        return Entry(name, tags)
