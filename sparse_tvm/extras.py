"""What to install for an optional part: named package by package, from this installation's record.

So the command works wherever sparse-tvm itself came from: a checkout, a wheel, or an index.
"""

from __future__ import annotations

import re
import shlex
from importlib import metadata

_DISTRIBUTION = "sparse-tvm"
_OF_EXTRA = re.compile(r"""extra == ["']([^"']+)["']""")
_OWN_EXTRAS = re.compile(rf"{_DISTRIBUTION}\[([^\]]+)\]")


def install_command(extra: str) -> str:
    """Return the pip command that installs what the extra ``extra`` stands for."""
    try:
        packages = _packages(extra, metadata.requires(_DISTRIBUTION) or [])
    except metadata.PackageNotFoundError:  # a source tree that is not installed
        packages = [f".[{extra}]"]
    return "pip install " + " ".join(map(shlex.quote, packages))


def _packages(extra: str, requirements: list[str]) -> list[str]:
    """Resolve an extra into packages, through the extras that it names itself."""
    found: list[str] = []
    for requirement in requirements:
        package, _, marker = requirement.partition(";")
        of = _OF_EXTRA.search(marker)
        if of is None or of[1] != extra:
            continue
        own = _OWN_EXTRAS.match(package)
        found += (
            [p for name in own[1].split(",") for p in _packages(name.strip(), requirements)]
            if own
            else [package.strip()]
        )
    return list(dict.fromkeys(found))
