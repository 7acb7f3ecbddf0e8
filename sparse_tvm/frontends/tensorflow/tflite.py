"""TensorFlow Lite as a source: a ``.tflite`` file, its sparse tensors decoded in memory only."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from sparse_tvm.errors import ModelError
from sparse_tvm.frontends.onnx.read import one_line
from sparse_tvm.frontends.source import Source, require
from sparse_tvm.frontends.tensorflow.saved_model import (
    OPSET,
    converting,
    layer_name,
    require_tensorflow,
    tidy,
)
from sparse_tvm.reference import ReferenceModel
from sparse_tvm.sparsity.sources import decode_tflite

SPARSE_TENSOR = "TFLite sparse tensor"

_DTYPES = {0: np.float32, 1: np.float16, 2: np.int32, 9: np.int8}
_DENSE_DIMENSION = 0
_LAYERS = (3, 4, 9)  # CONV_2D, DEPTHWISE_CONV_2D, FULLY_CONNECTED
_DENSIFY = 124  # BuiltinOperator.DENSIFY


class TfliteSource(Source):
    """A ``.tflite`` file."""

    kind = "TensorFlow Lite model"

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), path)
        self._sparse: dict[str, np.ndarray] = {}

    @cached_property
    def _flatbuffer(self) -> Any:
        """The parsed file, with every sparse tensor dense."""
        require_tensorflow(self.name)
        assert self.path is not None
        from tensorflow.lite.tools import flatbuffer_utils

        try:
            data = bytearray(self.path.read_bytes())
            model = flatbuffer_utils.convert_bytearray_to_object(data)
        except Exception as error:
            raise ModelError(f"{self.name}: truncated or damaged: {one_line(error)}") from error
        if not model.subgraphs or not model.subgraphs[0].operators:
            raise ModelError(f"{self.name}: truncated or damaged: it holds no graph")
        for graph in model.subgraphs:
            self._densify(model, graph)
        return model

    def _densify(self, model: Any, graph: Any) -> None:
        for tensor in graph.tensors:
            if tensor.sparsity is None:
                continue
            name = tensor.name.decode()
            buffer = model.buffers[tensor.buffer]
            try:
                dense = _decode(tensor, buffer.data)
            except (KeyError, IndexError, ValueError) as error:
                raise ModelError(
                    f"{self.name}: sparse tensor {name} cannot be decoded: {one_line(error)}"
                ) from error
            buffer.data = np.frombuffer(dense.tobytes(), np.uint8)
            tensor.sparsity = None
            self._sparse[name] = dense
        _drop_densify(model, graph)

    @cached_property
    def _names(self) -> tuple[list[str], list[str]]:
        """Names of inputs and outputs: the signature's, if there is one."""
        graph = self._flatbuffer.subgraphs[0]
        signatures = self._flatbuffer.signatureDefs or []
        named: dict[int, str] = {}
        for signature in signatures[:1]:
            for entry in (*signature.inputs, *signature.outputs):
                named[entry.tensorIndex] = entry.name.decode()
        inputs, outputs = (
            [named.get(i) or layer_name(graph.tensors[i].name.decode()) for i in indices]
            for indices in (graph.inputs, graph.outputs)
        )
        return inputs, outputs

    @cached_property
    def _onnx(self) -> onnx.ModelProto:
        tf2onnx = require("tf2onnx", "tensorflow", self.name)
        require("tflite", "tensorflow", self.name)
        from tensorflow.lite.tools import flatbuffer_utils

        graph = self._flatbuffer.subgraphs[0]
        inputs, outputs = (
            [graph.tensors[i].name.decode() for i in indices]
            for indices in (graph.inputs, graph.outputs)
        )
        data = flatbuffer_utils.convert_object_to_bytearray(self._flatbuffer)
        with _memory_file(bytes(data)) as path, converting(self.name), _no_warnings():
            model, _ = tf2onnx.convert.from_tflite(
                path, input_names=inputs, output_names=outputs, opset=OPSET
            )
        weights = self._weight_names()
        for node in model.graph.node:
            node.name = weights.get(node.output[0], node.name)
        return tidy(model, self.name, *self._names)

    def _weight_names(self) -> dict[str, str]:
        """Return the name of each layer's weight by the name of what the layer computes."""
        graph = self._flatbuffer.subgraphs[0]
        names = [tensor.name.decode() for tensor in graph.tensors]
        codes = self._flatbuffer.operatorCodes
        return {
            names[int(operator.outputs[0])]: names[int(operator.inputs[1])]
            for operator in graph.operators
            if codes[operator.opcodeIndex].builtinCode in _LAYERS
        }

    def as_onnx(self) -> onnx.ModelProto:
        """See `Source.as_onnx`."""
        return self._onnx

    def origins(self) -> Mapping[str, str]:
        """See `Source.origins`.

        The converter stores weights transposed, under names of its own: a sparse tensor is
        recognised by its values.
        """
        known = {_fingerprint(dense) for dense in self._sparse.values()}
        arrays = {
            tensor.name: onnx.numpy_helper.to_array(tensor)
            for tensor in self.as_onnx().graph.initializer
            if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) >= 2
        }
        return {n: SPARSE_TENSOR for n, array in arrays.items() if _fingerprint(array) in known}

    def reference(self, threads: int) -> ReferenceModel:
        """See `Source.reference`."""
        return TfliteReference(self.name, *self._names, threads)


