"""Refuse, before any library works on it, a model that no machine could hold or unfold."""

from __future__ import annotations

import math
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from pathlib import Path

import onnx
from google.protobuf.message import Message
from onnx import shape_inference

from sparse_tvm.errors import ModelError
from sparse_tvm.frontends.onnx.detach import size_of, stored_tensors

MAX_ELEMENTS = 1 << 30
"""Elements of one tensor: 4 GiB of float32."""

MAX_DECODED = 1 << 28
"""Elements of a tensor that is stored sparse, as a few bytes, and will be dense: 1 GiB."""

MAX_NODES = 1 << 20
"""Nodes of a model whose functions are inlined."""

FOLDING_MEMORY = 8 << 30
"""Bytes that an import may take beyond weights."""

_WEIGHT_COPIES = 4

_FunctionKey = tuple[str, str, str]


def check_graph(model: onnx.ModelProto, where: str) -> None:
    """Refuse nodes that compute nothing, tensors of impossible shapes, and runaway functions.

    Parameters
    ----------
    model : onnx.ModelProto
        As parsed: nothing about it is known to be right.
    where : str
        What messages call it.

    Raises
    ------
    ModelError
        When what comes after this could fail, or need more than any machine has.
    """
    if not _names_are_text(model):
        raise ModelError(f"{where}: damaged: a name in it is not UTF-8")
    bodies = {_key(function): function.node for function in model.functions}
    for nodes in (model.graph.node, *bodies.values()):
        for node in _all_nodes(nodes):
            if not node.output:
                raise ModelError(f"{where}: node {node.name or node.op_type!r} has no output")
    for tensor in _tensors(model.graph):
        if isinstance(tensor, onnx.SparseTensorProto):
            what = f"{where}: sparse initializer {tensor.values.name!r}"
            _check_dims(tensor.dims, MAX_DECODED, what)
        else:
            _check_dims(tensor.dims, MAX_ELEMENTS, f"{where}: initializer {tensor.name!r}")
    _check_functions(model.graph.node, bodies, where)


def check_sizes(model: onnx.ModelProto) -> None:
    """Refuse a graph that computes a tensor of more than `MAX_ELEMENTS`, or as much of constants.

    Constants are computed when a model is compiled, all others whenever it runs.

    Raises
    ------
    ModelError
        With the node that is too much.
    """
    graph = shape_inference.infer_shapes(model).graph
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim if dim.dim_value > 0]
        for value in chain(graph.input, graph.value_info, graph.output)
    }
    constants = {tensor.name for tensor in graph.initializer} | {""}
    folded = 0
    for node in graph.node:
        what = f"node {node.name or node.output[0]} ({node.op_type})"
        for name in node.output:
            _check_dims(shapes.get(name, ()), MAX_ELEMENTS, f"the output of {what}")
        if constants.issuperset(node.input):
            constants.update(node.output)
            folded += sum(math.prod(shapes[name]) for name in node.output if name in shapes)
        if folded > MAX_ELEMENTS:
            raise ModelError(
                f"constants of more than {MAX_ELEMENTS} elements are computed up to {what}"
            )


def check_links(directory: Path) -> None:
    """Refuse a model's folder with links out of it: they could bring in any file of this machine.

    Raises
    ------
    ModelError
        With the first such link.
    """
    for path in directory.rglob("*"):
        if path.is_symlink() and not lies_inside(path, directory):
            raise ModelError(
                f"{path}: is a link to {path.resolve()}, outside of the model's folder",
                hint="copy the file into the folder",
            )


def lies_inside(path: Path, directory: Path) -> bool:
    """Whether a file lies in a directory when all links are followed.

    The Hugging Face hub's cache counts as one: ``snapshots/REVISION`` links to its ``blobs``.
    """
    real, home = path.resolve(), directory.resolve()
    is_snapshot = home.parent.name == "snapshots"
    blobs = home.parent.parent / "blobs"
    return real.is_relative_to(home) or (is_snapshot and real.is_relative_to(blobs))


@contextmanager
def bounded_memory(model: onnx.ModelProto) -> Iterator[None]:
    """Let the block allocate so much that it fails before the machine does.

    A backstop: sizes that only folding reveals are not known before it.

    Parameters
    ----------
    model : onnx.ModelProto
        What is imported: a few copies of its weights are in order.

    Raises
    ------
    ModelError
        When the block runs out of memory.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    weights = sum(4 * size_of(tensor) for _, tensor in stored_tensors(model.graph))
    limit = _mapped_bytes() + _WEIGHT_COPIES * weights + FOLDING_MEMORY
    if not any(known != resource.RLIM_INFINITY and known <= limit for known in (soft, hard)):
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    except MemoryError as error:
        raise ModelError("its constants take more memory than an import may use") from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _mapped_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _names_are_text(message: Message) -> bool:
    """Whether all names are UTF-8; protobuf hands out others as bytes, and onnx fails on them."""
    for field, value in message.ListFields():
        values = [value] if isinstance(value, Message | str | bytes) else value
        if field.message_type is not None:
            if not all(map(_names_are_text, values)):
                return False
        elif field.type == field.TYPE_STRING and not all(isinstance(v, str) for v in values):
            return False
    return True


def _tensors(
    graph: onnx.GraphProto,
) -> Iterator[onnx.TensorProto | onnx.SparseTensorProto]:
    yield from graph.initializer
    yield from graph.sparse_initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            if attribute.HasField("sparse_tensor"):
                yield attribute.sparse_tensor


def _check_dims(dims: Sequence[int], most: int, what: str) -> None:
    if any(size < 0 for size in dims):
        raise ModelError(f"{what} has the negative dimension {min(dims)}")
    if math.prod(dims) > most:
        raise ModelError(f"{what} has {_times(dims)} elements; {most} is the most")


def _times(dims: Sequence[int]) -> str:
    return " x ".join(map(str, dims))


def _check_functions(
    nodes: Sequence[onnx.NodeProto],
    bodies: dict[_FunctionKey, Sequence[onnx.NodeProto]],
    where: str,
) -> None:
    """Refuse functions that call themselves, or unfold into too many nodes."""
    calls = {
        key: [called for node in _all_nodes(body) if (called := _called(node)) in bodies]
        for key, body in bodies.items()
    }
    try:
        order = list(TopologicalSorter(calls).static_order())
    except CycleError as error:
        names = " -> ".join(key[1] for key in error.args[1])
        raise ModelError(f"{where}: function {names} calls itself") from None
    sizes: dict[_FunctionKey, int] = {}
    for key in order:
        sizes[key] = sum(sizes.get(_called(node), 1) for node in _all_nodes(bodies[key]))
    total = sum(sizes.get(_called(node), 1) for node in _all_nodes(nodes))
    if total > MAX_NODES:
        raise ModelError(
            f"{where}: its functions unfold into {total} nodes; {MAX_NODES} is the most"
        )


def _all_nodes(nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Yield the nodes and those of their subgraphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _all_nodes(graph.node)


def _key(function: onnx.FunctionProto) -> _FunctionKey:
    return function.domain, function.name, function.overload


def _called(node: onnx.NodeProto) -> _FunctionKey:
    return node.domain, node.op_type, node.overload
