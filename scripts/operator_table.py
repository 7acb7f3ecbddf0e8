"""Print the table of operators in ``docs/extending.md``, from the operators themselves."""

from __future__ import annotations

from dataclasses import fields

import sparse_tvm.schedules.cpu.image_operators
import sparse_tvm.schedules.cpu.operators  # noqa: F401  (both register the CPU's own)
from sparse_tvm.operators import Operator, WeightedOperator, all_operators


def operator_table() -> str:
    """One row for each operator: its operands, what a call says besides, what it computes."""
    lines = ["| operator | operands | fields | computes |", "|---|---|---|---|"]
    for operator in all_operators():
        base = WeightedOperator if issubclass(operator, WeightedOperator) else Operator
        inherited = {field.name for field in fields(base)}
        own = ", ".join(f.name for f in fields(operator) if f.name not in inherited)
        summary = (operator.__doc__ or "").splitlines()[0].replace("``", "`").rstrip(".")
        summary = summary.replace(":mod:", "").replace(":class:", "").replace("sparse_tvm.", "")
        lines.append(f"| `{operator.name}` | {operator.operands} | {own} | {summary} |")
    shared = ", ".join(f.name for f in fields(WeightedOperator))
    return "\n".join([*lines, "", f"Layers also have: {shared}.", ""])


if __name__ == "__main__":
    print(operator_table())
