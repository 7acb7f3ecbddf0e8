"""Read and write safetensors files with NumPy: mapped on reading, streamed on writing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sparse_tvm.errors import ModelError
from sparse_tvm.files import replacing

_DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": "<f8",
        "F32": "<f4",
        "F16": "<f2",
        "BF16": ml_dtypes.bfloat16,
        "I64": "<i8",
        "I32": "<i4",
        "I16": "<i2",
        "I8": "i1",
        "U8": "u1",
        "BOOL": "?",
    }.items()
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000
_ALIGNMENT = 64
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)


class TensorFile:
    """A safetensors file; its tensors are mapped, not read.

    Parameters
    ----------
    path : Path
        The file.

    Raises
    ------
    ModelError
        When it is no safetensors file, is truncated, or has a type that is not known here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= min(size - 8, _MAX_HEADER):
                    raise ValueError("its header is cut off")
                header = json.loads(file.read(length))
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            end = max((_end(name, entry) for name, entry in header.items()), default=0)
        except _UNREADABLE as error:
            raise ModelError(f"{path}: not a readable safetensors file: {error}") from error
        self._start = 8 + length
        self._entries = header
        if self._start + end > size:
            raise ModelError(f"{path}: truncated", hint="copy or download it again")

    def names(self) -> set[str]:
        """Return the names of all tensors."""
        return set(self._entries)

    def __getitem__(self, name: str) -> np.ndarray:
        """Map a tensor, read-only."""
        entry = self._entries[name]
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ModelError(f"{self.path}: tensor {name} has the unknown type {entry['dtype']}")
        shape = tuple(entry["shape"])
        if 0 in shape:
            return np.zeros(shape, dtype)
        offset = self._start + entry["data_offsets"][0]
        return np.memmap(self.path, dtype, "r", offset, shape or (1,)).reshape(shape)


def _end(name: str, entry: Mapping[str, Any]) -> int:
    """Return where a tensor ends; raise what `_UNREADABLE` lists if it cannot be as it says."""
    start, end = (int(offset) for offset in entry["data_offsets"])
    shape = [int(size) for size in entry["shape"]]
    dtype = _DTYPES.get(entry["dtype"])
    if min([start, *shape]) < 0 or (dtype and math.prod(shape) * dtype.itemsize != end - start):
        raise ValueError(f"tensor {name} has shape {shape} and bytes {start} to {end}")
    return end


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file; mapped arrays pass through without being in memory together.

    Raises
    ------
    OutputError
        When it cannot be written.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            np.ascontiguousarray(tensor).tofile(file)
