"""Kernels in several forms, of which only a measurement tells the fastest: attention's blocks.

A call of such a kernel is a text, the operator's fields and the extents of its operands, from which
a worker builds it again; records know it by that text's fingerprint.

Needs no TVM.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from sparse_tvm.families import Extents, KernelFamily
from sparse_tvm.operators import Operator, from_json, to_json
from sparse_tvm.tuning.schedule_records import GENERIC


@dataclass(frozen=True)
class KernelCall:
    """A call of a kernel, its form not chosen yet.

    Attributes
    ----------
    op : Operator
        What it computes.
    operands, output : Sequence[Extents], Extents
        Of what.
    """

    op: Operator
    operands: Sequence[Extents]
    output: Extents

    @property
    def text(self) -> str:
        """All there is to know of it, as JSON."""
        operands = [to_json(one) for one in self.operands]
        described = {"call": to_json(self.op), "operands": operands, "output": to_json(self.output)}
        return json.dumps({"operator": self.op.name, **described}, sort_keys=True)

    @classmethod
    def read(cls, text: str) -> KernelCall:
        """The call that a text describes."""
        value = json.loads(text)
        operands = [_extents(one) for one in value["operands"]]
        op = from_json(value["operator"], value["call"])
        return cls(op, operands, _extents(value["output"]))

    @property
    def fingerprint(self) -> str:
        """As records have it."""
        return sha256(self.text.encode()).hexdigest()[:16]

    def forms(self, family: KernelFamily[Any], target: Any) -> Mapping[str, Operator]:
        """The operator in every form, by its name: the usual one first; that alone if no other."""
        return {GENERIC: self.op, **family.forms(self.op, self.operands, self.output, target)}


def _extents(value: Mapping[str, Any]) -> Extents:
    return Extents(**{**value, "shape": tuple(value["shape"])})
