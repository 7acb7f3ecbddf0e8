"""What it costs to compare an artifact with its checksums when it is loaded.

Loads without and with comparison take turns; the file is in the page cache.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from time import perf_counter
from typing import Annotated
from unittest.mock import patch

import typer

import sparse_tvm
from sparse_tvm.checksum import LIBRARY
from sparse_tvm.cli.console import stdout_console
from sparse_tvm.cpu import usable_cores

_PIECE = 64 << 20


def main(
    artifact: Annotated[Path, typer.Argument(help="model.so")],
    rounds: Annotated[int, typer.Option(help="Loads of each kind.")] = 11,
) -> None:
    """Print the medians."""
    with artifact.open("rb") as file:
        while file.read(_PIECE):
            pass
    unchecked, checked = [], []
    for _ in range(rounds):
        with patch("sparse_tvm.runtime.check_content"):
            unchecked.append(seconds(artifact, verify=False))
        checked.append(seconds(artifact, verify=True))
    costs = [one - other for one, other in zip(checked, unchecked, strict=True)]
    stdout_console().print(
        f"{artifact.stat().st_size / 1e6:.0f} MB, {usable_cores()} cores, CRC-32 of "
        f"{LIBRARY}: loaded in {statistics.median(unchecked):.3f} s unchecked, "
        f"{statistics.median(checked):.3f} s checked, {statistics.median(costs):.3f} s more",
        soft_wrap=True,
    )


def seconds(artifact: Path, *, verify: bool) -> float:
    started = perf_counter()
    sparse_tvm.load(artifact, verify=verify)
    return perf_counter() - started


if __name__ == "__main__":
    typer.run(main)
