"""The wheel without a compiler, in an environment that has nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import artifacts
import pytest
from onnx import parser

ROOT = Path(__file__).parents[1]
MODEL = """<ir_version: 8, opset_import: ["" : 17]>
agraph (float[1, 4] x) => (float[1, 4] y) { y = Relu(x) }"""


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """``sparse-tvm`` of the light distribution."""
    directory = tmp_path_factory.mktemp("light")
    build = [sys.executable, str(ROOT / "scripts/build_runtime.py"), str(directory)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = directory.glob("*.whl")
    assert wheel.stat().st_size < 5_000_000
    subprocess.run([sys.executable, "-m", "venv", str(directory / "venv")], check=True)
    python = directory / "venv/bin/python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, str(wheel)], check=True)
    return [str(python.with_name("sparse-tvm"))]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(artifacts.write(tmp_path_factory.mktemp("artifact") / "small.so"))


@pytest.mark.parametrize(
    "arguments", [("run", "--random"), ("bench", "--duration", "0.1"), ("inspect",), ("verify",)]
)
def test_what_an_artifact_is_for_works(
    command: list[str], artifact: str, arguments: tuple[str, ...]
) -> None:
    verb, *options = arguments
    done = subprocess.run([*command, verb, artifact, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_its_package_loads_and_runs(command: list[str], artifact: str, tmp_path: Path) -> None:
    code = """
import platform, sys, numpy as np, sparse_tvm
inputs = {"x": np.zeros((8, 64), "float32"), "ids": np.zeros(8, "int64")}
assert sparse_tvm.load(sys.argv[1], threads=2).run(inputs)["y"].shape == (8, 64)
from sparse_tvm.vm import tvm_library
assert platform.machine() != "x86_64" or tvm_library("libtvm_runtime_cuda.so") is not None
assert "tvm" not in sys.modules and sparse_tvm.__version__[0].isdigit()
"""
    python = str(Path(command[0]).with_name("python"))
    subprocess.run([python, "-c", code, artifact], check=True, cwd=tmp_path)  # not the checkout


def test_compiling_says_what_to_install(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(parser.parse_model(MODEL).SerializeToString())
    arguments = ["compile", str(tmp_path / "model.onnx"), "-o", str(tmp_path / "model.so")]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.returncode != 0
    assert "install sparse-tvm in place of sparse-tvm-runtime" in done.stderr
    assert len(done.stderr.splitlines()) <= 3
