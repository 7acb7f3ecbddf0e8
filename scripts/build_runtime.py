"""Build ``sparse-tvm-runtime``: a wheel that loads, runs and serves artifacts, and compiles none.

``pip install sparse-tvm`` brings TVM's compiler, 250 MB, of which running needs one library of
3 MB. This wheel has the same Python files and that library, with its part for CUDA, from the TVM
that is installed here, and leaves out the compiler's requirements. Where both distributions are
installed the files are the same, and TVM's own library is loaded.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).parents[1]
LIBRARIES = ("libtvm_runtime.so", "libtvm_runtime_cuda.so")
"""The second where TVM's wheel has it: on x86-64."""

COMPILING = ("apache-tvm==", "onnx>=", "onnxruntime>=", "onnxsim>=")
"""Requirements that only a compiler has."""

RUNNING_EXTRAS = ("serve", "ray")
PROJECT = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "sparse-tvm-runtime"
version = "{version}"
description = "Loads, runs and serves what sparse-tvm compiled"
readme = "README.md"
license = "{license}"
license-files = ["LICENSE"]
requires-python = "{python}"
dependencies = {dependencies}

[project.optional-dependencies]
{extras}

[project.scripts]
sparse-tvm = "sparse_tvm.cli:main"

[tool.setuptools.packages.find]
include = ["sparse_tvm*"]
namespaces = false

[tool.setuptools.package-data]
"*" = ["py.typed", "*.html"]
"sparse_tvm" = ["lib/*.so"]
"""


def main(
    output: Annotated[Path, typer.Argument(help="Directory for the wheel.")] = Path("dist"),
) -> None:
    """Build the wheel of the light runtime."""
    with tempfile.TemporaryDirectory() as directory:
        stage = Path(directory)
        shutil.copytree(
            ROOT / "sparse_tvm",
            stage / "sparse_tvm",
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        for name in ("README.md", "LICENSE"):
            shutil.copy(ROOT / name, stage)
        (stage / "sparse_tvm/lib").mkdir()
        for library in _tvm_libraries():
            shutil.copy(library, stage / "sparse_tvm/lib")
        (stage / "pyproject.toml").write_text(_project())
        (stage / "setup.cfg").write_text(f"[bdist_wheel]\nplat_name = {_platform()}\n")
        subprocess.run(
            [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", output.resolve(), stage],
            check=True,
        )


def _project() -> str:
    """The wheel's ``pyproject.toml``, of what the whole distribution's says."""
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    own = {
        name: [requirement.replace("sparse-tvm[", "sparse-tvm-runtime[") for requirement in extra]
        for name, extra in extras.items()
        if name in RUNNING_EXTRAS
    }
    dependencies = [
        requirement
        for requirement in project["dependencies"]
        if not requirement.startswith(COMPILING)
    ]
    return PROJECT.format(
        version=project["version"],
        license=project["license"],
        python=project["requires-python"],
        dependencies=dependencies,
        extras="\n".join(f"{name} = {extra}" for name, extra in own.items()),
    )


def _tvm_libraries() -> list[Path]:
    spec = find_spec("tvm")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("TVM is not installed: bash scripts/setup.sh dev")
    directory = Path(spec.submodule_search_locations[0]) / "lib"
    return [directory / name for name in LIBRARIES if (directory / name).exists()]


def _platform() -> str:
    """The oldest platform that TVM's wheel, and so its library, is for."""
    wheel = metadata.distribution("apache-tvm").read_text("WHEEL") or ""
    tags = [line.split(":")[1].strip() for line in wheel.splitlines() if line.startswith("Tag:")]
    return min(tag.split("-", 2)[2] for tag in tags)


if __name__ == "__main__":
    typer.run(main)
