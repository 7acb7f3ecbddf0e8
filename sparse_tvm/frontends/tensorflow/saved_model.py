"""TensorFlow as a source: a SavedModel. Also what Keras and TensorFlow Lite share with it."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from sparse_tvm.errors import ModelError
from sparse_tvm.frontends.onnx.read import first_few, one_line
from sparse_tvm.frontends.silence import silent_stderr
from sparse_tvm.frontends.source import Source, require
from sparse_tvm.frontends.tensorflow.gelu import spell_gelu
from sparse_tvm.frontends.torch.export import quiet
from sparse_tvm.reference import ReferenceModel

OPSET = 18

_EXTRA = "tensorflow"
_PREFIX = re.compile(
    r"^(?:(?:StatefulPartitionedCall|PartitionedCall)(?:_\d+)?/)+(?:functional\w*/)?|^functional\w*/"
)
_SUFFIX = re.compile(
    r"(?:/(?:Cast|ReadVariableOp|MatMul|BiasAdd|Conv2D|Tensordot|convolution|depthwise|einsum"
    r"|merged_input)(?:_?\d+)?(?:/ReadVariableOp)?)+(?:__\d+)?(?::\d+)?$|:\d+$|__\d+$"
)


class SavedModelSource(Source):
    """A directory with ``saved_model.pb``."""

    kind = "TensorFlow SavedModel"

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), path)

    @cached_property
    def _loaded(self) -> Any:
        tensorflow = require_tensorflow(self.name)
        try:
            with quiet():
                return tensorflow.saved_model.load(self.name)
        except Exception as error:
            raise ModelError(
                f"{self.name}: TensorFlow {tensorflow.__version__} cannot load it: "
                f"{one_line(error)}"
            ) from error

    @cached_property
    def _signature(self) -> Any:
        signatures = dict(self._loaded.signatures)
        if not signatures:
            raise ModelError(
                f"{self.name}: the SavedModel has no signature to call",
                hint="save it with model.export(path), or with signatures=",
            )
        return signatures.get("serving_default") or next(iter(signatures.values()))

    @cached_property
    def _onnx(self) -> onnx.ModelProto:
        signature = self._signature
        import tensorflow

        specs = dict(sorted(signature.structured_input_signature[1].items()))
        named = [
            tensorflow.TensorSpec(spec.shape, spec.dtype, name=name) for name, spec in specs.items()
        ]
        return convert_function(
            lambda *arguments: signature(**dict(zip(specs, arguments, strict=True))),
            named,
            sorted(signature.structured_outputs),
            self.name,
        )

    def as_onnx(self) -> onnx.ModelProto:
        """See `Source.as_onnx`."""
        return self._onnx

    def reference(self, threads: int) -> ReferenceModel:
        """See `Source.reference`."""
        signature = self._signature

        def call(inputs: dict[str, Any]) -> Mapping[str, Any]:
            outputs: Mapping[str, Any] = signature(**inputs)
            return outputs

        return TensorFlowReference(
            sorted(signature.structured_input_signature[1]),
            sorted(signature.structured_outputs),
            call,
            threads,
        )


class TensorFlowReference(ReferenceModel):
    """A model in TensorFlow.

    Parameters
    ----------
    inputs, outputs : list[str]
        Names.
    call : Callable
        Takes tensors by name and returns tensors by name.
    threads : int
        Threads within an operator, where TensorFlow has not started yet.
    """

    engine = "TensorFlow"

    def __init__(
        self,
        inputs: list[str],
        outputs: list[str],
        call: Callable[[dict[str, Any]], Mapping[str, Any]],
        threads: int,
    ) -> None:
        import tensorflow

        self.version = tensorflow.__version__
        self.inputs, self.outputs = inputs, outputs
        self._call = call
        with contextlib.suppress(RuntimeError):
            tensorflow.config.threading.set_intra_op_parallelism_threads(threads)

    def run(
        self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """See `ReferenceModel.run`."""
        import tensorflow

        tensors = {name: tensorflow.constant(inputs[name]) for name in self.inputs}
        found = self._call(tensors)
        names = self.outputs if outputs is None else list(outputs)
        return {name: np.asarray(found[name]) for name in names}


def require_tensorflow(what: str) -> Any:
    """Import TensorFlow without its greetings.

    Raises
    ------
    ModelError
        When it is not installed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    if loaded := sys.modules.get("tensorflow"):
        return loaded
    with quiet(), silent_stderr():
        # PyTorch's GPU builds load Triton, which aborts the process when TensorFlow's LLVM is
        # there before its own.
        with contextlib.suppress(ImportError):
            importlib.import_module("triton")
        return require("tensorflow", _EXTRA, what)


