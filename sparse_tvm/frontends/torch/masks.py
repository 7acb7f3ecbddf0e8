"""Fold masks into the weights they prune: ``weight = original * mask`` becomes one initializer."""

from __future__ import annotations

import re

import onnx
from onnx import numpy_helper

from sparse_tvm.frontends.onnx.detach import as_array
from sparse_tvm.frontends.onnx.prune_outputs import drop_unread

PRUNE_MASK = "torch.nn.utils.prune mask"
PARAMETRISED_MASK = "parametrised mask"

_SPELLINGS = (
    (re.compile(r"^(.*)_orig$"), PRUNE_MASK),
    (re.compile(r"^(.*\.)?parametrizations\.(\w+)\.original$"), PARAMETRISED_MASK),
)
_PASS_THROUGH = ("Cast", "CastLike", "Identity")


def fold_masks(model: onnx.ModelProto) -> dict[str, str]:
    """Multiply weights by their masks, in place.

    Parameters
    ----------
    model : onnx.ModelProto
        As exported: masks and original weights are initializers.

    Returns
    -------
    dict[str, str]
        Where the zeros came from, by the new initializers' names, which are those that the
        weights have without pruning.
    """
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    origins: dict[str, str] = {}
    renamed: dict[str, str] = {}
    for node in graph.node:
        if node.op_type != "Mul":
            continue
        left, right = (_stored(name, tensors, producers) for name in node.input)
        if left is None or right is None or list(left.dims) != list(right.dims):
            continue
        for weight, mask in ((left, right), (right, left)):
            named = _plain_name(weight.name)
            if named is None:
                continue
            name, origin = named
            values = as_array(weight) * as_array(mask).astype("float32", copy=False)
            graph.initializer.append(numpy_helper.from_array(values, name))
            origins[name] = origin
            renamed[node.output[0]] = name
            break
    if renamed:
        _rename(graph, renamed)
        drop_unread(graph)
    return origins


def _stored(
    name: str, tensors: dict[str, onnx.TensorProto], producers: dict[str, onnx.NodeProto]
) -> onnx.TensorProto | None:
    while name not in tensors:
        node = producers.get(name)
        if node is None or node.op_type not in _PASS_THROUGH:
            return None
        name = node.input[0]
    return tensors[name]


def _plain_name(name: str) -> tuple[str, str] | None:
    """Return the name that a weight has without its mask, and what masks it."""
    for pattern, origin in _SPELLINGS:
        if match := pattern.match(name):
            return "".join(part or "" for part in match.groups()), origin
    return None


def _rename(graph: onnx.GraphProto, renamed: dict[str, str]) -> None:
    kept = [node for node in graph.node if node.output[0] not in renamed]
    del graph.node[:]
    graph.node.extend(kept)
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
