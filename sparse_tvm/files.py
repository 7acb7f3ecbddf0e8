"""Writing files so that a failure leaves nothing behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from sparse_tvm.errors import OutputError

_NAME_KEPT = 32
"""Characters of a file's name in the temporary one, which may be no longer than the longest."""

_numbers = count()


@contextmanager
def replacing(output: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `output` that takes its place when the block succeeds.

    When the block raises, the temporary file is removed and what was at `output` stays.

    Raises
    ------
    OutputError
        When the directory is missing or not writable, or the disk is full.
    """
    output = Path(output)
    with _beside(output) as temporary:
        yield temporary
        temporary.replace(output)


def check_writable(output: str | os.PathLike[str]) -> None:
    """Refuse an `output` that :func:`replacing` could not write, before the work rather than after.

    Raises
    ------
    OutputError
        As :func:`replacing`.
    """
    with _beside(Path(output)) as temporary:
        temporary.touch()


@contextmanager
def _beside(output: Path) -> Iterator[Path]:
    """Yield a temporary path in the directory of `output`, and leave nothing there."""
    name = f".{output.name[:_NAME_KEPT]}.{os.getpid()}.{next(_numbers)}.tmp"
    temporary = output.parent / name
    try:
        if output.is_dir():
            raise OutputError(f"cannot write {output}: it is a directory", hint="give a file name")
        yield temporary
    except OSError as error:
        raise OutputError(
            f"cannot write {output}: {error.strerror or error}",
            hint="write to an existing directory with enough space that you may write to",
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
