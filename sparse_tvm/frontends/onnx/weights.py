"""Find the weights of an ONNX model's layers, read and replace them.

Every other part of the package names layers as :func:`find_weights` does, and sees a weight
in one canonical form: a matrix of ``N`` output features by ``K`` input features.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count

import numpy as np
import onnx

from sparse_tvm.frontends.onnx.detach import stored_tensors

# Names that exporters and simplifiers make up: they say nothing about the layer.
_GENERATED = re.compile(
    r"""^(?:
        onnx::.*                                            # torch.onnx, TorchScript based
      | (?:val|v|t|tmp|tensor|const|constant|node)?_?\d+    # torch.onnx, dynamo based; ONNX IR
      | _*const_fold_opt_+\d+                               # tf2onnx
      | _frozen_param\d+                                    # PyTorch's pt2e
      | .*(?:Constant|Transpose|Identity|Cast)(?:_\d+)?_output_\d+
    )$""",
    re.VERBOSE | re.IGNORECASE,
)

RECURRENT = ("LSTM", "GRU", "RNN")
"""Operators with one weight for the input, and one for the steps."""

_PASS_THROUGH = ("Identity", "Transpose")  # operators between a weight and the layer it is of


@dataclass(frozen=True)
class WeightRef:
    """Where one layer's weight is stored, and how to read it as an ``[N, K]`` matrix.

    Attributes
    ----------
    layer : str
        Unique name shown to users, and matched by their regular expressions.
    initializer : str
        Name of the tensor in ``graph.initializer``, or of a Constant node's output.
    op : str
        ``"MatMul"``, ``"Gemm"``, ``"Conv"``, ``"LSTM"``, ``"GRU"`` or ``"RNN"``.
    nodes : tuple[str, ...]
        Names of the nodes that multiply by it (several when weights are tied); an unnamed node
        goes by its first output.
    transposed : bool
        True when stored ``[K, N]``; False when stored ``[N, K]``, ``[N, K/(kh*kw), kh, kw]``, or
        by directions, ``[directions, N/directions, K]``.
    shape : tuple[int, int]
        Canonical ``(N, K)``: output features, input features.
    """

    layer: str
    initializer: str
    op: str
    nodes: tuple[str, ...]
    transposed: bool
    shape: tuple[int, int]


@dataclass(frozen=True)
class _Use:
    """One node's use of a tensor as its weight; ``role`` tells it from the node's other weight."""

    tensor: onnx.TensorProto
    name: str
    transposed: bool
    role: str = ""


def find_weights(model: onnx.ModelProto) -> list[WeightRef]:
    """List the float32 weights of dense, convolution and recurrent nodes, in order of use.

    A weight may reach its node through Identity and Transpose nodes. Only dimensions and types
    are read, so external data need not be loaded. A weight that several nodes use is listed
    once, in the orientation of its first use; tensors of other types are left out.

    Parameters
    ----------
    model : onnx.ModelProto
        The model; only its main graph is searched.

    Returns
    -------
    list[WeightRef]
        One entry per stored weight, with unique layer names.
    """
    tensors = dict(stored_tensors(model.graph))
    producers = {output: node for node in model.graph.node for output in node.output}
    refs: dict[str, WeightRef] = {}
    taken: set[str] = set()
    for index, node in enumerate(model.graph.node):
        user = _node_name(node)
        for use in _weights_of(node, tensors, producers):
            if use.name in refs:
                known = refs[use.name]
                refs[use.name] = replace(known, nodes=(*known.nodes, user))
                continue
            layer = _unique(_layer_name(use, node, index), taken)
            shape = _canonical_shape(use)
            ref = WeightRef(layer, use.name, node.op_type, (user,), use.transposed, shape)
            refs[use.name] = ref
    return list(refs.values())


def canonical(ref: WeightRef, array: np.ndarray) -> np.ndarray:
    """Return a stored weight as its C-contiguous ``[N, K]`` matrix; a view when possible."""
    matrix = array.T if ref.transposed else array.reshape(ref.shape)
    return np.ascontiguousarray(matrix)


def stored(ref: WeightRef, matrix: np.ndarray, dims: tuple[int, ...]) -> np.ndarray:
    """Return an ``[N, K]`` matrix in the layout ``dims`` it is stored in; undo `canonical`."""
    return np.ascontiguousarray(matrix.T if ref.transposed else matrix).reshape(dims)


def replace_data(tensor: onnx.TensorProto, array: np.ndarray) -> None:
    """Store `array`, float32 of the tensor's shape, however the values were stored before."""
    del tensor.external_data[:]
    del tensor.float_data[:]
    tensor.data_location = onnx.TensorProto.DEFAULT
    tensor.raw_data = array.astype("<f4", copy=False).tobytes()


