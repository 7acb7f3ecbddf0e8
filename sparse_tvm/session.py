"""ONNX Runtime's way of running a model, for code that was written for it.

Change ``import onnxruntime`` into ``from sparse_tvm import session as onnxruntime`` and give the
session ``model.so`` in place of ``model.onnx``. Offered is what running takes: sessions, their
inputs and outputs, ``run`` and ``run_async``. Providers are accepted and not used, as an artifact
was compiled for its device.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparse_tvm.errors import InputError, SparseTvmError
from sparse_tvm.runtime import load
from sparse_tvm.spec import TensorSpec

_TYPES = {
    "float32": "float",
    "float64": "double",
    "float16": "float16",
    "bool": "bool",
}

Done = Callable[[list[Any], Any, str], None]


@dataclass
class SessionOptions:
    """How a session runs.

    Attributes
    ----------
    intra_op_num_threads : int
        Threads of a run; 0 for as many as the artifact was compiled for.
    """

    intra_op_num_threads: int = 0


@dataclass(frozen=True)
class NodeArg:
    """An input or output.

    Attributes
    ----------
    name : str
        Its name.
    type : str
        Such as ``tensor(float)`` or ``tensor(int64)``.
    shape : list[int | str]
        A string is a symbolic dimension.
    """

    name: str
    type: str
    shape: list[int | str]


class InferenceSession:
    """A compiled model behind the interface of ``onnxruntime.InferenceSession``.

    Raises
    ------
    ArtifactError, OptionError
        As :func:`sparse_tvm.load`.
    """

    def __init__(
        self,
        path_or_bytes: str | os.PathLike[str],
        sess_options: SessionOptions | None = None,
        providers: Sequence[Any] | None = None,
    ) -> None:
        threads = sess_options.intra_op_num_threads if sess_options is not None else 0
        self._model = load(path_or_bytes, threads=threads or None)

    def get_inputs(self) -> list[NodeArg]:
        """Return the inputs in the model's order."""
        return [_node_arg(spec) for spec in self._model.inputs]

    def get_outputs(self) -> list[NodeArg]:
        """Return the outputs in the model's order."""
        return [_node_arg(spec) for spec in self._model.outputs]

    def get_providers(self) -> list[str]:
        """Return what runs the model: the device that it was compiled for."""
        return [f"SparseTvm{self._model.manifest['device'].title()}ExecutionProvider"]

    def run(
        self,
        output_names: Sequence[str] | None,
        input_feed: Mapping[str, Any],
        run_options: Any = None,
    ) -> list[Any]:
        """Run once.

        Parameters
        ----------
        output_names : Sequence[str] | None
            Which outputs to return, in this order; None for all in the model's.
        input_feed : Mapping[str, array]
            Arrays by input name.
        run_options : Any
            Not used.

        Raises
        ------
        InputError
            As :meth:`sparse_tvm.runtime.Model.run`, or when there is no such output.
        """
        outputs = self._model.run(input_feed)
        unknown = [name for name in output_names or () if name not in outputs]
        if unknown:
            raise InputError(
                f"{self._model.path.name}: no output {unknown[0]!r}",
                hint=f"its outputs are {', '.join(outputs)}",
            )
        return [outputs[name] for name in output_names or outputs]

    def run_async(
        self,
        output_names: Sequence[str] | None,
        input_feed: Mapping[str, Any],
        callback: Done,
        user_data: Any,
        run_options: Any = None,
    ) -> None:
        """Run on another thread; then call ``callback(outputs, user_data, error)``.

        ``error`` is empty where the run succeeded, and ``outputs`` where it did not.
        """

        def work() -> None:
            try:
                results, error = self.run(output_names, input_feed), ""
            except SparseTvmError as refused:
                results, error = [], str(refused)
            callback(results, user_data, error)

        threading.Thread(target=work, daemon=True).start()


def _node_arg(spec: TensorSpec) -> NodeArg:
    return NodeArg(spec.name, f"tensor({_TYPES.get(spec.dtype, spec.dtype)})", list(spec.shape))
