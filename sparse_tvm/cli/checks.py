"""What is wrong with a command's arguments, found before anything slow is loaded.

The functions that do the work check the same; the command line asks first, as loading a compiler
only to say that a file is missing takes seconds.
"""

from __future__ import annotations

from pathlib import Path

from sparse_tvm.errors import ArtifactError, TargetError


def check_artifact(path: Path) -> None:
    """Refuse an artifact that does not exist.

    Raises
    ------
    ArtifactError
        When there is no such file.
    """
    if not path.exists():
        raise ArtifactError(f"{path}: no such file")


def check_target(name: str) -> None:
    """Refuse a target that no backend knows.

    Raises
    ------
    TargetError
        As :func:`sparse_tvm.backends.resolve_target`.
    """
    from importlib.metadata import entry_points

    from sparse_tvm.targets import NATIVE, get_target
    from sparse_tvm.targets.names import OTHER_NAMES, TARGET_NAMES

    if name == NATIVE:
        get_target(name)
    elif name in TARGET_NAMES or name in OTHER_NAMES:
        return
    elif entry_points(group="sparse_tvm.backends"):  # which have targets of their own
        from sparse_tvm.backends import resolve_target

        resolve_target(name)
    else:
        hint = f"{', '.join(TARGET_NAMES)}; `sparse-tvm targets` lists more names"
        raise TargetError(f"unknown target {name!r}", hint=hint)
