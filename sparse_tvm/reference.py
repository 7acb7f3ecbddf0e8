"""References: what a model should return, and the time to beat. ONNX Runtime is one.

Models from other frameworks bring their own (see ``frontends/``).
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime

from sparse_tvm.errors import ModelError


class ReferenceModel(ABC):
    """A model in the framework it comes from.

    Attributes
    ----------
    engine : str
        The framework, for tables.
    version : str
        The framework's version.
    inputs, outputs : list[str]
        Names, in the model's order.
    """

    engine: str
    version: str
    inputs: list[str]
    outputs: list[str]

    @abstractmethod
    def run(
        self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Run the model and return its outputs, or only those named, in that order."""

    def max_abs_differences(
        self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]
    ) -> dict[str, float]:
        """Return by how much each of `outputs` differs at most from what the model returns.

        Equal infinities, and NaNs in the same place, do not differ. Another shape differs by
        infinity, and a NaN in one of the two by NaN.
        """
        expected = self.run(inputs, list(outputs))
        return {
            name: _max_abs_difference(output, expected[name]) for name, output in outputs.items()
        }


class Reference(ReferenceModel):
    """A model in ONNX Runtime, with its default optimisations.

    Parameters
    ----------
    model : path | bytes
        An ONNX file, or a serialized model.
    threads : int
        Threads within an operator; operators run one after the other.

    Raises
    ------
    ModelError
        When ONNX Runtime cannot load the model.
    """

    engine = "ONNX Runtime"
    version = onnxruntime.__version__

    def __init__(self, model: str | os.PathLike[str] | bytes, *, threads: int) -> None:
        self.name = "the model" if isinstance(model, bytes) else os.fspath(model)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        source = model if isinstance(model, bytes) else os.fspath(model)
        try:
            self._session = onnxruntime.InferenceSession(
                source, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its exceptions have no base of their own
            reason = str(error).partition("\n")[0]
            raise ModelError(f"ONNX Runtime cannot load {self.name}: {reason}") from error
        self.inputs = [node.name for node in self._session.get_inputs()]
        self.outputs = [node.name for node in self._session.get_outputs()]

    def run(
        self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Run the model and return its outputs, or only those named, in that order."""
        names = self.outputs if outputs is None else list(outputs)
        return dict(zip(names, self._session.run(names, dict(inputs)), strict=True))


def _max_abs_difference(output: np.ndarray, expected: np.ndarray) -> float:
    if output.shape != expected.shape:
        return float("inf")
    with np.errstate(invalid="ignore"):
        difference = np.abs(output.astype(np.float64) - expected.astype(np.float64))
    same = (output == expected) | ((output != output) & (expected != expected))
    return float(np.where(same, 0.0, difference).max(initial=0.0))
