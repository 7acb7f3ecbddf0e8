"""Records that come with the package: what layers of common models took on a family of CPUs.

One file for each family, named as LLVM names it. Only layers of which a user's own records know
nothing are chosen by them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from sparse_tvm.cpu import cpu_model
from sparse_tvm.targets import NATIVE
from sparse_tvm.tuning.evidence import Evidence
from sparse_tvm.tuning.records import Records, read_records

_DIRECTORY = Path(__file__).parent.parent / "schedules" / "records"


def shipped_file() -> Path:
    """The file for this machine's family of CPUs, whether it exists or not."""
    from tvm.target import codegen

    return _DIRECTORY / f"{codegen.llvm_get_system_cpu()}.jsonl"


def shipped_records_of(target: str) -> Records:
    """The records for a target: for ``native`` of this family of CPUs only, else of any.

    Those of other versions are left out, silently: nobody here asked for them.
    """
    files = [shipped_file()] if target == NATIVE else sorted(_DIRECTORY.glob("*.jsonl"))
    found = read_records([file for file in files if file.exists()])
    found.remarks.clear()
    return found


def evidence_for(
    target: str,
    records: Sequence[str | os.PathLike[str]],
    threads: int | None,
    *,
    shipped: bool,
) -> Evidence:
    """What a user's records know of a target, for ``native`` those of this CPU, and the package's.

    Raises
    ------
    OptionError
        When a file cannot be read.
    """
    own = read_records(records, cpu_model() if target == NATIVE else None)
    return Evidence(own, threads, shipped_records_of(target) if shipped else Records())
