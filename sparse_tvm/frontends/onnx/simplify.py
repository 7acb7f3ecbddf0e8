"""Simplify a model's graph for given input shapes, so that TVM can import it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection, Iterable, Mapping, Sequence

import onnx
import onnxsim

from sparse_tvm.errors import ModelError
from sparse_tvm.frontends.guard import check_sizes
from sparse_tvm.frontends.onnx.bags import sum_bags
from sparse_tvm.frontends.onnx.detach import (
    detach_weights,
    is_weight,
    model_inputs,
    names_read,
    stored_tensors,
)
from sparse_tvm.frontends.onnx.fold_weights import fold_weights
from sparse_tvm.frontends.onnx.integer_ranges import count_in_integers
from sparse_tvm.frontends.onnx.rewrite import constants_to_initializers, expand, modernise
from sparse_tvm.frontends.onnx.specs import tensor_spec
from sparse_tvm.frontends.onnx.weights import find_weights
from sparse_tvm.frontends.silence import silent_stderr
from sparse_tvm.spec import TensorSpec

# It puts a branch that is always taken behind what reads its results. The importer takes branches.
_LEFT_TO_US = ["eliminate_if_with_const_cond"]

_FOLDED_INTO_EACH_OTHER = ("BatchNormalization", "Conv", "ConvTranspose")


def input_specs(model: onnx.ModelProto) -> list[TensorSpec]:
    """Return the model's inputs; a dimension of unknown size is ``"?"`` when it has no name.

    Raises
    ------
    ModelError
        When an input is not a tensor.
    """
    return [tensor_spec(value) for value in model_inputs(model)]


def simplify(
    model: onnx.ModelProto, specs: Sequence[TensorSpec], *, definitions: Collection[str] = ()
) -> tuple[onnx.ModelProto, dict[str, onnx.TensorProto]]:
    """Set the shapes of the inputs, fold what is constant and take the weights out.

    Parameters
    ----------
    model : onnx.ModelProto
        As `read_onnx` returns it; left as it is.
    specs : Sequence[TensorSpec]
        The model's inputs, with the shapes they shall have.
    definitions : Collection[str]
        Operators to replace by their definition in the ONNX standard.

    Returns
    -------
    tuple[onnx.ModelProto, dict[str, onnx.TensorProto]]
        The simplified model, whose inputs are those of `model` and then the weights that its
        nodes use; and the weights in that order. Node and weight names are kept.

    Raises
    ------
    ModelError
        When the model cannot be simplified.
    """
    # Folding a batch norm into its convolution needs the values of both.
    skeleton, weights = detach_weights(model, _weight_names(model) - _foldable(model))
    _set_shapes(skeleton, specs)
    check_sizes(skeleton)
    try:
        fold_weights(skeleton, weights)
        skeleton = expand(sum_bags(modernise(skeleton)), definitions)
        # It prints when it falls back to a slower way, and warns of each node it does not fold.
        with contextlib.redirect_stdout(io.StringIO()), silent_stderr():
            simplified, valid = onnxsim.simplify(skeleton, skipped_optimizers=_LEFT_TO_US)
    except MemoryError:
        raise
    except Exception as error:
        raise ModelError(f"the graph cannot be simplified: {' '.join(str(error).split())}") from (
            error
        )
    if not valid:
        raise ModelError("the graph cannot be simplified: onnxsim's own check failed")
    check_sizes(simplified)
    constants_to_initializers(simplified.graph)
    count_in_integers(simplified.graph)
    program, folded = detach_weights(simplified, _weight_names(simplified))
    return _drop_unused(program, {**weights, **folded}, len(specs))


def _weight_names(model: onnx.ModelProto) -> set[str]:
    """Return the names of all that is a layer's weight, however small, or large.

    The window of a transform is none: it becomes part of one.
    """
    layers = {ref.initializer for ref in find_weights(model)}
    large = {name for name, tensor in stored_tensors(model.graph) if is_weight(tensor)}
    windows = {name for n in model.graph.node if n.op_type == "STFT" for name in n.input[2:3]}
    return (layers | large) - windows


def _foldable(model: onnx.ModelProto) -> set[str]:
    nodes = model.graph.node
    if not any(node.op_type == "BatchNormalization" for node in nodes):
        return set()
    return {name for n in nodes if n.op_type in _FOLDED_INTO_EACH_OTHER for name in n.input}


def _set_shapes(skeleton: onnx.ModelProto, specs: Sequence[TensorSpec]) -> None:
    """Write the inputs' shapes and forget the symbolic ones that follow from them."""
    set_input_shapes(skeleton, specs)
    del skeleton.graph.value_info[:]
    for value in skeleton.graph.output:
        for dim in value.type.tensor_type.shape.dim:
            dim.ClearField("dim_param")


def set_input_shapes(model: onnx.ModelProto, specs: Iterable[TensorSpec]) -> None:
    """Write the shapes of the model's first inputs, in their order."""
    for value, spec in zip(model.graph.input, specs, strict=False):
        value.type.tensor_type.ClearField("shape")
        value.type.tensor_type.shape.dim.extend(
            onnx.TensorShapeProto.Dimension(dim_value=d)
            if isinstance(d, int)
            else onnx.TensorShapeProto.Dimension(dim_param=d)
            for d in spec.shape
        )


def _drop_unused(
    program: onnx.ModelProto, weights: Mapping[str, onnx.TensorProto], inputs: int
) -> tuple[onnx.ModelProto, dict[str, onnx.TensorProto]]:
    """Remove the weights that no node reads any more."""
    read = {name for node in program.graph.node for name in names_read(node)}
    read |= {value.name for value in program.graph.output}
    kept = [
        value
        for index, value in enumerate(program.graph.input)
        if index < inputs or value.name in read
    ]
    del program.graph.input[:]
    program.graph.input.extend(kept)
    return program, {value.name: weights[value.name] for value in kept[inputs:]}
