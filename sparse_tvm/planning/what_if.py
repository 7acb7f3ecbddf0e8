"""How fast a model, or a table of layers' shapes, would be if it were pruned: before it is."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sparse_tvm.errors import OptionError
from sparse_tvm.planning.planner import open_subject
from sparse_tvm.planning.prediction import Prediction, predict
from sparse_tvm.planning.settings import DENSE, TOKENS, Setting
from sparse_tvm.planning.subject import Kind, PlannedLayer
from sparse_tvm.targets import NATIVE

_COLUMNS = ("in", "out", "tokens", "count")
_LARGEST = 1 << 31
_MODEL_BYTES = 1 << 29
"""Of all weights of the model that stands for a table; a row has fewer layers in it beyond that."""

_OPSET = 17


@dataclass(frozen=True)
class ShapeRow:
    """Dense layers of one shape.

    Attributes
    ----------
    inputs, outputs : int
        Features.
    tokens : int
        How many they see at a time.
    count : int
        How many such layers there are.
    """

    inputs: int
    outputs: int
    tokens: int
    count: int = 1


@dataclass(frozen=True)
class WhatIfRow:
    """Layers of one kind, as they are and pruned.

    Attributes
    ----------
    name : str
        The first of them.
    shape : tuple[int, int]
        ``(N, K)``.
    count : int
        How many there are.
    dense_seconds, seconds : float
        Of all of them in a run.
    dense_bytes, nbytes : float
        Of their stored weights.
    format : str
        How the pruned weight is stored.
    """

    name: str
    shape: tuple[int, int]
    count: int
    dense_seconds: float
    seconds: float
    dense_bytes: float
    nbytes: float
    format: str


@dataclass(frozen=True)
class WhatIf:
    """How fast it would be.

    Attributes
    ----------
    setting : Setting
        How all layers would be pruned.
    basis : str
        Whether times are measured or predicted.
    threads : int
        How many run.
    rows : Sequence[WhatIfRow]
        The layers.
    rest_seconds, rest_bytes : float | None
        Of all that is no layer; None for a table of shapes.
    """

    setting: Setting
    basis: str
    threads: int
    rows: Sequence[WhatIfRow]
    rest_seconds: float | None = None
    rest_bytes: float | None = None

    @property
    def seconds(self) -> float:
        """Of a run, pruned."""
        return sum(row.seconds for row in self.rows) + (self.rest_seconds or 0.0)

    @property
    def dense_seconds(self) -> float:
        """Of a run, as it is."""
        return sum(row.dense_seconds for row in self.rows) + (self.rest_seconds or 0.0)

    @property
    def nbytes(self) -> float:
        """Of all weights, pruned."""
        return sum(row.nbytes for row in self.rows) + (self.rest_bytes or 0.0)

    @property
    def dense_bytes(self) -> float:
        """Of all weights, as they are."""
        return sum(row.dense_bytes for row in self.rows) + (self.rest_bytes or 0.0)


def what_if(
    model: Any,
    setting: Setting,
    *,
    target: str = NATIVE,
    precision: str | None = None,
    tokens: int = TOKENS,
    threads: int | None = None,
    input_shapes: Mapping[str, Sequence[Any]] | None = None,
    layers: str | None = None,
    exclude: str | None = None,
    records: Sequence[Any] = (),
    measure: bool | None = None,
    allow_pickle: bool = False,
    progress: Callable[[str], None] = lambda phase: None,
) -> WhatIf:
    """Say how fast a model, or a list of :class:`ShapeRow`, would be, pruned as ``setting`` says.

    Other parameters and errors are those of :func:`~sparse_tvm.planning.planner.plan`.
    """
    table = model if isinstance(model, list) else None
    progress("import")
    subject = open_subject(
        model if table is None else _table_model(table),
        target=target,
        precision=precision,
        tokens=tokens,
        threads=threads,
        input_shapes=input_shapes or {},
        layers=layers,
        exclude=exclude,
        records=records,
        allow_pickle=allow_pickle,
    )
    prediction = predict(
        subject,
        [setting.structure],
        threads=threads,
        measure=measure,
        records=records,
        progress=progress,
    )
    basis = "predicted" if prediction.cpu is None else "measured"
    if table is not None:
        rows = _table_rows(prediction, setting, table)
        return WhatIf(setting, basis, prediction.threads, rows)
    return WhatIf(
        setting,
        basis,
        prediction.threads,
        _model_rows(prediction, setting),
        prediction.rest_seconds,
        prediction.rest_bytes,
    )


def read_shapes(path: str | os.PathLike[str]) -> list[ShapeRow]:
    """Read a table of shapes: CSV with a header, or JSON, a list of objects.

    Columns are ``in``, ``out``, ``tokens``, and ``count``, which is 1 where it is missing.

    Raises
    ------
    OptionError
        When it cannot be read, or a row makes no sense; it names the row.
    """
    hint = 'such as a line "in,out,tokens,count", then "768,3072,128,12"'
    try:
        text = Path(path).read_text(encoding="utf-8")
        if Path(path).suffix == ".json":
            rows = json.loads(text)
        else:
            rows = list(csv.DictReader(text.splitlines(), strict=True))
    except OSError as error:
        raise OptionError(f"shapes {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, csv.Error, RecursionError) as error:
        raise OptionError(f"shapes {path} are neither CSV nor JSON", hint=hint) from error
    if not isinstance(rows, list) or not rows:
        raise OptionError(f"shapes {path} have no rows", hint=hint)
    return [_row(row, f"shapes {path}, row {number}", hint) for number, row in enumerate(rows, 1)]


def _row(row: Any, where: str, hint: str) -> ShapeRow:
    values = {"count": 1, **row} if isinstance(row, dict) else {}
    numbers = []
    for column in _COLUMNS:
        if column not in values:
            raise OptionError(f"{where} has no {column!r}", hint=hint)
        text = str(values[column]).strip()
        if not text.isascii() or not text.isdecimal() or not 0 < int(text[:12]) < _LARGEST:
            raise OptionError(f"{where}: {column} is {text!r}, not a number from 1", hint=hint)
        numbers.append(int(text))
    return ShapeRow(*numbers)


def _table_model(table: Sequence[ShapeRow]) -> onnx.ModelProto:
    """A model of these layers, side by side; of many alike, as many as memory allows."""
    rng = np.random.default_rng(0)
    nodes, weights, inputs, outputs = [], [], [], []
    for number, row in enumerate(table, 1):
        x, shape = f"x{number}", (row.inputs, row.outputs)
        inputs.append(helper.make_tensor_value_info(x, TensorProto.FLOAT, [row.tokens, row.inputs]))
        room = _MODEL_BYTES // len(table) // (4 * row.inputs * row.outputs)
        for copy in range(max(1, min(row.count, room))):
            name, y = _name(number, copy), f"y{number}.{copy}"
            w = rng.standard_normal(shape, np.float32) * np.float32(row.inputs**-0.5)
            weights.append(numpy_helper.from_array(w, f"{name}.weight"))
            nodes.append(helper.make_node("MatMul", [x, f"{name}.weight"], [y]))
            outputs.append(
                helper.make_tensor_value_info(y, TensorProto.FLOAT, [row.tokens, row.outputs])
            )
    graph = helper.make_graph(nodes, "the table", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", _OPSET)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def _model_rows(prediction: Prediction, setting: Setting) -> list[WhatIfRow]:
    """Layers that take the same time share a row."""
    groups: dict[tuple[Kind, ...], list[PlannedLayer]] = {}
    for layer in prediction.layers:
        groups.setdefault(layer.kinds, []).append(layer)
    return [_row_of(prediction, members[0], setting, len(members)) for members in groups.values()]


def _table_rows(
    prediction: Prediction, setting: Setting, table: Sequence[ShapeRow]
) -> list[WhatIfRow]:
    by_name = {layer.name: layer for layer in prediction.layers}
    return [
        _row_of(prediction, by_name[_name(number, 0)], setting, row.count)
        for number, row in enumerate(table, 1)
    ]


def _row_of(prediction: Prediction, layer: PlannedLayer, setting: Setting, count: int) -> WhatIfRow:
    costs = prediction.costs
    return WhatIfRow(
        layer.name,
        layer.ref.shape,
        count,
        count * costs.seconds(layer, DENSE),
        count * costs.seconds(layer, setting),
        count * costs.nbytes(layer, DENSE),
        count * costs.nbytes(layer, setting),
        costs.choice(layer.kinds[0], setting).layout.format,
    )


def _name(row: int, copy: int) -> str:
    return f"row{row}.{copy}"
