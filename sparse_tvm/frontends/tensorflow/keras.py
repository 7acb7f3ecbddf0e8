"""Keras 3 as a source: a ``.keras`` file, or a model in memory, on the TensorFlow backend."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx

from sparse_tvm.errors import ModelError
from sparse_tvm.frontends.onnx.read import one_line
from sparse_tvm.frontends.source import Source, SourceOptions, require
from sparse_tvm.frontends.tensorflow.saved_model import (
    TensorFlowReference,
    convert_function,
    require_tensorflow,
)
from sparse_tvm.frontends.torch.export import quiet
from sparse_tvm.reference import ReferenceModel


class KerasSource(Source):
    """A Keras 3 model with fixed inputs and outputs."""

    kind = "Keras model"

    def __init__(self, path: Path, options: SourceOptions) -> None:
        super().__init__(str(path), path)
        self._allow_pickle = options.allow_pickle
        self._model: Any = None

    @classmethod
    def from_model(cls, model: Any) -> KerasSource:
        """Open a model in memory."""
        source = cls.__new__(cls)
        Source.__init__(source, model.name)
        source._allow_pickle = False
        source._model = model
        return source

    @cached_property
    def model(self) -> Any:
        """The ``keras.Model``."""
        require_tensorflow(self.name)
        keras = require("keras", "tensorflow", self.name)
        if keras.backend.backend() != "tensorflow":
            raise ModelError(
                f"{self.name}: Keras runs on {keras.backend.backend()} here",
                hint="set KERAS_BACKEND=tensorflow",
            )
        model = self._model or self._load(keras)
        if not getattr(model, "inputs", None):
            raise ModelError(
                f"{self.name}: the Keras model has no defined inputs",
                hint="call it once before saving it, or build it with the functional API",
            )
        return model

    def _load(self, keras: Any) -> Any:
        try:
            with quiet():
                return keras.saving.load_model(
                    self.name, compile=False, safe_mode=not self._allow_pickle
                )
        except Exception as error:
            unsafe = "lambda" in str(error).lower() or "safe_mode" in str(error)
            raise ModelError(
                f"{self.name}: Keras {keras.__version__} "
                + ("does not load pickled Python code" if unsafe else "cannot load it")
                + f": {one_line(error, 160)}",
                hint="--allow-pickle (allow_pickle=True) runs it: only if you trust its author"
                if unsafe
                else None,
            ) from error

    @cached_property
    def _onnx(self) -> onnx.ModelProto:
        model = self.model
        import tensorflow

        specs = [
            tensorflow.TensorSpec(tensor.shape, tensor.dtype, name=tensor.name)
            for tensor in model.inputs
        ]
        return convert_function(
            lambda *tensors: self._call(dict(zip(self._inputs, tensors, strict=True))),
            specs,
            sorted(self._outputs),
            self.name,
        )

    @property
    def _inputs(self) -> list[str]:
        return [tensor.name for tensor in self.model.inputs]

    @property
    def _outputs(self) -> list[str]:
        """Names of the outputs, in the order that Keras flattens them."""
        import keras

        if isinstance(self.model, keras.Sequential):  # it has no ``output`` before it was called
            return [self.model.layers[-1].name]
        outputs = self.model.output
        return sorted(outputs) if isinstance(outputs, dict) else list(self.model.output_names)

    def _call(self, inputs: dict[str, Any]) -> dict[str, Any]:
        import keras

        tensors = [inputs[name] for name in self._inputs]
        outputs = self.model(tensors[0] if len(tensors) == 1 else tensors, training=False)
        flat = keras.tree.flatten(outputs)
        return dict(zip(self._outputs, flat, strict=True))

    def as_onnx(self) -> onnx.ModelProto:
        """See `Source.as_onnx`."""
        return self._onnx

    def reference(self, threads: int) -> ReferenceModel:
        """See `Source.reference`."""
        import tensorflow

        compiled = tensorflow.function(self._call)

        def call(inputs: dict[str, Any]) -> Mapping[str, Any]:
            outputs: Mapping[str, Any] = compiled(inputs)
            return outputs

        return TensorFlowReference(self._inputs, self._outputs, call, threads)
