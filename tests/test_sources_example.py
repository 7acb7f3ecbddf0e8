"""The example that prunes while it trains."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples/prune_while_training.py"


@pytest.mark.skipif(not find_spec("torch"), reason="these tests run by scripts/test_sources.sh")
def test_it_stays_accurate_and_gets_fast() -> None:
    done = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    dense, pruned, compiled = map(float, re.findall(r"accuracy ([\d.]+)", done.stdout))
    assert pruned > dense - 0.02
    assert compiled == pytest.approx(pruned, abs=0.002)
    assert done.stdout.count(": bsr,") == 2
