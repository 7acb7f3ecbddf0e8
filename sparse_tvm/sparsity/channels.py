"""Which layers' inputs may be put in another order, so that a model computes the same as before.

An order of a layer's inputs is undone by the same order of what makes them: the outputs of other
layers, where between them there is nothing but functions of one element each, as in the two layers
of a feed-forward block. Normalisations, attention and sums with what comes from elsewhere tie the
inputs of most other layers to more of the model than that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx

from sparse_tvm.frontends.onnx.detach import as_array, names_read, stored_tensors
from sparse_tvm.frontends.onnx.weights import WeightRef, canonical, replace_data, stored
from sparse_tvm.sparsity.pattern import Goal
from sparse_tvm.sparsity.permutation import better_order, kept_share

_ELEMENTWISE = set(
    """Abs Add Cast Celu Clip Div Elu Erf Exp Gelu HardSigmoid HardSwish Identity LeakyRelu Log Max
    Min Mish Mul Neg Pow Relu Selu Sigmoid Softplus Softsign Sqrt Sub Tanh""".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Reordered:
    """What the order of its inputs does to one layer.

    Attributes
    ----------
    name : str
        Of the layer.
    before, after : float
        Share of its magnitude that N:M keeps.
    reason : str
        Why its inputs stay as they are; empty if they do not.
    """

    name: str
    before: float
    after: float
    reason: str = ""


@dataclass
class _Channels:
    """All that one order of channels goes through.

    Attributes
    ----------
    makers, readers : dict[str, WeightRef]
        Layers whose outputs, and inputs, they are, by initializer.
    vectors : set[str]
        Initializers with one value for each.
    """

    makers: dict[str, WeightRef] = field(default_factory=dict)
    readers: dict[str, WeightRef] = field(default_factory=dict)
    vectors: set[str] = field(default_factory=set)


class _TiedError(Exception):
    """Why channels cannot change their order."""


def reorder(
    model: onnx.ModelProto,
    refs: Sequence[WeightRef],
    every: Sequence[WeightRef],
    goals: Mapping[str, Goal],
    progress: Callable[[str], None] = lambda message: None,
) -> tuple[list[Reordered], list[str]]:
    """Put inputs of layers in an order in which N:M keeps more, and what makes them, too.

    Parameters
    ----------
    model : onnx.ModelProto
        Is changed; it computes what it did.
    refs, every : Sequence[WeightRef]
        The layers to prune, and all that there are.
    goals : Mapping[str, Goal]
        How each is to be pruned; those that are not N:M are left alone.
    progress : callable
        Told of each layer that an order is looked for.

    Returns
    -------
    tuple[list[Reordered], list[str]]
        What became of each N:M layer, and the initializers that were changed.
    """
    finder = _Finder(model, every)
    found: dict[str, Reordered] = {}
    changed: set[str] = set()
    for ref in refs:
        n_m = goals[ref.layer].pattern.n_m
        if n_m is None or ref.layer in found:
            continue
        share = kept_share(finder.matrix(ref), *n_m)
        try:
            channels = finder.channels(ref, n_m[1])
        except _TiedError as reason:
            found[ref.layer] = Reordered(ref.layer, share, share, str(reason))
            continue
        alike = [
            one
            for one in refs
            if one.initializer in channels.readers and goals[one.layer].pattern.n_m == n_m
        ]
        progress(f"order inputs of {ref.layer}")
        before = [kept_share(finder.matrix(one), *n_m) for one in alike]
        order = better_order(np.concatenate([finder.matrix(one) for one in alike]), *n_m)
        changed |= set(finder.apply(channels, order))
        for one, share in zip(alike, before, strict=True):
            after = kept_share(finder.matrix(one), *n_m)
            found[one.layer] = Reordered(one.layer, share, after)
    return [found[ref.layer] for ref in refs if ref.layer in found], sorted(changed)


class _Finder:
    """A model's tensors, with who makes and who reads them."""

    def __init__(self, model: onnx.ModelProto, refs: Sequence[WeightRef]) -> None:
        nodes = model.graph.node
        self._tensors = dict(stored_tensors(model.graph))
        self._maker = {name: node for node in nodes for name in node.output if name}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in nodes:
            for name in names_read(node):
                self._readers.setdefault(name, []).append(node)
        self._results = {value.name for value in model.graph.output}
        by_name = {node.name or node.output[0]: node for node in nodes}
        self._nodes = {ref.initializer: by_name[ref.nodes[0]] for ref in refs}
        self._layers = {
            by_name[name].output[0]: ref
            for ref in refs
            if ref.op in ("MatMul", "Gemm")
            for name in ref.nodes
        }

    def matrix(self, ref: WeightRef) -> np.ndarray:
        """The weight ``[N, K]``."""
        return canonical(ref, as_array(self._tensors[ref.initializer]))

    def channels(self, ref: WeightRef, m: int) -> _Channels:
        """What an order of a layer's inputs goes through.

        Raises
        ------
        _TiedError
            When that is more than layers and functions of single elements.
        """
        width = ref.shape[1]
        if self._layers.get(self._nodes[ref.initializer].output[0]) != ref:
            raise _TiedError(f"a {ref.op}")
        if width % m:
            raise _TiedError(f"{width} inputs are not a multiple of {m}")
        found = _Channels()
        self._note(found.readers, ref, width, 1)
        start = self._input_of(self._nodes[ref.initializer], ref)
        waiting, seen = [start], {start}
        inside: set[int] = set()  # nodes, by what Python calls them
        while waiting:
            name = waiting.pop()
            reached = self._made(name, width, found, inside)
            reached += self._read(name, width, found)
            waiting += [one for one in reached if one not in seen]
            seen.update(reached)
        for vector in found.vectors:
            if any(id(node) not in inside for node in self._readers[vector]):
                raise _TiedError(f"{vector} is used elsewhere, too")
        return found

    def _made(self, name: str, width: int, found: _Channels, inside: set[int]) -> list[str]:
        """Note what makes a tensor; return the tensors that it is a function of."""
        if name in self._results:
            raise _TiedError(f"{name} is an output of the model")
        node = self._maker.get(name)
        if node is None:
            raise _TiedError(f"{name} is an input of the model")
        inside.add(id(node))
        if name in self._layers:
            layer = self._layers[name]
            self._input_of(node, layer)
            self._note(found.makers, layer, width, 0)
            for bias in node.input[2:]:
                if bias not in self._tensors:
                    raise _TiedError(f"{bias} is no constant")
                self._note_constant(bias, width, found)
            return []
        if node.op_type not in _ELEMENTWISE or node.domain not in ("", "ai.onnx", "com.microsoft"):
            raise _TiedError(f"its inputs come out of {node.op_type}")
        operands = [one for one in node.input if one]
        for one in operands:
            if one in self._tensors:
                self._note_constant(one, width, found)
        return [one for one in operands if one not in self._tensors]

    def _read(self, name: str, width: int, found: _Channels) -> list[str]:
        """Note the layers that read a tensor; return what else is made of it."""
        reached = []
        for node in self._readers.get(name, ()):
            layer = self._layers.get(node.output[0])
            if layer is not None and self._input_of(node, layer) == name:
                self._note(found.readers, layer, width, 1)
            elif node.op_type in _ELEMENTWISE:
                reached.append(node.output[0])
            else:
                raise _TiedError(f"{node.op_type} reads its inputs, too")
        return reached

    def _note(self, layers: dict[str, WeightRef], ref: WeightRef, width: int, axis: int) -> None:
        if len(ref.nodes) > 1 or len(self._readers[ref.initializer]) > 1:
            raise _TiedError(f"{ref.layer} is shared by several layers")
        if ref.shape[axis] != width:
            raise _TiedError(f"{ref.layer} has {ref.shape[axis]} channels, not {width}")
        layers[ref.initializer] = ref

    def _note_constant(self, name: str, width: int, found: _Channels) -> None:
        dims = list(self._tensors[name].dims)
        if dims and dims[-1] == width:
            if self._tensors[name].data_type != onnx.TensorProto.FLOAT:
                raise _TiedError(f"{name} is not of float32")
            found.vectors.add(name)
        elif dims and dims[-1] != 1:
            raise _TiedError(f"{name} has {dims[-1]} channels, not {width}")

    def _input_of(self, node: onnx.NodeProto, ref: WeightRef) -> str:
        """A layer's input, channels last."""
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        if transposed or not self._is_weight(node.input[1], ref):
            raise _TiedError(f"{ref.layer} has its channels first")
        return str(node.input[0])

    def _is_weight(self, name: str, ref: WeightRef) -> bool:
        while name != ref.initializer:
            node = self._maker.get(name)
            if node is None or node.op_type not in ("Identity", "Transpose"):
                return False
            name = node.input[0]
        return True

    def apply(self, channels: _Channels, order: np.ndarray) -> Iterator[str]:
        """Put all that belongs to channels in an order; yield the initializers."""
        for ref in channels.makers.values():
            yield self._replace(ref, self.matrix(ref)[order])
        for ref in channels.readers.values():
            yield self._replace(ref, self.matrix(ref)[:, order])
        for name in channels.vectors:
            tensor = self._tensors[name]
            replace_data(tensor, np.ascontiguousarray(as_array(tensor)[..., order]))
            yield name

    def _replace(self, ref: WeightRef, w: np.ndarray) -> str:
        tensor = self._tensors[ref.initializer]
        replace_data(tensor, stored(ref, w, tuple(tensor.dims)))
        return ref.initializer
