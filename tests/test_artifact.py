from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from sparse_tvm import artifact
from sparse_tvm.artifact import read_manifest, rewrite_manifest, write_artifact
from sparse_tvm.errors import ArtifactError, OutputError

WEIGHTS = {
    "odd": np.arange(7, dtype=np.float32),
    "transposed": np.arange(12, dtype=np.float32).reshape(3, 4).T,
    "big_endian": np.arange(5, dtype=">i4"),
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.array(3.5, np.float32),
    "mask": np.array([True, False]),
}


@pytest.fixture
def library(tmp_path: Path) -> Path:
    path = tmp_path / "library.elf"
    path.write_bytes(b"\x7fELF" + bytes(range(256)))
    return path


@pytest.fixture
def path(tmp_path: Path, library: Path) -> Path:
    path = tmp_path / "model.so"
    write_artifact(path, library, WEIGHTS, {"model": {"name": "größe"}})
    return path


def stored(path: Path, entry: dict) -> np.ndarray:
    raw = path.read_bytes()[entry["offset"] : entry["offset"] + entry["nbytes"]]
    return np.frombuffer(raw, entry["dtype"]).reshape(entry["shape"])


def test_library_weights_and_manifest_come_back(path: Path, library: Path) -> None:
    manifest = read_manifest(path)
    assert path.read_bytes().startswith(library.read_bytes())
    assert manifest["model"] == {"name": "größe"}
    assert manifest["format_version"] == 1
    assert manifest["totals"]["file_bytes"] == path.stat().st_size
    assert [entry["name"] for entry in manifest["weights"]] == list(WEIGHTS)
    for entry in manifest["weights"]:
        assert entry["offset"] % 64 == 0
        np.testing.assert_array_equal(stored(path, entry), WEIGHTS[entry["name"]])


def test_equal_weights_are_stored_once(tmp_path: Path, library: Path) -> None:
    tied = np.arange(5000, dtype=np.float32)
    almost = tied.copy()
    almost[-1] += 1
    write_artifact(
        tmp_path / "a.so", library, {"a": tied, "b": tied.copy(), "c": almost, "d": tied}, {}
    )
    offsets = [entry["offset"] for entry in read_manifest(tmp_path / "a.so")["weights"]]
    assert offsets[0] == offsets[1] == offsets[3] != offsets[2]


def test_rewrite_manifest_keeps_code_and_weights(path: Path) -> None:
    before = read_manifest(path)
    rewrite_manifest(path, {**before, "verification": {"tolerance": 1e-4}, "weights": []})
    after = read_manifest(path)
    assert after["verification"] == {"tolerance": 1e-4}
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
        "newer": data[: footer + 20] + struct.pack("<I", 2) + data[footer + 24 :],
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
        ("newer", "artifact format 2; this sparse-tvm reads up to 1.*upgrade"),
    ],
)
def test_files_that_are_not_artifacts(path: Path, change: str, message: str) -> None:
    broken(path, change)
    with pytest.raises(ArtifactError, match=message) as caught:
        read_manifest(path)
    assert "model.so" in str(caught.value)


def test_weight_outside_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = json.loads(json.dumps(read_manifest(path)))
    real["weights"][0]["nbytes"] = 10**9
    monkeypatch.setattr(artifact, "manifest_of", lambda _: real)
    rewrite_manifest(path, real)
    monkeypatch.undo()
    with pytest.raises(ArtifactError, match="'odd' lies outside"):
        read_manifest(path)


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
