"""The artifact: one file that is a shared library, its weights and its manifest.

Layout::

    ELF shared library       code and the program; a loader ignores what follows
    padding                  to a multiple of 4096
    weights                  raw, little-endian, C order, each at a multiple of 64
    manifest                 JSON
    footer                   fixed size, ends with a magic

The weights are mapped from the file as they stand, so processes that load the same artifact
share their pages. Since footer and manifest come last, the manifest is read without touching
the code, and a truncated file is recognised by its missing footer.

Code and weights have a CRC-32 each in the manifest, and the manifest has one in the footer: they
find damage, not malice. Whoever can write the file can run code.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from sparse_tvm.checksum import crc32
from sparse_tvm.cpu import usable_cores
from sparse_tvm.errors import ArtifactError
from sparse_tvm.files import replacing
from sparse_tvm.manifest import check_manifest

FORMAT_VERSION = 2
"""Raised whenever an older reader would misread the file."""

WEIGHT_ALIGNMENT = 64
"""TVM's kernels assume that every tensor starts at a multiple of this many bytes."""

_PAGE, _LARGE_PAGE = 4096, 2 << 20
_WORTH_A_THREAD = 16 << 20
"""Bytes from which checksums are computed by all cores: a few milliseconds."""

_ELF_MAGIC = b"\x7fELF"
_MAGIC = b"SPARSTVM"
_FOOTER = struct.Struct("<QQII8s")  # manifest offset, length, crc32, format version, magic
_REBUILD = "compile the model again"


def is_artifact(path: str | os.PathLike[str]) -> bool:
    """Tell by its content whether a file is a shared library, whatever its name."""
    try:
        with Path(path).open("rb") as file:
            return file.read(len(_ELF_MAGIC)) == _ELF_MAGIC
    except OSError:
        return False


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
        Everything else to store. ``format_version``, ``code``, ``weights`` and
        ``totals.file_bytes`` are filled in here.

    Raises
    ------
    OutputError
        When `output` cannot be written.
    """
    with replacing(output) as temporary, temporary.open("wb") as file:
        code = Path(library).read_bytes()
        file.write(code)
        _pad(file, _PAGE)
        sections = {
            "code": {"nbytes": len(code), "crc32": crc32(code)},
            "weights": _write_weights(file, weights),
        }
        _pad(file, WEIGHT_ALIGNMENT)
        _write_manifest(file, {**manifest, **sections})


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

    What the manifest says of code and weights is kept, whatever `manifest` says. The new file is
    verified before it takes its place.

    Raises
    ------
    ArtifactError
        When `path` is not a sound artifact.
    OutputError
        When the new file cannot be written.
    """
    with open_artifact(path) as source, replacing(path) as temporary:
        before = manifest_of(source)
        sections = {key: before[key] for key in ("code", "weights")}
        end_of_weights = _read_footer(source)[0]
        with temporary.open("wb") as file:
            source.seek(0)
            _copy(source, file, end_of_weights)
            _write_manifest(file, {**manifest, **sections})
        verify_artifact(temporary)


