"""The artifact: one file that is a shared library, its weights and its manifest.

Layout::

    ELF shared library       code and the program; a loader ignores what follows
    padding                  to a multiple of 4096
    weights                  raw, little-endian, C order, each at a multiple of 64
    manifest                 UTF-8 JSON
    footer                   fixed size, ends with a magic

The weights are mapped from the file as they stand, so processes that load the same artifact
share their pages. Since footer and manifest come last, the manifest is read without touching
the code, and a truncated file is recognised by its missing footer.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sparse_tvm.errors import ArtifactError
from sparse_tvm.files import replacing

FORMAT_VERSION = 1
"""Raised whenever an older reader would misread the file."""

WEIGHT_ALIGNMENT = 64
"""TVM's kernels assume that every tensor starts at a multiple of this many bytes."""

_PAGE = 4096
_ELF_MAGIC = b"\x7fELF"
_MAGIC = b"SPARSTVM"
_FOOTER = struct.Struct("<QQII8s")  # manifest offset, length, crc32, format version, magic
_REBUILD = "compile the model again"


def write_artifact(
    output: str | os.PathLike[str],
    library: str | os.PathLike[str],
    weights: Mapping[str, np.ndarray],
    manifest: Mapping[str, Any],
) -> None:
    """Write library, weights and manifest as one file, completely or not at all.

    Weights with the same bytes are stored once.

    Parameters
    ----------
    output : path
        The artifact to write; replaced if it exists.
    library : path
        The ELF shared library.
    weights : Mapping[str, np.ndarray]
        The arrays passed to the compiled function, in this order.
    manifest : Mapping[str, Any]
        Everything else to store. ``format_version``, ``weights`` and ``totals.file_bytes`` are
        filled in here.

    Raises
    ------
    OutputError
        When `output` cannot be written.
    """
    with replacing(output) as temporary, temporary.open("wb") as file:
        with Path(library).open("rb") as code:
            shutil.copyfileobj(code, file)
        _pad(file, _PAGE)
        entries = _write_weights(file, weights)
        _pad(file, WEIGHT_ALIGNMENT)
        _write_manifest(file, {**manifest, "weights": entries})


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the manifest of the artifact at `path`, without loading its code.

    Raises
    ------
    ArtifactError
        When the file is missing, not an artifact, truncated, damaged, or of a newer format.
    """
    with open_artifact(path) as file:
        return manifest_of(file)


def rewrite_manifest(path: str | os.PathLike[str], manifest: Mapping[str, Any]) -> None:
    """Replace the manifest of the artifact at `path`, keeping code and weights.

    The list of stored weights is kept, whatever `manifest` says.

    Raises
    ------
    ArtifactError
        When `path` is not a sound artifact.
    OutputError
        When the new file cannot be written.
    """
    with open_artifact(path) as source:
        entries = manifest_of(source)["weights"]
        end_of_weights = _read_footer(source)[0]
        with replacing(path) as temporary, temporary.open("wb") as file:
            source.seek(0)
            _copy(source, file, end_of_weights)
            _write_manifest(file, {**manifest, "weights": entries})


def open_artifact(path: str | os.PathLike[str]) -> BinaryIO:
    """Open `path` for reading.

    Raises
    ------
    ArtifactError
        When there is no such file, or it cannot be read.
    """
    try:
        return Path(path).open("rb")
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file") from None
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error


def manifest_of(file: BinaryIO) -> dict[str, Any]:
    """Return the manifest of an open artifact; see :func:`read_manifest`."""
    offset, length, crc = _read_footer(file)
    file.seek(offset)
    text = file.read(length)
    if zlib.crc32(text) != crc:
        raise ArtifactError(f"{file.name}: the manifest is damaged", hint=_REBUILD)
    manifest: dict[str, Any] = json.loads(text)
    for entry in manifest["weights"]:
        if entry["offset"] % WEIGHT_ALIGNMENT or entry["offset"] + entry["nbytes"] > offset:
            raise ArtifactError(
                f"{file.name}: weight {entry['name']!r} lies outside the file", hint=_REBUILD
            )
    return manifest


def _read_footer(file: BinaryIO) -> tuple[int, int, int]:
    """Return the manifest's offset, length and CRC-32, checked against the file."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        raise ArtifactError(f"{file.name} is empty", hint=_REBUILD)
    file.seek(0)
    if file.read(len(_ELF_MAGIC)) != _ELF_MAGIC:
        raise ArtifactError(
            f"{file.name} is not a compiled model (not an ELF file)",
            hint="make one with `sparse-tvm compile MODEL.onnx -o model.so`",
        )
    file.seek(max(0, size - _FOOTER.size))
    footer = file.read()
    if not footer.endswith(_MAGIC):
        raise ArtifactError(
            f"{file.name} has no sparse-tvm footer: it is truncated, or a shared library that "
            "`sparse-tvm compile` did not make",
            hint=_REBUILD,
        )
    offset, length, crc, version, _ = _FOOTER.unpack(footer)
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"{file.name} has artifact format {version}; this sparse-tvm reads up to "
            f"{FORMAT_VERSION}",
            hint="upgrade sparse-tvm, or compile the model again with this one",
        )
    if offset + length + _FOOTER.size != size:
        raise ArtifactError(
            f"{file.name} is truncated or damaged: {size} bytes, its footer says "
            f"{offset + length + _FOOTER.size}",
            hint=_REBUILD,
        )
    return offset, length, crc


def _write_weights(file: BinaryIO, weights: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    entries = []
    stored: dict[tuple[int, int], list[tuple[np.ndarray, int]]] = {}
    for name, weight in weights.items():
        raw = _raw_bytes(weight)
        same_start = stored.setdefault((raw.size, hash(raw[:_PAGE].tobytes())), [])
        offset = next((at for other, at in same_start if np.array_equal(other, raw)), None)
        if offset is None:
            _pad(file, WEIGHT_ALIGNMENT)
            offset = file.tell()
            file.write(raw.data)
            same_start.append((raw, offset))
        entries.append(
            {
                "name": name,
                "dtype": weight.dtype.name,
                "shape": list(weight.shape),
                "offset": offset,
                "nbytes": raw.size,
            }
        )
    return entries


def _raw_bytes(array: np.ndarray) -> np.ndarray:
    """Return `array` as flat uint8, little-endian and C order; a view when possible."""
    little = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
    return little.reshape(-1).view(np.uint8)


def _write_manifest(file: BinaryIO, manifest: Mapping[str, Any]) -> None:
    offset = file.tell()
    text = _encode(manifest, offset)
    file.write(text)
    file.write(_FOOTER.pack(offset, len(text), zlib.crc32(text), FORMAT_VERSION, _MAGIC))


def _encode(manifest: Mapping[str, Any], offset: int) -> bytes:
    """Encode the manifest with the size of the file that it completes."""
    file_bytes = 0
    while True:
        totals = {**manifest.get("totals", {}), "file_bytes": file_bytes}
        complete = {**manifest, "format_version": FORMAT_VERSION, "totals": totals}
        text = json.dumps(complete, ensure_ascii=False).encode()
        size = offset + len(text) + _FOOTER.size
        if size == file_bytes:
            return text
        file_bytes = size


def _pad(file: BinaryIO, alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))


def _copy(source: BinaryIO, destination: BinaryIO, length: int) -> None:
    while length:
        chunk = source.read(min(length, 1 << 20))
        destination.write(chunk)
        length -= len(chunk)
