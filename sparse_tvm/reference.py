"""References: what a model should return, and the time to beat. ONNX Runtime is one.

Models from other frameworks bring their own (see ``frontends/``).
"""

from __future__ import annotations

import os
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from sparse_tvm.errors import ModelError
from sparse_tvm.frontends.onnx.older_opset import write_at_opset

_NOT_IMPLEMENTED = re.compile(r"Could not find an implementation for (\w+)\((\d+)\)")
_TOO_NEW = re.compile(r"Unsupported model IR version|support for domain ai\.onnx is till opset")


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

    def compared(
        self, inputs: Mapping[str, np.ndarray], output: np.ndarray, expected: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return those elements of an output, ours and this model's, that must be the same."""
        return output, expected

    def max_abs_differences(
        self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]
    ) -> dict[str, float]:
        """Return by how much each of `outputs` differs at most from what the model returns.

        Equal infinities, and NaNs in the same place, do not differ. Another shape differs by
        infinity, and a NaN in one of the two by NaN.
        """
        expected = self.run(inputs, list(outputs))
        return {
            name: max_abs_difference(*self.compared(inputs, output, expected[name]))
            for name, output in outputs.items()
        }


class Reference(ReferenceModel):
    """A model in ONNX Runtime, with its default optimisations.

    A model of a newer opset than it takes is converted for it, and operators that it lacks are
    replaced by their definitions.

    Parameters
    ----------
    model : path | bytes
        An ONNX file, or a serialized model.
    threads : int
        Threads within an operator; operators run one after the other.
    widened : bool
        Run a model of bfloat16, for which ONNX Runtime lacks most operators, in float32.

    Raises
    ------
    ModelError
        When ONNX Runtime cannot load the model, or (later) run it.
    """

    engine = "ONNX Runtime"
    version = onnxruntime.__version__

    def __init__(
        self, model: str | os.PathLike[str] | bytes, *, threads: int, widened: bool = False
    ) -> None:
        self.name = "the model" if isinstance(model, bytes) else os.fspath(model)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # what is fatal; errors are raised
        source = model if isinstance(model, bytes) else self.name
        self._session = self._open(source, options, widened)
        self.inputs = [node.name for node in self._session.get_inputs()]
        self.outputs = [node.name for node in self._session.get_outputs()]

    def _open(self, source: str | bytes, options: Any, widened: bool) -> Any:
        """Load the model, spelled as ONNX Runtime knows it where it refuses."""
        opset: int | None = None
        expanded: set[str] = set()
        with tempfile.TemporaryDirectory() as directory:
            spelled = source
            if widened:
                spelled = str(Path(directory) / "spelled.onnx")
                write_at_opset(source, opset, Path(spelled))
            while True:
                try:
                    return _session(spelled, options)
                except Exception as error:  # its exceptions have no base of their own
                    missing = _NOT_IMPLEMENTED.search(str(error))
                    if _TOO_NEW.search(str(error)) and opset is None:
                        opset = _newest_opset()
                    elif missing and missing[1] not in expanded:
                        expanded.add(missing[1])
                    elif missing and (opset is None or opset >= int(missing[2])):
                        opset = int(missing[2]) - 1  # its own fusions made the operator
                    else:
                        raise self._refused("load", error) from error
                spelled = str(Path(directory) / "spelled.onnx")
                write_at_opset(source, opset, Path(spelled), expanded)

    def _refused(self, what: str, error: Exception) -> ModelError:
        reason = str(error).partition("\n")[0]
        return ModelError(f"ONNX Runtime cannot {what} {self.name}: {reason}")

    def run(
        self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Run the model and return its outputs, or only those named, in that order."""
        names = self.outputs if outputs is None else list(outputs)
        try:
            results = self._session.run(names, dict(inputs))
        except Exception as error:  # its exceptions have no base of their own
            raise cannot_run("ONNX Runtime", self.name, error) from error
        return dict(zip(names, results, strict=True))


def cannot_run(engine: str, model: str, error: Exception) -> ModelError:
    """Say that a framework refuses a model's inputs, which may be random ones."""
    reason = str(error).strip().partition("\n")[0]
    return ModelError(
        f"{engine} cannot run {model}: {reason}",
        hint="--verify-inputs FILE.npz gives other inputs than random ones",
    )


def _session(source: str | bytes, options: Any) -> Any:
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


@cache
def _newest_opset() -> int:
    """Return the newest opset that ONNX Runtime takes, which only its refusal of a newer tells."""
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    x, y = (onnx.helper.make_tensor_value_info(name, 1, [1]) for name in "xy")
    graph = onnx.helper.make_graph([node], "newest", [x], [y])
    opset = onnx.helper.make_opsetid("", 1000)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
    try:
        _session(model.SerializeToString(), onnxruntime.SessionOptions())
    except Exception as error:
        return int(re.findall(r"till opset (\d+)", str(error))[0])
    return opset.version


def max_abs_difference(output: np.ndarray, expected: np.ndarray) -> float:
    """Return by how much two arrays differ at most, as ``max_abs_differences`` defines it."""
    if output.shape != expected.shape:
        return float("inf")
    with np.errstate(invalid="ignore"):
        difference = np.abs(output.astype(np.float64) - expected.astype(np.float64))
    same = (output == expected) | ((output != output) & (expected != expected))
    return float(np.where(same, 0.0, difference).max(initial=0.0))