def verify_artifact(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Check every byte of the artifact at `path`, and return its manifest.

    Raises
    ------
    ArtifactError
        When it is not a sound artifact; names the parts that are damaged.
    """
    with open_artifact(path) as file:
        manifest = manifest_of(file)
        content = map_content(file)
        end_of_weights = _read_footer(file)[0]
    check_content(content, manifest, path)
    end = 0
    for section in (*sections_of(manifest), Section(end_of_weights, end_of_weights, 0, "")):
        if content[end : section.start].any():
            raise ArtifactError(
                f"{path} is damaged: bytes {end} to {section.start} are not zero", hint=_REBUILD
            )
        end = max(end, section.end)
    return manifest


class Section(NamedTuple):
    """A part of the file that has a checksum.

    Attributes
    ----------
    start, end : int
        Its bytes.
    crc32 : int
        Their checksum.
    name : str
        What messages call it.
    """

    start: int
    end: int
    crc32: int
    name: str


def sections_of(manifest: Mapping[str, Any], *, everything: bool = True) -> list[Section]:
    """Return code and weights, in the order they lie in the file.

    Parameters
    ----------
    manifest : Mapping[str, Any]
        As `manifest_of` returns it.
    everything : bool
        Without, only where a wrong bit could crash: code, and integers, which may be indices.
    """
    code = manifest["code"]
    sections = [Section(0, code["nbytes"], code["crc32"], "the code")]
    for entry in manifest["weights"]:
        if everything or not entry["dtype"].startswith("float"):
            start = entry["offset"]
            sections.append(
                Section(start, start + entry["nbytes"], entry["crc32"], repr(entry["name"]))
            )
    return sorted(sections)


def map_content(file: BinaryIO) -> np.ndarray:
    """Map an open artifact into memory, as bytes.

    The mapping is private: pages stay shared with other processes as long as nobody writes, and
    DLPack of older NumPy exports no read-only memory.
    """
    return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)


def copy_content(file: BinaryIO) -> np.ndarray:
    """Read an open artifact into memory of this process, as bytes.

    NumPy asks for large pages of such memory, which Linux has where `transparent_hugepage` is
    `madvise` or `always`; files are mapped in small ones, which takes a CPU longer to go through.

    Raises
    ------
    ArtifactError
        When the file is cut meanwhile.
    """
    nbytes = os.fstat(file.fileno()).st_size
    memory = np.empty(nbytes + _LARGE_PAGE, np.uint8)
    content = memory[-memory.ctypes.data % _LARGE_PAGE :][:nbytes]
    done = 0
    while done < nbytes:
        read = os.preadv(file.fileno(), [content[done:].data], done)
        if read == 0:
            raise ArtifactError(f"{file.name} was cut while it was read", hint=_REBUILD)
        done += read
    return content


def check_content(
    content: np.ndarray,
    manifest: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    everything: bool = True,
) -> None:
    """Compare what was read with the checksums.

    Parameters
    ----------
    content : np.ndarray
        As `map_content` returns it.
    manifest : Mapping[str, Any]
        As `manifest_of` returns it.
    path : path
        For messages.
    everything : bool
        Also check the weights that are floating-point numbers, most of the file. Without, no page
        of theirs is touched; whatever they hold, it leads nowhere but to wrong results.

    Raises
    ------
    ArtifactError
        With all parts that are damaged.
    """
    sections = sections_of(manifest, everything=everything)
    sums = _checksums([content[section.start : section.end] for section in sections])
    damaged = [
        section.name
        for section, found in zip(sections, sums, strict=True)
        if found != section.crc32
    ]
    if damaged:
        more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        raise ArtifactError(
            f"{path} is damaged: {', '.join(damaged[:3])}{more} "
            f"{'has' if len(damaged) == 1 else 'have'} another checksum than was written",
            hint="copy the file again, or compile the model again",
        )


def _checksums(parts: Sequence[np.ndarray]) -> list[int | None]:
    """Return the checksum of each part; of many bytes by all cores.

    Bare threads: importing an executor takes as long as most checks.
    """
    sums: list[int | None] = [None] * len(parts)
    workers = usable_cores() if sum(part.size for part in parts) >= _WORTH_A_THREAD else 1

    def sum_up(first: int) -> None:
        for index in range(first, len(parts), workers):
            sums[index] = crc32(parts[index].data)

    threads = [Thread(target=sum_up, args=(first,)) for first in range(1, workers)]
    for thread in threads:
        thread.start()
    sum_up(0)
    for thread in threads:
        thread.join()
    return sums


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
    except (OSError, ValueError) as error:  # a ValueError if the name has a zero byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise ArtifactError(f"cannot read {path}: {reason}") from error


def manifest_of(file: BinaryIO) -> dict[str, Any]:
    """Return the manifest of an open artifact; see :func:`read_manifest`."""
    offset, length, crc = _read_footer(file)
    file.seek(offset)
    text = file.read(length)
    if crc32(text) != crc:
        raise ArtifactError(f"{file.name}: the manifest is damaged", hint=_REBUILD)
    try:
        manifest: dict[str, Any] = json.loads(text)
        check_manifest(manifest)
        _check_places(manifest, offset)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file.name}: {error}", hint=_REBUILD) from error
    return manifest


def _check_places(manifest: Mapping[str, Any], end_of_weights: int) -> None:
    """Raise ValueError where code and weights do not lie in the file, apart from each other."""
    itemsize = cache(lambda dtype: np.dtype(dtype).itemsize)
    for entry in manifest["weights"]:
        needed = math.prod(entry["shape"]) * itemsize(entry["dtype"])
        if entry["nbytes"] != needed:
            raise ValueError(
                f"weight {entry['name']!r} has {entry['nbytes']} bytes, its shape needs {needed}"
            )
        if entry["offset"] % WEIGHT_ALIGNMENT:
            raise ValueError(f"weight {entry['name']!r} is not aligned")
    before = Section(0, 0, 0, "the start of the file")
    for section in sections_of(manifest):
        if section.end > end_of_weights:
            raise ValueError(f"{section.name} lies outside of the file")
        if section.start < before.end and section[:3] != before[:3]:  # shared, if equal
            raise ValueError(f"{section.name} overlaps {before.name}")
        before = section


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
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"{file.name} has artifact format {version}; this sparse-tvm reads {FORMAT_VERSION}",
            hint=f"{'upgrade sparse-tvm, or ' if version > FORMAT_VERSION else ''}{_REBUILD}",
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
        checksum = crc32(raw.data)
        same = stored.setdefault((raw.size, checksum), [])
        offset = next((at for other, at in same if np.array_equal(other, raw)), None)
        if offset is None:
            _pad(file, WEIGHT_ALIGNMENT)
            offset = file.tell()
            file.write(raw.data)
            same.append((raw, offset))
        entries.append(
            {
                "name": name,
                "dtype": weight.dtype.name,
                "shape": list(weight.shape),
                "offset": offset,
                "nbytes": raw.size,
                "crc32": checksum,
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
    file.write(_FOOTER.pack(offset, len(text), crc32(text), FORMAT_VERSION, _MAGIC))


def _encode(manifest: Mapping[str, Any], offset: int) -> bytes:
    """Encode the manifest with the size of the file that it completes."""
    file_bytes = 0
    while True:
        totals = {**manifest.get("totals", {}), "file_bytes": file_bytes}
        complete = {**manifest, "format_version": FORMAT_VERSION, "totals": totals}
        text = json.dumps(complete).encode()
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
