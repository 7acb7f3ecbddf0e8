"""The ``sparse-tvm`` command: one module per verb, and :mod:`~sparse_tvm.cli.app` around them."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; see :func:`sparse_tvm.cli.app.main`."""
    from sparse_tvm.cli import app

    return app.main(argv)
