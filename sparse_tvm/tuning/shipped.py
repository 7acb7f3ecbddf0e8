"""Records that come with the package: what layers of common models took on a family of CPUs.

One file for each family, named as LLVM names it. Only layers of which a user's own records know
nothing are chosen by them.
"""

from __future__ import annotations

from pathlib import Path

from sparse_tvm.targets import NATIVE
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
