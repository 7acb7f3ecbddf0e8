"""The C++ example, built and run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from serving_fixtures import write_encoder

import sparse_tvm

SOURCE = Path(__file__).resolve().parent.parent / "examples" / "cpp"

needs_cmake = pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("c++")), reason="needs cmake and a C++ compiler"
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = tmp_path_factory.mktemp("cpp")
    configure = ["cmake", "-S", SOURCE, "-B", build, f"-DPython_EXECUTABLE={sys.executable}"]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", build], check=True, capture_output=True)
    return build / "run_model"


@needs_cmake
def test_cpp_prints_what_python_returns(program: Path, tmp_path: Path) -> None:
    path = write_encoder(tmp_path / "encoder.so")
    command = [program, path.name, "batch=2", "sequence=5"]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    output = done.stdout
    ones = np.ones((2, 5), np.int64)
    hidden = sparse_tvm.load(path).run({"input_ids": ones, "attention_mask": ones})["hidden"]
    head, _, numbers = output.partition(":")
    assert head == "hidden [2, 5, 16]"
    np.testing.assert_allclose(
        [float(number) for number in numbers.split()[:4]], hidden.reshape(-1)[:4], rtol=1e-4
    )


@needs_cmake
def test_cpp_refuses_what_is_no_artifact(program: Path, tmp_path: Path) -> None:
    path = write_encoder(tmp_path / "encoder.so")
    path.write_bytes(path.read_bytes()[:-1])
    run = subprocess.run([program, path], capture_output=True, text=True)
    assert run.returncode == 1
    assert "truncated" in run.stderr


@needs_cmake
def test_cpp_says_that_a_gpu_is_missing(program: Path, tmp_path: Path) -> None:
    path = write_encoder(tmp_path / "encoder.so")
    as_cuda = path.read_bytes().replace(b'"device": "cpu"', b'"device":"cuda"')
    assert b'"device":"cuda"' in as_cuda
    path.write_bytes(as_cuda)
    run = subprocess.run([program, path], capture_output=True, text=True)
    assert run.returncode == 1
    assert "the model needs an NVIDIA GPU: lib" in run.stderr


@needs_cmake
def test_cpp_links_the_runtime_only(program: Path) -> None:
    linked = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout
    assert "libtvm_runtime" in linked
    assert "libtvm_compiler" not in linked
    assert "libpython" not in linked
