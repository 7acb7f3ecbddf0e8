from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from build_runtime import COMPILING
from packaging.requirements import Requirement

from sparse_tvm.extras import install_command

ROOT = Path(__file__).parents[1]


def test_an_extra_is_named_package_by_package() -> None:
    command = install_command("zig")
    assert re.fullmatch(r"pip install 'ziglang>=[\d.]+'", command)


def test_the_extras_of_an_extra_are_resolved() -> None:
    command = install_command("huggingface")
    assert "torch" in command
    assert "transformers" in command
    assert "sparse-tvm" not in command  # which no index has


def test_the_module_is_a_command() -> None:
    command = [sys.executable, "-m", "sparse_tvm", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("sparse-tvm ")


def test_the_container_installs_what_the_server_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lock = (ROOT / "examples/container/requirements.txt").read_text()
    locked = dict(re.findall(r"^([\w-]+)==([\w.]+)", lock, re.MULTILINE))
    needed = [
        Requirement(line)
        for line in (*project["dependencies"], *project["optional-dependencies"]["serve"])
        if not line.startswith(COMPILING)
    ]
    outdated = [str(one) for one in needed if not one.specifier.contains(locked.get(one.name, "0"))]
    assert not outdated, "bash scripts/lock_container.sh writes it anew"
    assert not {"apache-tvm", "onnx", "onnxruntime"} & locked.keys()
