"""``sparse-tvm verify``: whether an artifact is as it was written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def verify(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL.so...", help="Compiled models.")],
) -> None:
    """Compare every byte of MODEL.so with its checksums; run none of its code."""
    from rich.text import Text

    from sparse_tvm.artifact import verify_artifact
    from sparse_tvm.cli.console import stdout_console
    from sparse_tvm.report.content import human_bytes

    for model in models:
        totals = verify_artifact(model)["totals"]
        size = human_bytes(totals["file_bytes"])
        stdout_console().print(Text(f"{model}: sound, {size}"), soft_wrap=True)
