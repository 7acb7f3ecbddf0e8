"""Report files, in the format that the file name's suffix asks for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sparse_tvm.errors import OptionError
from sparse_tvm.extras import install_command
from sparse_tvm.files import check_writable, replacing
from sparse_tvm.printable import printable
from sparse_tvm.report.html import render_html
from sparse_tvm.report.markdown import render_markdown

_Manifest = Mapping[str, Any]


def _render_json(manifest: _Manifest, bench: _Manifest | None) -> str:
    content = manifest if bench is None else {**manifest, "bench": bench}
    return json.dumps(content, indent=2) + "\n"


_RENDERERS: dict[str, Callable[[_Manifest, _Manifest | None], str]] = {
    ".html": render_html,
    ".json": _render_json,
    ".md": render_markdown,
}
_DRAWS = ("jinja2", "vl_convert")
"""What the HTML page and its plots need."""


def check_report_path(path: str | os.PathLike[str]) -> None:
    """Refuse a report path that cannot work, before the compile that it would report.

    Raises
    ------
    OptionError
        When the suffix is not ``.html``, ``.json`` or ``.md``, the directory does not exist, or
        what draws an HTML page is not installed.
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
    if path.suffix == ".html" and not all(map(find_spec, _DRAWS)):
        raise OptionError(
            f"report {path}: an HTML page needs {' and '.join(_DRAWS)}",
            hint=f"{install_command('report')}; or write .md or .json",
        )
    check_writable(path)


def write_report(
    manifest: _Manifest, path: str | os.PathLike[str], bench: _Manifest | None = None
) -> None:
    """Write what `manifest` says as HTML, Markdown or JSON, by the suffix of `path`.

    `bench` is what ``sparse-tvm bench`` measured of the artifact, as its ``--json`` has it.

    Raises
    ------
    OptionError
        As :func:`check_report_path`.
    OutputError
        When the file cannot be written.
    """
    check_report_path(path)
    text = printable(_RENDERERS[Path(path).suffix](manifest, bench))
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
