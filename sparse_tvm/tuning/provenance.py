"""Where measurements come from, what makes them comparable, and what they come to.

Needs no TVM.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from sparse_tvm.tuning.job import Machine, this_machine

VERSION = 2
"""Of the schema; it counts up when lines of an older one mean something else."""


class _SourceKeys(TypedDict):
    cpu: str
    sparse_tvm: str
    tvm: str
    date: str


class Source(_SourceKeys, total=False):
    """What a line says of where it comes from; of the clock only if that is known."""

    pace: float


@dataclass(frozen=True)
class Provenance:
    """Where a record comes from.

    Attributes
    ----------
    cpu : str
        The CPU's model name.
    sparse_tvm, tvm : str
        Versions.
    date : str
        When it was measured: UTC, ISO 8601.
    pace : float | None
        How fast the clock was then, 1 being the best of the session.
    """

    cpu: str
    sparse_tvm: str
    tvm: str
    date: str
    pace: float | None = None

    def as_json(self) -> dict[str, Any]:
        """As a line has it, among other keys."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Provenance:
        """From a line that is checked to be a :class:`Source`."""
        return cls(line["cpu"], line["sparse_tvm"], line["tvm"], line["date"], line.get("pace"))

    def same_kernels(self, other: Provenance) -> bool:
        """Whether both were measured with the same versions."""
        return (self.sparse_tvm, self.tvm) == (other.sparse_tvm, other.tvm)


def here(date: str = "") -> Provenance:
    """The provenance of what is measured on this machine."""
    return measured_on(this_machine(), date)


def measured_on(machine: Machine, date: str = "", pace: float | None = None) -> Provenance:
    """The provenance of what is measured on a machine."""
    return Provenance(machine["cpu"], machine["sparse_tvm"], machine["tvm"], date, pace)


def check_outcome(seconds: float | None, failure: str | None) -> None:
    """Check what a measurement came to: a time, or why there is none.

    Raises
    ------
    ValueError
        When it is neither or both, or no time.
    """
    if (seconds is None) == (failure is None):
        raise ValueError("it has to have either seconds or a failure")
    if seconds is not None and not 0 < seconds < math.inf:
        raise ValueError(f"its seconds are {seconds}")
