from __future__ import annotations

import errno
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np
import pytest
from sample_manifest import sample_manifest

from sparse_tvm import artifact
from sparse_tvm.artifact import (
    copy_content,
    map_content,
    read_manifest,
    rewrite_manifest,
    sections_of,
    verify_artifact,
    write_artifact,
)
from sparse_tvm.errors import ArtifactError, OutputError
from sparse_tvm.manifest import check

WEIGHTS = {
    "odd": np.arange(7, dtype=np.float32),
    "transposed": np.arange(12, dtype=np.float32).reshape(3, 4).T,
    "big_endian": np.arange(5, dtype=">i4"),
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.array(3.5, np.float32),
    "mask": np.array([True, False]),
}


MODEL = {"name": "größe", "source": "gr\udcf6\udcdfe.onnx", "kind": "ONNX model", "sha256": None}
MANIFEST = sample_manifest() | {"model": MODEL}


@pytest.fixture
def library(tmp_path: Path) -> Path:
    path = tmp_path / "library.elf"
    path.write_bytes(b"\x7fELF" + bytes(range(256)))
    return path


@pytest.fixture
def path(tmp_path: Path, library: Path) -> Path:
    path = tmp_path / "model.so"
    write_artifact(path, library, WEIGHTS, MANIFEST)
    return path


def stored(path: Path, entry: dict) -> np.ndarray:
    raw = path.read_bytes()[entry["offset"] : entry["offset"] + entry["nbytes"]]
    return np.frombuffer(raw, entry["dtype"]).reshape(entry["shape"])


def test_checksums_are_those_of_zlib_whoever_computes_them(path: Path) -> None:
    data = path.read_bytes()
    for section in sections_of(read_manifest(path)):
        assert section.crc32 == zlib.crc32(data[section.start : section.end])


def test_library_weights_and_manifest_come_back(path: Path, library: Path) -> None:
    manifest = read_manifest(path)
    assert path.read_bytes().startswith(library.read_bytes())
    assert manifest["model"] == MODEL
    assert manifest["format_version"] == 2
    assert manifest["totals"]["file_bytes"] == path.stat().st_size
    assert [entry["name"] for entry in manifest["weights"]] == list(WEIGHTS)
    for entry in manifest["weights"]:
        assert entry["offset"] % 64 == 0
        np.testing.assert_array_equal(stored(path, entry), WEIGHTS[entry["name"]])


def test_a_copy_has_what_a_map_has(path: Path) -> None:
    with path.open("rb") as file:
        file.read(3)  # from wherever the file was read before
        copied, mapped = copy_content(file), map_content(file)
    np.testing.assert_array_equal(copied, mapped)
    assert copied.ctypes.data % (2 << 20) == 0


def test_a_file_that_is_cut_while_it_is_copied(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = path.stat()
    with path.open("rb") as file:
        os.truncate(path, whole.st_size // 2)
        monkeypatch.setattr(os, "fstat", lambda _: whole)
        with pytest.raises(ArtifactError, match="was cut while it was read"):
            copy_content(file)


def test_equal_weights_are_stored_once(tmp_path: Path, library: Path) -> None:
    tied = np.arange(5000, dtype=np.float32)
    almost = tied.copy()
    almost[-1] += 1
    write_artifact(
        tmp_path / "a.so", library, {"a": tied, "b": tied.copy(), "c": almost, "d": tied}, MANIFEST
    )
    offsets = [entry["offset"] for entry in read_manifest(tmp_path / "a.so")["weights"]]
    assert offsets[0] == offsets[1] == offsets[3] != offsets[2]


def test_rewrite_manifest_keeps_code_and_weights(path: Path) -> None:
    before = read_manifest(path)
    verification = {"reference": "itself", "tolerance": 1e-4, "max_abs_diff": {"y": 0.0}}
    rewrite_manifest(path, {**before, "verification": verification, "weights": []})
    after = read_manifest(path)
    assert after["verification"] == verification
    assert after["weights"] == before["weights"]
    assert after["totals"]["file_bytes"] == path.stat().st_size
    np.testing.assert_array_equal(stored(path, after["weights"][0]), WEIGHTS["odd"])


def broken(path: Path, change: str) -> None:
    data = path.read_bytes()
    if change == "missing":
        path.unlink()
        return
    if change == "directory":
        path.unlink()
        path.mkdir()
        return
    footer = len(data) - artifact._FOOTER.size
    data = {
        "empty": b"",
        "onnx": b"\x08\x07onnx" + data,
        "plain elf": data[:200],
        "truncated": data[:-100],
        "last byte gone": data[:-1],
        "middle gone": data[:100] + data[200:],
        "damaged": data[: footer - 5] + b"!" + data[footer - 4 :],
        "older": data[: footer + 20] + struct.pack("<I", 1) + data[footer + 24 :],
        "newer": data[: footer + 20] + struct.pack("<I", 3) + data[footer + 24 :],
    }[change]
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "no such file"),
        ("directory", "cannot read .*directory"),
        ("empty", "is empty"),
        ("onnx", "not an ELF file.*sparse-tvm compile"),
        ("plain elf", "no sparse-tvm footer"),
        ("truncated", "no sparse-tvm footer: it is truncated"),
        ("last byte gone", "no sparse-tvm footer"),
        ("middle gone", "truncated or damaged"),
        ("damaged", "manifest is damaged"),
        ("older", r"artifact format 1; this sparse-tvm reads 2 \(compile the model again\)"),
        ("newer", "artifact format 3; this sparse-tvm reads 2.*upgrade"),
    ],
)
def test_files_that_are_not_artifacts(path: Path, change: str, message: str) -> None:
    broken(path, change)
    with pytest.raises(ArtifactError, match=message) as caught:
        read_manifest(path)
    assert "model.so" in str(caught.value)


