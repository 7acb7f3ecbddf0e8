"""Where measurements come from, and what makes them comparable.

Needs no TVM.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparse_tvm.tuning.job import Machine, this_machine

VERSION = 2
"""Of the schema; it counts up when lines of an older one mean something else."""


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
    """

    cpu: str
    sparse_tvm: str
    tvm: str
    date: str

    def same_kernels(self, other: Provenance) -> bool:
        """Whether both were measured with the same versions."""
        return (self.sparse_tvm, self.tvm) == (other.sparse_tvm, other.tvm)


def here(date: str = "") -> Provenance:
    """The provenance of what is measured on this machine."""
    return measured_on(this_machine(), date)


def measured_on(machine: Machine, date: str = "") -> Provenance:
    """The provenance of what is measured on a machine."""
    return Provenance(machine["cpu"], machine["sparse_tvm"], machine["tvm"], date)