def convert_function(
    function: Callable[..., Any], inputs: Sequence[Any], outputs: Sequence[str], name: str
) -> onnx.ModelProto:
    """Convert a TensorFlow function with tf2onnx.

    Parameters
    ----------
    function : Callable
        Takes one tensor per input.
    inputs : Sequence[tf.TensorSpec]
        Named; None in a shape is a symbolic dimension.
    outputs : Sequence[str]
        Names of the outputs, in the order that TensorFlow flattens them.
    name : str
        Goes to the graph, and so to messages.

    Raises
    ------
    ModelError
        When it holds operators that cannot be converted.
    """
    tensorflow = require_tensorflow(name)
    tf2onnx = require("tf2onnx", _EXTRA, name)
    traced = tensorflow.function(function)
    with converting(name):
        captures = traced.get_concrete_function(*inputs).graph.captures
        model, _ = tf2onnx.convert.from_function(traced, list(inputs), opset=OPSET)
    constants = {
        placeholder.name: value
        for value, placeholder in captures
        if value.dtype != tensorflow.resource
    }
    _store_constants(model.graph, constants)
    return tidy(model, name, [spec.name for spec in inputs], outputs)


def _store_constants(graph: onnx.GraphProto, constants: Mapping[str, Any]) -> None:
    """Store tensors that a function captured: tf2onnx makes them inputs."""
    captured = [value for value in graph.input if value.name in constants]
    for value in captured:
        graph.input.remove(value)
        array = constants[value.name].numpy()
        graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))


@contextmanager
def converting(name: str) -> Iterator[None]:
    """Turn what tf2onnx raises and prints into one `ModelError`."""
    try:
        with quiet(), contextlib.redirect_stdout(io.StringIO()):
            yield
    except Exception as error:
        raise ModelError(f"{name}: tf2onnx cannot convert it: {one_line(error)}") from error


def tidy(
    model: onnx.ModelProto, name: str, inputs: Sequence[str], outputs: Sequence[str]
) -> onnx.ModelProto:
    """Give a converted model the names of the source, in place, and return it."""
    graph = model.graph
    graph.name = name
    spell_gelu(model)
    _check_converted(graph, name)
    renamed = dict(zip((value.name for value in graph.input), inputs, strict=True))
    renamed |= dict(zip((value.name for value in graph.output), outputs, strict=True))
    taken = set(renamed.values())
    for tensor in graph.initializer:
        # A layer goes by its weight's name, which nothing else may have: outputs do.
        role = "weight" if len(tensor.dims) >= 2 else "bias"
        renamed[tensor.name] = _unique(f"{layer_name(tensor.name)}.{role}", taken)
    for node in graph.node:
        node.name = layer_name(node.name) or node.name
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.name = renamed.get(value.name, value.name)
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [renamed.get(n, n) for n in names]
    del graph.value_info[:]
    for value in graph.input:
        _name_dimensions(value)
    for value in graph.output:
        for dim in value.type.tensor_type.shape.dim:
            dim.ClearField("dim_param")
    return model


def _check_converted(graph: onnx.GraphProto, name: str) -> None:
    """Refuse operators that tf2onnx could not convert and left as they are."""
    unknown = sorted(
        {n.op_type for n in graph.node if n.domain == "" and not onnx.defs.has(n.op_type)}
    )
    if unknown:
        raise ModelError(
            f"{name}: operators that cannot be converted: {first_few(unknown)}",
            hint="custom operators, and those that tf2onnx does not know, are not supported",
        )


def layer_name(name: str) -> str:
    """Return a tensor's or node's name without what TensorFlow wraps around it.

    >>> layer_name("StatefulPartitionedCall/functional_1/dense_1/Cast/ReadVariableOp:0")
    'dense_1'
    """
    if name.startswith("const_fold_opt"):
        return name  # known to say nothing, so that the layer goes by its node
    last = name.rpartition(";")[2]  # TensorFlow Lite joins the names of what it fused
    return _SUFFIX.sub("", _PREFIX.sub("", last)) or name


def _unique(name: str, taken: set[str]) -> str:
    chosen, number = name, 1
    while chosen in taken:
        number += 1
        chosen = f"{name}_{number}"
    taken.add(chosen)
    return chosen


def _name_dimensions(value: onnx.ValueInfoProto) -> None:
    """Call the first symbolic dimension ``batch``, and the second of token ids ``sequence``."""
    tensor = value.type.tensor_type
    tokens = tensor.elem_type != onnx.TensorProto.FLOAT and len(tensor.shape.dim) == 2
    for axis, dim in enumerate(tensor.shape.dim):
        if dim.dim_value <= 0:
            sequence = "sequence" if tokens else f"{value.name}_dim{axis}"
            dim.dim_param = "batch" if axis == 0 else sequence
