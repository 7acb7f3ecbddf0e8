"""ONNX's own backend tests: nothing wrong, no internal error, and refusals only become fewer."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import onnx_suite

OK = ("pass", "refused")
SLICE = 25
"""Of so many cases one is always run: under a minute, where all take twelve."""


def check(results: dict[str, tuple[str, str]]) -> None:
    failed = {name: result for name, result in results.items() if result[0] not in OK}
    assert not failed
    refused = {name for name, (outcome, _) in results.items() if outcome == "refused"}
    expected = onnx_suite.expected_refusals() & results.keys()
    assert not refused - expected, "these passed before"
    # With --write they leave the list for good.
    assert not expected - refused, "these pass now: python scripts/onnx_suite.py --write"


def test_a_slice_of_the_cases() -> None:
    check(dict(onnx_suite.run(sorted(onnx_suite.cases())[::SLICE])))


@pytest.mark.heavy
@pytest.mark.skipif(
    os.environ.get("SPARSE_TVM_TEST_ONNX") != "1",
    reason="compiles 1,300 models, ten minutes and more: SPARSE_TVM_TEST_ONNX=1 runs it",
)
def test_refusals_may_only_shrink() -> None:
    check(dict(onnx_suite.run(list(onnx_suite.cases()))))
