"""Report files, in the format that the file name's suffix asks for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparse_tvm.errors import OptionError
from sparse_tvm.files import check_writable, replacing
from sparse_tvm.printable import printable
from sparse_tvm.report.html import render_html
from sparse_tvm.report.markdown import render_markdown


def _render_json(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=2) + "\n"


_RENDERERS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    ".html": render_html,
    ".json": _render_json,
    ".md": render_markdown,
}


def check_report_path(path: str | os.PathLike[str]) -> None:
    """Refuse a report path that cannot work, before the compile that it would report.

    Raises
    ------
    OptionError
        When the suffix is not ``.html``, ``.json`` or ``.md``, or the directory does not exist.
    OutputError
        When the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in _RENDERERS:
        raise OptionError(
            f"report {path}: unknown format {path.suffix!r}",
            hint=f"end the name in one of {', '.join(_RENDERERS)}",
        )
    if not path.parent.is_dir():
        raise OptionError(
            f"report {path}: directory {path.parent} does not exist", hint="create it first"
        )
    check_writable(path)


def write_report(manifest: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write what `manifest` says as HTML, Markdown or JSON, by the suffix of `path`.

    Raises
    ------
    OptionError
        As :func:`check_report_path`.
    OutputError
        When the file cannot be written.
    """
    check_report_path(path)
    text = printable(_RENDERERS[Path(path).suffix](manifest))
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
