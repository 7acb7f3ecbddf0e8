"""Random graphs of supported operators: as ONNX Runtime computes them, with any sizes."""

from __future__ import annotations

import sys
from pathlib import Path

from hypothesis import HealthCheck, assume, given, settings

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import fuzz_graphs


@given(fuzz_graphs.graphs())
@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
def test_random_graphs(model):
    runs = fuzz_graphs.runs_of(model)
    assume(runs)
    end, why = fuzz_graphs.outcome(model, runs)
    assert end in ("pass", "refused"), why
