"""Another compiled model to compare with: untuned, less pruned, or built before."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sparse_tvm.reference import ReferenceModel
from sparse_tvm.runtime import load


class CompiledReference(ReferenceModel):
    """An artifact beside another one of the same inputs and outputs.

    Parameters
    ----------
    path : path
        The artifact.
    threads : int
        That it uses.
    huge_pages : bool
        As for :func:`sparse_tvm.load`.

    Raises
    ------
    ArtifactError
        As :func:`sparse_tvm.load`.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int, huge_pages: bool) -> None:
        self._model = load(path, threads=threads, huge_pages=huge_pages)
        self.engine = Path(path).name
        self.version = self._model.manifest["versions"]["sparse_tvm"]
        self.inputs = [spec.name for spec in self._model.inputs]
        self.outputs = [spec.name for spec in self._model.outputs]

    def run(
        self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """As the base class says."""
        found = self._model.run(inputs)
        return found if outputs is None else {name: found[name] for name in outputs}
