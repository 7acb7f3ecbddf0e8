from __future__ import annotations

import re
import subprocess
import sys

from sparse_tvm.extras import install_command


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
