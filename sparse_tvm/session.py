"""ONNX Runtime's way of running a model, for code that was written for it.

Change ``import onnxruntime`` into ``from sparse_tvm import session as onnxruntime`` and give the
session ``model.so`` in place of ``model.onnx``. Offered is what running takes: sessions, what they
say of the model, ``run`` and ``run_async``. Options that say how ONNX Runtime should optimise and
place a graph are accepted and change nothing, as an artifact was compiled, and for its device;
those that ask for a file are refused.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from sparse_tvm.errors import InputError, OptionError, SparseTvmError
from sparse_tvm.runtime import load
from sparse_tvm.spec import TensorSpec

_TYPES = {
    "float32": "float",
    "float64": "double",
    "float16": "float16",
    "bool": "bool",
}

Done = Callable[[list[Any], Any, str], None]


_PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider"]}


class GraphOptimizationLevel(IntEnum):
    """How far ONNX Runtime optimises a graph; an artifact is optimised already."""

    ORT_DISABLE_ALL = 0
    ORT_ENABLE_BASIC = 1
    ORT_ENABLE_EXTENDED = 2
    ORT_ENABLE_LAYOUT = 3
    ORT_ENABLE_ALL = 99


class ExecutionMode(IntEnum):
    """Whether ONNX Runtime runs operators at once; an artifact runs them one after the other."""

    ORT_SEQUENTIAL = 0
    ORT_PARALLEL = 1


@dataclass(slots=True)
class SessionOptions:
    """How a session runs; an option that is not listed is an error.

    Attributes
    ----------
    intra_op_num_threads : int
        Threads of a run; 0 for as many as the artifact was compiled for.
    enable_profiling : bool
        Refused: ``sparse-tvm bench --profile`` shows where the time goes.
    optimized_model_filepath : str
        Refused: there is no such model.
    graph_optimization_level, execution_mode, inter_op_num_threads, log_severity_level,
    log_verbosity_level, logid, enable_cpu_mem_arena, enable_mem_pattern, enable_mem_reuse,
    use_deterministic_compute
        Change nothing.
    """

    intra_op_num_threads: int = 0
    enable_profiling: bool = False
    optimized_model_filepath: str = ""
    graph_optimization_level: int = GraphOptimizationLevel.ORT_ENABLE_ALL
    execution_mode: int = ExecutionMode.ORT_SEQUENTIAL
    inter_op_num_threads: int = 0
    log_severity_level: int = 2
    log_verbosity_level: int = 0
    logid: str = ""
    enable_cpu_mem_arena: bool = True
    enable_mem_pattern: bool = True
    enable_mem_reuse: bool = True
    use_deterministic_compute: bool = False
    _entries: dict[str, str] = field(default_factory=dict)

    def add_session_config_entry(self, key: str, value: str) -> None:
        """Keep an entry of ONNX Runtime's own options, which changes nothing."""
        self._entries[key] = value

    def get_session_config_entry(self, key: str) -> str:
        """Return an entry that was added."""
        return self._entries[key]


@dataclass(slots=True)
class RunOptions:
    """How one run goes: options of ONNX Runtime's log, which change nothing."""

    log_severity_level: int = 2
    log_verbosity_level: int = 0
    logid: str = ""


@dataclass(frozen=True)
class ModelMetadata:
    """What is known of the model behind an artifact.

    Attributes
    ----------
    graph_name : str
        Its name: the compiled file's, without the suffix.
    producer_name : str
        What wrote the artifact, and its version.
    custom_metadata_map : dict[str, str]
        Where the model came from.
    """

    graph_name: str
    producer_name: str
    custom_metadata_map: dict[str, str]
    domain: str = ""
    description: str = ""
    graph_description: str = ""
    version: int = 0


def get_available_providers() -> list[str]:
    """Return ONNX Runtime's name for what artifacts run on everywhere: the CPU."""
    return list(_PROVIDERS["cpu"])


def get_device() -> str:
    """Return ``CPU``, as ONNX Runtime does where it has no other provider."""
    return "CPU"


def set_default_logger_severity(severity: int) -> None:
    """Do nothing: there is no log."""


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
        As :func:`sparse_tvm.load`; when `path_or_bytes` is bytes, or an option asks for a file.
    """

    def __init__(
        self,
        path_or_bytes: str | os.PathLike[str],
        sess_options: SessionOptions | None = None,
        providers: Sequence[Any] | None = None,
        provider_options: Sequence[Any] | None = None,
    ) -> None:
        self._options = sess_options if sess_options is not None else SessionOptions()
        _check(path_or_bytes, self._options)
        self._model = load(path_or_bytes, threads=self._options.intra_op_num_threads or None)

    def get_inputs(self) -> list[NodeArg]:
        """Return the inputs in the model's order."""
        return [_node_arg(spec) for spec in self._model.inputs]

    def get_outputs(self) -> list[NodeArg]:
        """Return the outputs in the model's order."""
        return [_node_arg(spec) for spec in self._model.outputs]

    def get_overridable_initializers(self) -> list[NodeArg]:
        """Return none: the artifact was compiled with its weights."""
        return []

    def get_providers(self) -> list[str]:
        """Return ONNX Runtime's name for the device that the model was compiled for."""
        return list(_PROVIDERS[self._model.manifest["device"]])

    def get_session_options(self) -> SessionOptions:
        """Return the options that the session was made with."""
        return self._options

    def get_modelmeta(self) -> ModelMetadata:
        """Return what is known of the model that was compiled."""
        manifest = self._model.manifest
        source = {name: str(value) for name, value in manifest["model"].items()}
        return ModelMetadata(
            graph_name=source["name"],
            producer_name=f"sparse-tvm {manifest['versions']['sparse_tvm']}",
            custom_metadata_map=source,
        )

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


def _check(path: object, options: SessionOptions) -> None:
    if isinstance(path, bytes):
        raise OptionError("a session takes the path of a compiled model, not its bytes")
    if options.enable_profiling:
        raise OptionError(
            "a session writes no profile", hint="sparse-tvm bench model.so --profile shows one"
        )
    if options.optimized_model_filepath:
        raise OptionError("a compiled model cannot be written as an optimised ONNX model")


def _node_arg(spec: TensorSpec) -> NodeArg:
    return NodeArg(spec.name, f"tensor({_TYPES.get(spec.dtype, spec.dtype)})", list(spec.shape))
