"""What a version was loaded from, out of everybody's reach.

Workers map the artifact. If they mapped the file itself, writing into it would change the weights
of running models, cutting it short would kill them, and a worker that is started again would open
whatever lies at the path by then. So each version holds a copy in anonymous memory, sealed, from
which all its workers load; they share its pages.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from sparse_tvm.errors import ArtifactError

_CHUNK = 64 << 20
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


class PrivateCopy:
    """A sealed copy of a file.

    Parameters
    ----------
    path : Path
        The file.

    Raises
    ------
    ArtifactError
        When it cannot be read, or is being written.
    """

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as source:
                before = os.fstat(source.fileno())
                self.descriptor = os.memfd_create(path.name, os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
                try:
                    _copy(source.fileno(), self.descriptor, before.st_size)
                    fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SEALS)
                    after = os.fstat(source.fileno())
                except BaseException:
                    self.close()
                    raise
        except OSError as error:
            raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
        if (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, after.st_size):
            self.close()
            raise ArtifactError(f"{path} is being written")

    def close(self) -> None:
        """Give the memory back, as soon as no worker maps it any more."""
        os.close(self.descriptor)


def _copy(source: int, destination: int, size: int) -> None:
    """Copy inside the kernel; other threads run meanwhile."""
    while size > 0 and (sent := os.sendfile(destination, source, None, min(size, _CHUNK))):
        size -= sent