def forge(path: Path, manifest: object) -> None:
    """Give the artifact another manifest, with the right checksum."""
    data = path.read_bytes()
    offset = artifact._FOOTER.unpack(data[-artifact._FOOTER.size :])[0]
    text = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    footer = artifact._FOOTER.pack(offset, len(text), zlib.crc32(text), 2, b"SPARSTVM")
    path.write_bytes(data[:offset] + text + footer)


FORGERIES: dict[str, tuple[tuple[str | int, ...], object, str]] = {
    "outside": (("weights", 0, "nbytes"), 10**9, "'odd' has 1000000000 bytes, its shape needs 28"),
    "far away": (("weights", 0, "offset"), 1 << 40, "'odd' lies outside of the file"),
    "negative offset": (("weights", 0, "offset"), -64, r"weights\[0\].offset is -64"),
    "crooked": (("weights", 0, "offset"), 4097, "'odd' is not aligned"),
    "in the code": (("weights", 0, "offset"), 0, "the code overlaps 'odd'|'odd' overlaps"),
    "negative shape": (("weights", 0, "shape"), [-7], r"weights\[0\]\.shape\[0\] is -7"),
    "object": (("weights", 0, "dtype"), "object", "dtype is 'object', not one of bool"),
    "no dtype": (("weights", 0, "dtype"), None, "dtype is None, not one of bool"),
    "long code": (("code", "nbytes"), 10**6, "the code lies outside of the file"),
    "text": (("inputs", 0, "shape"), "8", r"inputs\[0\].shape is '8', not a list"),
    "bool": (("threads",), True, "threads is True, not a number from 0"),
    "half": (("target", "vector_bits"), 0.5, r"target.vector_bits is 0\.5, not"),
    "number": (("target",), 1, "target is 1, not an object"),
    "range": (("inputs", 0, "range"), [1], r"inputs\[0\].range is \[1\], not a list of 2"),
    "difference": (("verification", "max_abs_diff", "y"), "x", r"\['y'\] is 'x', not a number"),
    "density": (("layers", 0, "density"), ["0g"], r"density\[0\] is '0g', not bytes in hex"),
    "long": (("layers", 0, "name"), ["x" * 100], "…, not a string"),
}


@pytest.mark.parametrize("case", FORGERIES)
def test_manifests_that_break_the_schema(path: Path, case: str) -> None:
    keys, value, message = FORGERIES[case]
    forged = read_manifest(path)
    place = forged
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    forge(path, forged)
    with pytest.raises(ArtifactError, match=message) as caught:
        read_manifest(path)
    assert "model.so" in str(caught.value)


@pytest.mark.parametrize("key", ["code", "weights", "target", "kernels"])
def test_missing_keys_are_named(path: Path, key: str) -> None:
    forged = read_manifest(path)
    del forged[key]
    forge(path, forged)
    with pytest.raises(ArtifactError, match=f"the manifest has no '{key}'"):
        read_manifest(path)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"[" * 100_000, b"1" * 5000, b"\xff"])
def test_manifests_that_are_no_objects(path: Path, text: bytes) -> None:
    forge(path, text)
    with pytest.raises(ArtifactError, match=r"model\.so: "):
        read_manifest(path)


def test_unknown_keys_are_let_through(path: Path) -> None:
    forge(path, read_manifest(path) | {"colour": "green"})
    assert read_manifest(path)["colour"] == "green"


def test_every_flipped_bit_is_found(path: Path) -> None:
    data = path.read_bytes()
    assert verify_artifact(path)["model"] == MODEL
    rng = np.random.default_rng(0)
    for bit in rng.choice(8 * len(data), 500, replace=False):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=r"model\.so"):
            verify_artifact(path)


def test_damage_is_named_by_its_part(path: Path) -> None:
    data = path.read_bytes()
    sections = sections_of(read_manifest(path))
    for section in (section for section in sections if section.start < section.end):
        damaged = bytearray(data)
        damaged[section.end - 1] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=f"is damaged: {section.name} has another"):
            verify_artifact(path)
    gap = bytearray(data)
    gap[sections[0].end] = 1
    path.write_bytes(gap)
    with pytest.raises(ArtifactError, match="bytes 260 to 4096 are not zero"):
        verify_artifact(path)


def test_rewriting_a_damaged_artifact_leaves_it(path: Path) -> None:
    manifest = read_manifest(path)
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="the code has another checksum"):
        rewrite_manifest(path, manifest)
    assert path.read_bytes() == data
    assert {file.name for file in path.parent.iterdir()} == {"model.so", "library.elf"}


class FullDisk:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, *_: object) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OutputError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
@pytest.mark.parametrize("existing", [True, False])
def test_failed_write_leaves_everything_as_it_was(
    path: Path,
    library: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    expected: type[BaseException],
    existing: bool,
) -> None:
    output = path if existing else path.with_name("new.so")
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    monkeypatch.setattr(artifact, "_write_manifest", FullDisk(error))
    with pytest.raises(expected):
        write_artifact(output, library, {"w": np.ones(3)}, {})
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


def test_output_directory_does_not_exist(tmp_path: Path, library: Path) -> None:
    with pytest.raises(OutputError, match="No such file"):
        write_artifact(tmp_path / "missing" / "model.so", library, {}, {})


def test_a_schema_whose_annotations_are_not_evaluated_is_checked() -> None:
    check({"form": "x"}, Postponed, "")
    with pytest.raises(ValueError, match="form is 'y', not one of x"):
        check({"form": "y"}, Postponed, "")


class Postponed(TypedDict):
    form: Literal["x"]
