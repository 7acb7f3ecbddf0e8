"""Layers that are done, kept on disk until the whole model is."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from sparse_tvm.errors import InputError, OutputError
from sparse_tvm.npz import read_npz, write_npz


class ProgressStore:
    """A directory beside the output with one file per pruned layer.

    Another run finds there what an interrupted one did, if model, data and options are the same.

    Parameters
    ----------
    output : path
        What the run will write; the directory is ``<output>.pruning``.
    identity : str
        What the run does, see `identity_of`. A directory of another run is emptied.
    """

    def __init__(self, output: str | os.PathLike[str], identity: str) -> None:
        self.directory = Path(f"{os.fspath(output)}.pruning")
        stamp = self.directory / "identity"
        try:
            if not stamp.is_file() or stamp.read_text() != identity:
                shutil.rmtree(self.directory, ignore_errors=True)
                self.directory.mkdir()
                stamp.write_text(identity)
        except OSError as error:
            raise OutputError(f"cannot write {self.directory}: {error.strerror}") from error

    def load(self, index: int) -> dict[str, np.ndarray] | None:
        """Return the arrays of a layer that an earlier run finished."""
        path = self._path(index)
        if not path.is_file():
            return None
        try:
            return read_npz(path)
        except InputError:
            return None  # damaged: the layer is pruned again

    def save(self, index: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep a layer's arrays."""
        write_npz(self._path(index), arrays)

    def remove(self) -> None:
        """Remove it all."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _path(self, index: int) -> Path:
        return self.directory / f"{index:05}.npz"


def identity_of(options: object, arrays: Iterable[np.ndarray]) -> str:
    """Return a digest of options, by their ``repr``, and of arrays."""
    digest = hashlib.sha256(repr(options).encode())
    for array in arrays:
        digest.update(repr((array.dtype, array.shape)).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
