"""Reports of a compile: HTML, Markdown or JSON files, and tables for the terminal."""

from __future__ import annotations

from sparse_tvm.report.files import check_report_path, write_report

__all__ = ["check_report_path", "write_report"]