class TfliteReference(ReferenceModel):
    """A model in TensorFlow Lite's interpreter."""

    engine = "TensorFlow Lite"

    def __init__(self, path: str, inputs: list[str], outputs: list[str], threads: int) -> None:
        tensorflow = require_tensorflow(path)
        self.version = tensorflow.__version__
        self.inputs, self.outputs = inputs, outputs
        with _no_warnings():
            self._interpreter = tensorflow.lite.Interpreter(model_path=path, num_threads=threads)
        self._slots = [d["index"] for d in self._interpreter.get_input_details()]
        self._results = [d["index"] for d in self._interpreter.get_output_details()]
        self._shapes: list[tuple[int, ...]] | None = None

    def run(
        self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """See `ReferenceModel.run`."""
        arrays = [inputs[name] for name in self.inputs]
        shapes = [array.shape for array in arrays]
        if shapes != self._shapes:
            for slot, shape in zip(self._slots, shapes, strict=True):
                self._interpreter.resize_tensor_input(slot, shape)
            self._interpreter.allocate_tensors()
            self._shapes = shapes
        for slot, array in zip(self._slots, arrays, strict=True):
            self._interpreter.set_tensor(slot, array)
        self._interpreter.invoke()
        found = dict(
            zip(self.outputs, map(self._interpreter.get_tensor, self._results), strict=True)
        )
        return {name: found[name] for name in (self.outputs if outputs is None else outputs)}


def _decode(tensor: Any, data: Any) -> np.ndarray:
    sparsity = tensor.sparsity
    dims: list[Any] = [
        int(dim.denseSize)
        if dim.format == _DENSE_DIMENSION
        else (
            np.asarray(dim.arraySegments.values, np.int64),
            np.asarray(dim.arrayIndices.values, np.int64),
        )
        for dim in sparsity.dimMetadata
    ]
    blocks = [] if sparsity.blockMap is None else [int(axis) for axis in sparsity.blockMap]
    values = np.frombuffer(bytes(data), _DTYPES[tensor.type])
    order = [int(axis) for axis in sparsity.traversalOrder]
    return decode_tflite(values, tuple(int(d) for d in tensor.shape), order, blocks, dims)


def _drop_densify(model: Any, graph: Any) -> None:
    """Let the users of a DENSIFY operator read its input, which is dense by now."""
    codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]
    replaced = {}
    kept = []
    for operator in graph.operators:
        if codes[operator.opcodeIndex] == _DENSIFY:
            replaced[int(operator.outputs[0])] = int(operator.inputs[0])
        else:
            kept.append(operator)
    for operator in kept:
        operator.inputs = [replaced.get(int(i), int(i)) for i in operator.inputs]
    graph.operators = kept


def _fingerprint(array: np.ndarray) -> tuple[int, int, float]:
    """Return what does not change when an array is transposed."""
    return array.size, int(np.count_nonzero(array)), float(np.sort(array, axis=None).sum())


@contextmanager
def _memory_file(data: bytes) -> Iterator[str]:
    """Yield the path of a file that is in memory only."""
    descriptor = os.memfd_create("model.tflite")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(data)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Keep the interpreter's announcement of its own deprecation from the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
