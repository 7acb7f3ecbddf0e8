"""The examples that are read cell by cell run as scripts, too."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def said_by(name: str) -> str:
    done = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_first_model_becomes_sparse_and_is_compared() -> None:
    said = said_by("first_model.py")
    assert said.count(": bsr,") == 12
    assert re.search(r"[\d.]+x the speed of ONNX Runtime", said)


@pytest.mark.skipif(not find_spec("gevent"), reason="scripts/test_serving.sh runs it")
def test_a_served_model_answers() -> None:
    said = said_by("serve_a_model.py")
    assert "(1, 3, 64)" in said
    assert "sparse_tvm_batch_rows_count" in said
