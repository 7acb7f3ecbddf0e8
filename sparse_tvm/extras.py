"""What to install for an optional part: named package by package, from this installation's record.

So the command works wherever sparse-tvm itself came from: a checkout, a wheel, or an index.
"""

from __future__ import annotations

import re
import shlex

LIGHT = "sparse-tvm-runtime"
"""The distribution that compiles nothing, see ``scripts/build_runtime.py``."""

_DISTRIBUTIONS = ("sparse-tvm", LIGHT)
_OF_EXTRA = re.compile(r"""extra == ["']([^"']+)["']""")
_OWN_EXTRAS = re.compile(rf"(?:{'|'.join(_DISTRIBUTIONS)})\[([^\]]+)\]")


def install_command(extra: str) -> str:
    """Return the pip command that installs what the extra ``extra`` stands for."""
    from importlib import metadata  # as slow to import as all the rest of a command's first line

    distribution = installed_distribution()
    requirements = metadata.requires(distribution) or [] if distribution else []
    packages = _packages(extra, requirements) or [f".[{extra}]"]
    return "pip install " + " ".join(map(shlex.quote, packages))


def installed_distribution() -> str | None:
    """Return which of our distributions is installed; None in a source tree that is not."""
    from contextlib import suppress
    from importlib import metadata

    for distribution in _DISTRIBUTIONS:
        with suppress(metadata.PackageNotFoundError):
            metadata.version(distribution)
            return distribution
    return None


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
