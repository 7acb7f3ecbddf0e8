"""An ONNX file, or a model in memory; sparse initializers stay sparse on disk."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import numpy_helper

from sparse_tvm.errors import ModelError
from sparse_tvm.frontends.guard import check_graph
from sparse_tvm.frontends.onnx.external_data import load_external_data
from sparse_tvm.frontends.onnx.read import one_line, parse_onnx
from sparse_tvm.frontends.onnx.widen import half_types
from sparse_tvm.frontends.source import Source
from sparse_tvm.reference import Reference

if TYPE_CHECKING:
    from sparse_tvm.frontends.importer.model import ImportedModel
    from sparse_tvm.frontends.input_shapes import InputShapes

SPARSE_INITIALIZER = "ONNX sparse initializer"

_GRAPH_FIELD = 7  # of ModelProto
_SPARSE_FIELD = 15  # of GraphProto


class OnnxSource(Source):
    """An ONNX model."""

    kind = "ONNX model"

    def __init__(self, model: Path | onnx.ModelProto) -> None:
        if isinstance(model, Path):
            super().__init__(str(model), model)
        else:
            super().__init__(model.graph.name or "the model")
        self._model = model
        self._half_types: list[str] | None = None

    def load(self, input_shapes: InputShapes | None = None) -> ImportedModel:
        """See `Source.load`."""
        imported = super().load(input_shapes)
        self._half_types = imported.widened
        return imported

    def as_onnx(self) -> onnx.ModelProto | Path:
        """See `Source.as_onnx`: the file, unless it holds sparse initializers."""
        return self._decoded[0]

    def origins(self) -> Mapping[str, str]:
        """See `Source.origins`."""
        return self._decoded[1]

    @cached_property
    def _decoded(self) -> tuple[onnx.ModelProto | Path, dict[str, str]]:
        if isinstance(self._model, Path):
            if not has_sparse_initializers(self._model):
                return self._model, {}
            model = parse_onnx(self._model)
            load_external_data(model, self._model)
            model.graph.name = self.name
        else:
            if not self._model.graph.sparse_initializer:
                return self._model, {}
            check_graph(self._model, self.name)
            model = onnx.ModelProto()
            model.CopyFrom(self._model)
        return model, decode_sparse_initializers(model)

    def reference(self, threads: int) -> Reference:
        """Return the model in ONNX Runtime."""
        model = self._model
        if self._half_types is None:
            self._half_types = half_types(parse_onnx(model) if isinstance(model, Path) else model)
        source = model if isinstance(model, Path) else model.SerializeToString()
        return Reference(source, threads=threads, widened="bfloat16" in self._half_types)


def decode_sparse_initializers(model: onnx.ModelProto) -> dict[str, str]:
    """Replace sparse initializers by dense ones, in place and in memory.

    Returns
    -------
    dict[str, str]
        Where the zeros came from, by initializer.

    Raises
    ------
    ModelError
        When indices and values do not fit the shape.
    """
    origins = {}
    for sparse in model.graph.sparse_initializer:
        name = sparse.values.name
        try:
            values = numpy_helper.to_array(sparse.values)
            indices = numpy_helper.to_array(sparse.indices)
            if indices.min(initial=0) < 0:
                raise ValueError(f"index {indices.min()} is negative")
            dense = np.zeros(tuple(sparse.dims), values.dtype)
            if indices.ndim == 1:
                dense.ravel()[indices] = values
            else:
                dense[tuple(indices.T)] = values
        except (IndexError, TypeError, ValueError) as error:
            raise ModelError(
                f"sparse initializer {name} does not fit its shape: {one_line(error)}"
            ) from None
        model.graph.initializer.append(numpy_helper.from_array(dense, name))
        origins[name] = SPARSE_INITIALIZER
    del model.graph.sparse_initializer[:]
    return origins


def has_sparse_initializers(path: Path) -> bool:
    """Look for sparse initializers in an ONNX file without parsing its weights."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return any(
                field == _SPARSE_FIELD
                for graph, start, end in _fields(data, 0, len(data))
                if graph == _GRAPH_FIELD
                for field, _, _ in _fields(data, start, end)
            )
    except (OSError, ValueError, IndexError):
        return False  # the reader says what is wrong with the file


def _fields(data: mmap.mmap, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, start and end of a protobuf message's fields."""
    while position < end:
        tag, position = _varint(data, position)
        start = position
        match tag & 7:
            case 0:
                _, position = _varint(data, position)
            case 1:
                position += 8
            case 2:
                size, start = _varint(data, position)
                position = start + size
            case 5:
                position += 4
            case _:
                raise ValueError("not a protobuf message")
        yield tag >> 3, start, min(position, end)


def _varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
