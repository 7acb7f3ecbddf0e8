"""The model that is planned for: its layers as the compiler sees them, and what else it holds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx

from sparse_tvm.errors import ModelError, OptionError
from sparse_tvm.frontends.onnx.detach import as_array, stored_tensors
from sparse_tvm.frontends.onnx.read import first_few, read_onnx
from sparse_tvm.frontends.onnx.weights import (
    WeightRef,
    canonical,
    find_weights,
    other_users,
    replace_data,
    stored,
)
from sparse_tvm.frontends.source import Source
from sparse_tvm.operators import WeightedOperator
from sparse_tvm.passes.dense_to_sparse import typical_tokens
from sparse_tvm.passes.infrastructure import Context
from sparse_tvm.passes.program import Program
from sparse_tvm.planning.document import layers_fingerprint
from sparse_tvm.planning.settings import DENSE, TOKENS, Setting
from sparse_tvm.random_inputs import typical_sizes
from sparse_tvm.sparsity.masks import prune_array
from sparse_tvm.spec import size_of
from sparse_tvm.tuning.layers import layer_calls, until_layouts
from sparse_tvm.tuning.records import anonymous

Shapes = Mapping[str, tuple[int, ...]]
"""Of all inputs, by name."""


@dataclass(frozen=True)
class Kind:
    """What layers have in common that take the same time, however they are pruned.

    Attributes
    ----------
    op : WeightedOperator
        Without a name and without a layout.
    tokens : int
        How many tokens, or pixels, it sees at a time.
    """

    op: WeightedOperator
    tokens: int


@dataclass(frozen=True)
class PlannedLayer:
    """A weight that may be pruned.

    Attributes
    ----------
    ref : WeightRef
        Where it is stored, and its name.
    kinds : tuple[Kind, ...]
        One for each time that a run uses it.
    """

    ref: WeightRef
    kinds: tuple[Kind, ...]

    @property
    def name(self) -> str:
        """As ``prune --layers`` matches it."""
        return self.ref.layer


class Subject:
    """A model, opened once, for all that planning asks of it.

    Parameters
    ----------
    source : Source
        The model.
    context : Context
        For which target, and what was measured on it.
    target_name : str
        What the user calls the target.
    input_shapes : Mapping[str, Sequence]
        What the user says of the inputs' shapes.
    tokens : int
        Size of symbolic dimensions that do not lead an input, where nobody says.
    layers, exclude : str | None
        Regular expressions, searched in names of layers: plan only these, all but these.

    Raises
    ------
    ModelError, OptionError
        When the model cannot be compiled, or has no layer to prune.
    """

    def __init__(
        self,
        source: Source,
        context: Context,
        target_name: str,
        input_shapes: Mapping[str, Sequence[Any]],
        tokens: int = TOKENS,
        layers: str | None = None,
        exclude: str | None = None,
    ) -> None:
        self.source, self.context, self.target_name = source, context, target_name
        self.model = read_onnx(source.as_onnx())
        self.refs = find_weights(self.model)
        imported, self.shapes = _imported(source, input_shapes, tokens)
        self.weight_bytes = sum(array.nbytes for array in imported.weights.values())
        self.program = until_layouts(imported, context)
        kinds: dict[str, list[Kind]] = {}
        for op, _, output in layer_calls(self.program):
            count = typical_tokens(op, output)[0]
            kinds.setdefault(op.layer, []).append(Kind(anonymous(op), count))
        shared = other_users(self.model, self.refs)
        chosen = _chosen(self.refs, layers, exclude)
        self.layers = [
            PlannedLayer(ref, tuple(kinds[ref.layer]))
            for ref in self.refs
            if ref.layer in kinds and ref.layer in chosen and not shared[ref.layer]
        ]
        if not self.layers:
            raise ModelError(
                f"{source.name}: there is no layer to prune",
                hint="a plan needs dense layers or convolutions with weights of their own",
            )

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.source.name

    def structures_of(self, layer: PlannedLayer) -> list[str]:
        """What kernels of a layer skip, in the precision that it is to compute in."""
        backend, target = self.context.backend, self.context.target
        return backend.structures(layer.kinds[0].op, target)

    @property
    def structures(self) -> list[str]:
        """What kernels of any layer skip: to choose among, unless the user says otherwise."""
        return list(dict.fromkeys(s for each in self.layers for s in self.structures_of(each)))

    @cached_property
    def fingerprint(self) -> str:
        """See :func:`~sparse_tvm.planning.document.layers_fingerprint`."""
        return layers_fingerprint(self.refs)

    @cached_property
    def _tensors(self) -> dict[str, onnx.TensorProto]:
        return dict(stored_tensors(self.model.graph))

    def matrix(self, layer: PlannedLayer) -> np.ndarray:
        """A layer's weight, float32 ``[N, K]``."""
        return canonical(layer.ref, as_array(self._tensors[layer.ref.initializer]))

    def pruned(self, settings: Mapping[str, Setting]) -> onnx.ModelProto:
        """A copy of the model with layers pruned by magnitude, by name."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        tensors = dict(stored_tensors(model.graph))
        for layer in self.layers:
            setting = settings.get(layer.name, DENSE)
            if setting != DENSE:
                w = prune_array(self.matrix(layer), setting.sparsity, setting.structure)
                tensor = tensors[layer.ref.initializer]
                replace_data(tensor, stored(layer.ref, w, tuple(tensor.dims)))
        return model


def _imported(
    source: Source, input_shapes: Mapping[str, Sequence[Any]], tokens: int
) -> tuple[Program, dict[str, tuple[int, ...]]]:
    """The model with all of its inputs' sizes fixed, since time depends on them."""
    imported = source.load(input_shapes)
    sizes = typical_sizes(imported.inputs, imported.bounds, others=tokens)
    shapes = {
        spec.name: tuple(size_of(dim, sizes) for dim in spec.shape) for spec in imported.inputs
    }
    if sizes:
        imported = source.load(shapes)
    return Program(imported.module, dict(imported.weights), dict(imported.layers)), shapes


def _chosen(refs: Sequence[WeightRef], layers: str | None, exclude: str | None) -> set[str]:
    names = [ref.layer for ref in refs]
    wanted = set(names) if layers is None else _matching("--layers", layers, names)
    return wanted - (set() if exclude is None else _matching("--exclude", exclude, names))


def _matching(option: str, pattern: str, names: Sequence[str]) -> set[str]:
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise OptionError(f"{option} {pattern!r}: bad regular expression: {error}") from error
    found = {name for name in names if regex.search(name)}
    if not found:
        raise OptionError(
            f"{option} {pattern!r} matches no layer", hint=f"there are {first_few(names)}"
        )
    return found
