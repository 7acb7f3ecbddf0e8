"""TVM's ONNX importer. Its parts are private and change monthly: only this file touches them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Sequence
from typing import Any

import onnx
from tvm import relax
from tvm.relax.frontend.onnx import onnx_frontend

OPERATORS = frozenset(onnx_frontend._get_convert_map()) - {"Attention"}
"""What TVM can import. Its Attention is ONNX Runtime's operator, not the standard's."""


class TvmConverter:
    """TVM's conversion of single nodes.

    Parameters
    ----------
    builder : relax.BlockBuilder
        Of the function that they are in.
    opset : int
        The version of the operator set.
    """

    def __init__(self, builder: relax.BlockBuilder, opset: int) -> None:
        self._importer = onnx_frontend.ONNXGraphImporter({}, "float32", sanitize=False)
        self._importer.bb = builder
        self._importer.opset = opset

    def attributes(self, node: onnx.NodeProto) -> dict[str, Any]:
        """Return a node's attributes by name."""
        parsed: dict[str, Any] = self._importer._parse_attr(node.attribute)
        empty = {a.name: () for a in node.attribute if a.name not in parsed}
        return {**parsed, **empty}

    def convert(
        self,
        operator: str,
        inputs: Sequence[relax.Expr | None],
        attributes: dict[str, Any],
        outputs: int,
    ) -> relax.Expr:
        """Convert a node; several outputs come as a tuple."""
        custom = {"name": operator, "num_outputs": outputs}
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the operator that failed
            return self._importer._convert_operator(
                operator,
                onnx_frontend.onnx_input(inputs),
                {**attributes, "tvm_custom": custom},
                self._importer.opset,
            )


def input_variables(values: Iterable[onnx.ValueInfoProto]) -> list[relax.Var]:
    """Return a graph's inputs as variables; equal names of dimensions are one symbol."""
    symbols: dict[str, Any] = {}
    variables = []
    for value in values:
        name, shape, dtype, _, symbols = onnx_frontend.get_info(value, symbols)
        variables.append(relax.Var(name, relax.TensorType(shape, dtype)))
    return variables


def abandon(builder: relax.BlockBuilder) -> None:
    """Close the block that an error has left open, or TVM prints that it is."""
    with contextlib.suppress(Exception):
        builder._end_block()
