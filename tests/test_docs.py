"""What the documentation says of the code is what the code says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest

ROOT = Path(__file__).parent.parent


def test_the_table_of_operators_is_that_of_the_code():
    # In a process of its own: other tests define operators too.
    command = [sys.executable, str(ROOT / "scripts" / "operator_table.py")]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert table in (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


def test_the_page_of_operators_is_that_of_the_importer():
    page = (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8")
    if f"onnx {onnx.__version__}." not in page:
        pytest.skip("the page is of another version of onnx")
    script = str(ROOT / "scripts" / "coverage_page.py")
    assert subprocess.run([sys.executable, script, "--check"], check=False).returncode == 0
