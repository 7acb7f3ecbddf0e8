"""What a worker process can run: artifacts, and ONNX models to compare them with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sparse_tvm.spec import TensorSpec


class Engine(Protocol):
    """A loaded model."""

    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    manifest: dict[str, Any]

    def run(self, inputs: Mapping[str, Any], /) -> dict[str, np.ndarray]:
        """Run the model once; outputs come in the order of :attr:`outputs`."""


def open_engine(
    path: Path,
    copy: Path,
    threads: int,
    device: str | None = None,
    *,
    huge_pages: bool = False,
    verify: bool,
) -> Engine:
    """Load a model: ONNX Runtime runs ``.onnx``, everything else is an artifact.

    Parameters
    ----------
    path : Path
        Where the model comes from; ONNX is loaded from here, as its weights may lie beside it.
    copy : Path
        The artifact, in a copy that nobody changes.
    threads : int
        Threads of a run.
    device : str | None
        Where an artifact runs, as :func:`sparse_tvm.load` has it.
    huge_pages : bool
        Whether its weights are in memory of this process, as there.
    verify : bool
        Compare all of the artifact with its checksums.

    Raises
    ------
    SparseTvmError
        When the model cannot be loaded.
    """
    if path.suffix == ".onnx":
        return _OnnxRuntime(path, threads)
    from sparse_tvm.runtime import load

    return load(copy, threads=threads, verify=verify, device=device, huge_pages=huge_pages)


class _OnnxRuntime:
    """ONNX Runtime behind the same server, for comparisons."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnx

        from sparse_tvm.reference import Reference

        graph = onnx.load(path, load_external_data=False).graph
        stored = {initializer.name for initializer in graph.initializer}
        self.inputs = [_spec(value) for value in graph.input if value.name not in stored]
        self.outputs = [_spec(value) for value in graph.output]
        self.manifest: dict[str, Any] = {}
        self._reference = Reference(path, threads=threads)

    def run(self, inputs: Mapping[str, Any], /) -> dict[str, np.ndarray]:
        return self._reference.run(inputs)


def _spec(value: Any) -> TensorSpec:
    import onnx

    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    return TensorSpec(value.name, dtype.name, shape)
