"""LSTM, GRU and RNN: calls of a function by the operator's name, which a pass takes apart.

Relax has no such operators. ``R.call_dps_packed("onnx.LSTM", (x, w, r, ..., attributes))`` has the
operator's inputs as far as they are given, and its attributes as JSON, with ``inputs`` to tell
which inputs these are. It returns all outputs, wanted or not.
"""

from __future__ import annotations

import json
from typing import Any

import tvm
from tvm import relax

from sparse_tvm.frontends.importer.forms import NotInForm
from sparse_tvm.frontends.importer.rules import Node, rule
from sparse_tvm.frontends.importer.tensors import Tensor

_INPUTS = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")
_ACTIVATIONS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}
_COMPUTED = ("Sigmoid", "Tanh", "Relu")


@rule("LSTM", "GRU", "RNN")
def _recurrent(node: Node) -> Any:
    if node.form is not Tensor:
        raise NotInForm
    if node.dtype(0) != "float32":
        raise ValueError(f"it is of {node.dtype(0)}")
    directions, _, hidden = node.shape(2)
    attributes = _attributes(node, directions)
    given = [name for position, name in enumerate(_INPUTS) if node.has(position)]
    attributes["inputs"] = given
    batch_first = attributes["layout"] == 1
    steps, batch = node.shape(0)[:2][:: -1 if batch_first else 1]
    for position in (5, 6):  # the first states
        if node.has(position):
            node.scope.demand_same(batch, node.shape(position)[0 if batch_first else 1])
    state = (batch, directions, hidden) if batch_first else (directions, batch, hidden)
    every = (batch, steps, *state[1:]) if batch_first else (steps, directions, batch, hidden)
    shapes = [every, state, state][: 3 if node.op == "LSTM" else 2]
    text = tvm.ir.StringImm(json.dumps(attributes, sort_keys=True))
    operands = [tensor for tensor in node.tensors() if tensor is not None]
    return node.emit(
        relax.call_dps_packed(
            f"onnx.{node.op}",
            relax.Tuple([*operands, text]),
            [relax.TensorType(shape, node.dtype(0)) for shape in shapes],
        )
    )


def _attributes(node: Node, directions: int) -> dict[str, Any]:
    """The operator's attributes, defaults spelled out.

    Raises
    ------
    ValueError
        When they ask for what is not computed.
    """
    given = node.attributes
    if given.get("input_forget", 0):
        raise ValueError("input_forget couples its gates")
    activations = given.get("activations") or _ACTIVATIONS[node.op] * directions
    names = [_text(name).capitalize() for name in activations]
    unknown = [name for name in names if name not in _COMPUTED]
    if unknown:
        raise ValueError(f"its activation {unknown[0]} is none of {', '.join(_COMPUTED)}")
    return {
        "activations": names,
        "clip": given.get("clip"),
        "direction": _text(given.get("direction", "forward")),
        "layout": given.get("layout", 0),
        "linear_before_reset": given.get("linear_before_reset", 0),
    }


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
