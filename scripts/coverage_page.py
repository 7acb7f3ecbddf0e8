"""Write docs/coverage.md: ONNX's operators, how they are compiled, and what is refused of them.

python scripts/coverage_page.py [--check]

The operators come from the importer's rules and from the standard of the installed onnx package,
the limits from tests/onnx_suite_refusals.txt. `--check` only says whether the page is up to date.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

import onnx
import onnx_suite

from sparse_tvm.frontends.importer import model as importer
from sparse_tvm.frontends.importer.graph import OWN_OPS, SUPPORTED_OPS
from sparse_tvm.frontends.onnx.quantised import QUANTISED_OPS

PAGE = Path(__file__).parent.parent / "docs" / "coverage.md"
HEAD = """# Coverage

What of ONNX's standard compiles, by the operators of onnx {version}. This page is made by
`python scripts/coverage_page.py`, from the importer's rules and from what `scripts/onnx_suite.py`
saw of ONNX's backend tests: {passed} of {total} cases pass, {refused} are refused, none gives a
wrong result or ends in another error. What cannot be compiled is refused by name, all operators of
a model at once, before anything is compiled.

*Rule* means a rule of ours, which also follows shapes, positions and masks through symbolic sizes;
*definition* that the operator is replaced by others, as the standard defines it; *TVM* that its
importer takes the node. *Cases* counts ONNX's tests that hold the operator: those that pass, of all
whose tensors have types that are compiled.

## Operators

| operator | version | by | cases | refused |
|---|---|---|---|---|
"""
REFUSED = """
## Refused

| operator | reason |
|---|---|
"""
MOST_REASONS = 2


def main() -> int:
    page = coverage_page()
    if "--check" in sys.argv:
        return 0 if PAGE.read_text("utf-8") == page else 1
    PAGE.write_text(page, encoding="utf-8")
    return 0


def coverage_page() -> str:
    """Return the page."""
    schemas = [s for s in onnx.defs.get_all_schemas() if s.domain == "" and not s.deprecated]
    defined = importer._defined_only() | QUANTISED_OPS
    compiled = SUPPORTED_OPS | defined
    reasons = refusals()
    held = operators_of_cases()
    rows, refused = [], []
    for schema in sorted(schemas, key=lambda schema: str(schema.name)):
        name = schema.name
        cases = held[name]
        failing = [case for case in cases if case in reasons]
        if name not in compiled:
            refused.append(f"| {name} | {_reason([reasons[case] for case in failing])} |")
            continue
        by = "rule" if name in OWN_OPS else "definition" if name in defined else "TVM"
        why = _listed([reasons[case] for case in failing])
        count = f"{len(cases) - len(failing)} of {len(cases)}" if cases else ""
        rows.append(f"| {name} | {schema.since_version} | {by} | {count} | {why} |")
    total = sum(1 for _ in onnx_suite.cases())
    head = HEAD.format(
        version=onnx.__version__, passed=total - len(reasons), total=total, refused=len(reasons)
    )
    return head + "\n".join(rows) + "\n" + REFUSED + "\n".join(refused) + "\n"


def refusals() -> dict[str, str]:
    """Return why each case is refused that is."""
    lines = onnx_suite.REFUSALS.read_text("utf-8").splitlines()
    return {case: why.strip() for case, _, why in (line.partition(":") for line in lines)}


def operators_of_cases() -> dict[str, list[str]]:
    """Return the cases that hold each operator."""
    held: dict[str, list[str]] = defaultdict(list)
    for name, case in onnx_suite.cases().items():
        for op in {node.op_type for node in onnx_suite.model_of(case).graph.node}:
            held[op].append(name)
    return held


def _reason(whys: list[str]) -> str:
    return _listed([why for why in whys if "cannot be compiled" not in why]) or "no rule"


def _listed(whys: list[str]) -> str:
    """The different reasons, without names of nodes."""
    plain = [re.sub(r"^(?:\w+: )?node \S+ \(\w+\) cannot be imported: ", "", why) for why in whys]
    different = sorted({re.sub(r"\s*\(node [^)]*\)", "", why).strip() for why in plain})
    shown = [why.replace("|", "\\|")[:120] for why in different[:MOST_REASONS]]
    return "; ".join([*shown, *(["..."] if len(different) > MOST_REASONS else [])])


if __name__ == "__main__":
    sys.exit(main())
