"""Readers meet random files: they refuse them in their own words, and nothing crashes."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sample_manifest import sample_manifest

from sparse_tvm.errors import InputError, ModelError
from sparse_tvm.frontends.safetensors_file import TensorFile
from sparse_tvm.manifest import check_manifest
from sparse_tvm.npz import read_npz
from sparse_tvm.printable import printable

SCRIPT = Path(__file__).parents[1] / "scripts" / "fuzz_artifacts.py"

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
files = settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_damaged_artifacts_archives_and_models() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--scale", "0.02"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 flipped bits, verify: 20 found" in done.stdout
    assert "10 truncations, load and run: 10 refused" in done.stdout


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return all (container, key) pairs of nested lists and objects."""
    if not isinstance(value, dict | list):
        return []
    keys = list(value) if isinstance(value, dict) else range(len(value))
    return [place for key in keys for place in [(value, key), *places(value[key])]]


SOUND = sample_manifest() | {"format_version": 2, "code": {"nbytes": 1, "crc32": 2}}
PLACES = len(places(SOUND))


@given(st.integers(0, PLACES - 1), values)
def test_manifests_with_another_value(place: int, value: Any) -> None:
    manifest = json.loads(json.dumps(SOUND))
    container, key = places(manifest)[place]
    container[key] = value
    with suppress(ValueError):
        check_manifest(manifest)


@given(values)
def test_manifests_of_any_kind(value: Any) -> None:
    with pytest.raises(ValueError, match=r"the manifest (is|has no)"):
        check_manifest(value)


@files
@given(st.binary(max_size=200))
def test_archives_of_random_bytes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "in.npz"
    path.write_bytes(content)
    with pytest.raises(InputError):
        read_npz(path)


@files
@given(st.dictionaries(st.text(max_size=4), values) | values)
def test_safetensors_with_random_headers(tmp_path: Path, header: Any) -> None:
    path = tmp_path / "model.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with suppress(ModelError):
        file = TensorFile(path)
        for name in file.names():
            file[name]


@given(st.text())
def test_printable_text_is_printable(text: str) -> None:
    assert all(line.isprintable() for line in printable(text).split("\n"))
    assert printable(printable(text)) == printable(text)