def other_users(model: onnx.ModelProto, refs: Iterable[WeightRef]) -> dict[str, list[str]]:
    """Name what else uses the weights, by layer: the Gather of a tied embedding, for example."""
    consumers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    return {
        ref.layer: [
            f"{node.op_type} {_node_name(node)}"
            for node in _users(ref.initializer, consumers)
            if _node_name(node) not in ref.nodes
        ]
        for ref in refs
    }


def _users(
    name: str, consumers: Mapping[str, Sequence[onnx.NodeProto]]
) -> Iterator[onnx.NodeProto]:
    """Yield the nodes that use a tensor, also through Identity and Transpose."""
    for node in consumers.get(name, ()):
        if node.op_type in _PASS_THROUGH:
            yield from _users(node.output[0], consumers)
        else:
            yield node


def _weights_of(
    node: onnx.NodeProto,
    tensors: dict[str, onnx.TensorProto],
    producers: dict[str, onnx.NodeProto],
) -> list[_Use]:
    """Return the stored float32 tensors that a layer multiplies by."""
    if node.domain not in ("", "ai.onnx"):
        return []
    if node.op_type in RECURRENT:
        roles = zip(("input", "recurrent"), node.input[1:3], strict=True)
        found = [
            replace(use, role=role)
            for role, name in roles
            if (use := _trace(name, tensors, producers)) is not None
        ]
        return [use for use in found if _is_weight(use, (3,))]
    use = _weight_of(node, tensors, producers)
    return [] if use is None else [use]


def _weight_of(
    node: onnx.NodeProto,
    tensors: dict[str, onnx.TensorProto],
    producers: dict[str, onnx.NodeProto],
) -> _Use | None:
    """Return the stored float32 tensor that a layer multiplies its input by, if any."""
    if node.op_type not in ("MatMul", "Gemm", "Conv"):
        return None
    left, right = (_trace(name, tensors, producers) for name in node.input[:2])
    if left is not None and right is not None:
        return None  # a constant, not a layer
    if node.op_type == "Conv":
        return right if right is not None and _is_weight(right, (3, 4, 5)) else None
    if right is not None and _is_weight(right, (2,)):
        stored_kn = not (node.op_type == "Gemm" and _attribute(node, "transB"))
        return _Use(right.tensor, right.name, right.transposed ^ stored_kn)
    if node.op_type == "MatMul" and left is not None and _is_weight(left, (2,)):
        return left
    return None


def _trace(
    name: str, tensors: dict[str, onnx.TensorProto], producers: dict[str, onnx.NodeProto]
) -> _Use | None:
    """Follow Identity and 2-D Transpose nodes back to a stored tensor."""
    transposes = 0
    while name not in tensors:
        node = producers.get(name)
        if node is None or node.op_type not in _PASS_THROUGH:
            return None
        transposes += node.op_type == "Transpose" and _attribute(node, "perm") != [0, 1]
        name = node.input[0]
    if transposes and len(tensors[name].dims) != 2:
        return None
    return _Use(tensors[name], name, transposes % 2 == 1)


def _is_weight(use: _Use, ranks: tuple[int, ...]) -> bool:
    return use.tensor.data_type == onnx.TensorProto.FLOAT and len(use.tensor.dims) in ranks


def _node_name(node: onnx.NodeProto) -> str:
    return node.name or node.output[0]


def _attribute(node: onnx.NodeProto, name: str) -> object:
    values = (onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name)
    return next(values, None)


def _canonical_shape(use: _Use) -> tuple[int, int]:
    if use.role:  # by directions
        directions, rows, columns = use.tensor.dims
        return directions * rows, columns
    rows, columns = use.tensor.dims[0], int(np.prod(use.tensor.dims[1:]))
    return (columns, rows) if use.transposed else (rows, columns)


def _layer_name(use: _Use, node: onnx.NodeProto, index: int) -> str:
    name = use.name.removesuffix(".weight")
    if name and not _GENERATED.match(name):
        return name
    return (node.name or f"{node.op_type}_{index}") + (f".{use.role}" if use.role else "")


def _unique(name: str, taken: set[str]) -> str:
    numbered = (f"{name}_{number}" for number in count(2))
    chosen = next(candidate for candidate in chain([name], numbered) if candidate not in taken)
    taken.add(chosen)
    return chosen
