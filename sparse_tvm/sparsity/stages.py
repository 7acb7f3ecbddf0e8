"""A model run piece by piece on calibration data, so that no part of it runs twice.

Pruning one layer after the other needs each layer's inputs as the already pruned layers before it
make them. `StagedModel` runs in ONNX Runtime what lies between one layer's input and the next, and
keeps on disk only the tensors that what follows needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from sparse_tvm.errors import ModelError
from sparse_tvm.frontends.onnx.detach import as_array
from sparse_tvm.frontends.onnx.in_memory import find_array
from sparse_tvm.reference import Reference


class StagedModel:
    """A model between two of its tensors.

    Parameters
    ----------
    model : onnx.ModelProto
        Read anew at each stage: weights that were replaced meanwhile count.
    batches : sequence
        Arrays by input name, for each batch.
    targets : iterable of str
        All tensors that will be asked for.
    directory : Path
        Where to keep tensors between stages.
    threads : int
        Of ONNX Runtime.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        batches: Sequence[Mapping[str, np.ndarray]],
        targets: Iterable[str],
        directory: Path,
        threads: int,
    ) -> None:
        self._model = model
        self._batches = len(batches)
        self._directory = directory
        self._threads = threads
        self._numbers: dict[str, int] = {}
        self._fixed = _fixed_tensors(model.graph)
        self._waiting = _ancestors(model.graph.node, set(targets))
        self._targets = set(targets)
        directory.mkdir(parents=True, exist_ok=True)
        for index, batch in enumerate(batches):
            for name, array in batch.items():
                self._store(name, index, array)

    def advance(self, tensor: str) -> None:
        """Run the model up to a tensor, which `read` gives from then on."""
        if tensor in self._numbers:
            return
        stored = set(self._numbers)
        wanted = _ancestors(self._waiting, {tensor}, stored)
        done = {output for node in wanted for output in node.output} - self._fixed
        self._waiting = [node for node in self._waiting if not done.intersection(node.output)]
        needed = {name for node in self._waiting for name in reads(node)} | self._targets
        outputs = sorted(done & needed)
        inputs = sorted({name for node in wanted for name in reads(node)} & stored)
        session: Reference | None = None
        for index in range(self._batches):
            feed = {name: self._load(name, index) for name in inputs}
            if session is None:
                piece = _piece(self._model, wanted, feed, outputs)
                session = Reference(piece, threads=self._threads)
            for name, array in session.run(feed, outputs).items():
                if not isinstance(array, np.ndarray):
                    raise ModelError(f"{name} is no tensor: layers behind it cannot be calibrated")
                self._store(name, index, array)

    def read(self, tensor: str) -> Iterator[np.ndarray]:
        """Yield a tensor, batch by batch."""
        for index in range(self._batches):
            yield self._load(tensor, index)

    def forget(self, tensor: str) -> None:
        """Tell that a target will not be read again, and remove what nothing needs any more."""
        self._targets.discard(tensor)
        needed = {name for node in self._waiting for name in reads(node)} | self._targets
        for name in set(self._numbers) - needed:
            for index in range(self._batches):
                self._path(name, index).unlink()
            del self._numbers[name]

    def _path(self, name: str, batch: int) -> Path:
        return self._directory / f"{self._numbers[name]}.{batch}.npy"

    def _store(self, name: str, batch: int, array: np.ndarray) -> None:
        self._numbers.setdefault(name, 1 + max(self._numbers.values(), default=-1))
        np.save(self._path(name, batch), array, allow_pickle=False)

    def _load(self, name: str, batch: int) -> np.ndarray:
        array: np.ndarray = np.load(self._path(name, batch), allow_pickle=False)
        return array


def reads(node: onnx.NodeProto) -> set[str]:
    """Return the tensors that a node reads, those of its subgraphs included."""
    found = {name for name in node.input if name}
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                found |= reads(inner)
    return found


def _fixed_tensors(graph: onnx.GraphProto) -> set[str]:
    """Return the tensors that do not depend on the model's inputs."""
    fixed = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if reads(node) <= fixed:
            fixed.update(node.output)
    return fixed


def _ancestors(
    nodes: Iterable[onnx.NodeProto], tensors: set[str], given: Iterable[str] = ()
) -> list[onnx.NodeProto]:
    """Return the nodes, in order, that tensors need, where others are given."""
    needed = tensors - set(given)
    found = []
    for node in reversed(list(nodes)):
        if needed.intersection(node.output):
            found.append(node)
            needed |= reads(node) - set(given)
    return found[::-1]


def _piece(
    model: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    feed: Mapping[str, np.ndarray],
    outputs: Sequence[str],
) -> bytes:
    """Return a part of a model, as a model of its own."""
    read = {name for node in nodes for name in reads(node)}
    piece = onnx.ModelProto(
        ir_version=max(model.ir_version, 4)
    )  # older ones list weights as inputs
    piece.opset_import.extend(model.opset_import)
    graph = piece.graph
    graph.name = "stage"
    graph.node.extend(nodes)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t") and find_array(attribute.t) is not None:
                attribute.t.CopyFrom(onnx.numpy_helper.from_array(as_array(attribute.t)))
    graph.initializer.extend(
        _embedded(tensor) for tensor in model.graph.initializer if tensor.name in read
    )
    for name, array in feed.items():
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        dims = [f"{name}_{axis}" for axis in range(array.ndim)]
        graph.input.append(onnx.helper.make_tensor_value_info(name, kind, dims))
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    serialized: bytes = piece.SerializeToString()
    return serialized


def _embedded(tensor: onnx.TensorProto) -> onnx.TensorProto:
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return tensor
    return onnx.numpy_helper.from_array(as_array(tensor), tensor.name)
