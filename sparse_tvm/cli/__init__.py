"""The ``sparse-tvm`` command: one module per verb, and :mod:`~sparse_tvm.cli.app` around them."""

from __future__ import annotations

from sparse_tvm.cli.app import main

__all__ = ["main"]
