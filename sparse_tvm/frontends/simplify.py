"""Fix a model's input shapes and simplify its graph, so that TVM can import it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection, Iterable, Mapping, Sequence

import onnx
import onnxsim

from sparse_tvm.errors import ModelError, OptionError
from sparse_tvm.frontends.detach import (
    detach_weights,
    is_weight,
    model_inputs,
    stored_tensors,
)
from sparse_tvm.frontends.respell import constants_to_initializers, expand, modernise
from sparse_tvm.frontends.specs import tensor_spec
from sparse_tvm.frontends.weights import find_weights
from sparse_tvm.spec import TensorSpec

_FOLDED_INTO_EACH_OTHER = ("BatchNormalization", "Conv", "ConvTranspose")


def parse_input_shapes(options: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Parse ``--input-shape`` options.

    >>> parse_input_shapes(["ids:1,128", "mask:1,128"])
    {'ids': (1, 128), 'mask': (1, 128)}

    Raises
    ------
    OptionError
        When an option is not ``NAME:DIM,DIM,...`` with positive dimensions.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for option in options:
        # TensorFlow's names hold colons themselves: "ids:0:1,128".
        name, _, dims = option.rpartition(":")
        try:
            shape = tuple(int(dim) for dim in dims.strip("[]() ").replace("x", ",").split(","))
        except ValueError:
            shape = ()
        if not name or not shape or min(shape) < 1:
            raise OptionError(
                f"--input-shape {option!r} is not NAME:DIM,DIM,... with positive integers",
                hint="for example --input-shape input_ids:1,128",
            )
        if shapes.setdefault(name, shape) != shape:
            raise OptionError(f"--input-shape gives {name!r} two shapes")
    return shapes


def input_specs(model: onnx.ModelProto) -> list[TensorSpec]:
    """Return the model's inputs; a dimension of unknown size is ``"?"`` when it has no name.

    Raises
    ------
    ModelError
        When an input is not a tensor.
    """
    return [tensor_spec(value) for value in model_inputs(model)]


def simplify(
    model: onnx.ModelProto,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    *,
    definitions: Collection[str] = (),
) -> tuple[onnx.ModelProto, dict[str, onnx.TensorProto]]:
    """Fix all shapes, fold what is constant and take the weights out.

    Parameters
    ----------
    model : onnx.ModelProto
        As `read_onnx` returns it; left as it is.
    input_shapes : Mapping[str, Sequence[int]] | None
        Shapes of inputs by name; needed for those with symbolic dimensions. A symbol fixed in
        one input is fixed in all.
    definitions : Collection[str]
        Operators to replace by their definition in the ONNX standard.

    Returns
    -------
    tuple[onnx.ModelProto, dict[str, onnx.TensorProto]]
        The simplified model, whose inputs are those of `model` and then the weights that its
        nodes use; and the weights in that order. Node and weight names are kept.

    Raises
    ------
    OptionError
        When `input_shapes` does not fit, or leaves a dimension open.
    ModelError
        When the model cannot be simplified.
    """
    specs = fix_shapes(input_specs(model), input_shapes or {})
    # Folding a batch norm into its convolution needs the values of both.
    skeleton, weights = detach_weights(model, _weight_names(model) - _foldable(model))
    _set_shapes(skeleton, specs)
    try:
        skeleton = expand(modernise(skeleton), definitions)
        # It prints to stdout when it falls back to a slower way.
        with contextlib.redirect_stdout(io.StringIO()):
            simplified, valid = onnxsim.simplify(skeleton)
    except Exception as error:
        raise ModelError(f"the graph cannot be simplified: {' '.join(str(error).split())}") from (
            error
        )
    if not valid:
        raise ModelError("the graph cannot be simplified: onnxsim's own check failed")
    constants_to_initializers(simplified)
    program, folded = detach_weights(simplified, _weight_names(simplified))
    return _drop_unused(program, {**weights, **folded}, len(specs))


def fix_shapes(
    specs: Sequence[TensorSpec], input_shapes: Mapping[str, Sequence[int]]
) -> list[TensorSpec]:
    """Return the inputs with all dimensions fixed by `input_shapes`.

    Raises
    ------
    OptionError
        When a name is unknown, a rank or a fixed dimension differs, a symbol gets two values,
        or a dimension stays open.
    """
    known = {spec.name: spec for spec in specs}
    unknown = [name for name in input_shapes if name not in known]
    if unknown:
        raise OptionError(
            f"--input-shape: the model has no input {unknown[0]!r}",
            hint=f"its inputs are {', '.join(map(str, specs))}",
        )
    symbols: dict[str, int] = {}
    for name, shape in input_shapes.items():
        symbols |= _match(known[name], shape, symbols)
    fixed = [
        TensorSpec(
            s.name,
            s.dtype,
            tuple(input_shapes[s.name])
            if s.name in input_shapes
            else tuple(symbols.get(d, d) if isinstance(d, str) else d for d in s.shape),
        )
        for s in specs
    ]
    open_inputs = [s for s in fixed if any(isinstance(d, str) for d in s.shape)]
    if open_inputs:
        raise OptionError(
            f"the model's shapes are not fixed: {', '.join(map(str, open_inputs))}",
            hint=f"for example: {' '.join(map(_suggestion, open_inputs))}",
        )
    return fixed


def _match(spec: TensorSpec, shape: Sequence[int], symbols: Mapping[str, int]) -> dict[str, int]:
    """Check a given shape against an input; return the values of the input's symbols."""
    if spec.shape == ("...",):
        return {}
    given = ",".join(map(str, shape))
    if len(shape) != len(spec.shape):
        raise OptionError(
            f"--input-shape {spec.name}:{given} has {len(shape)} dimensions, "
            f"but the model has {len(spec.shape)}: {spec}"
        )
    found = dict(symbols)
    for size, dim in zip(shape, spec.shape, strict=True):
        if isinstance(dim, int):
            if size != dim:
                raise OptionError(
                    f"--input-shape {spec.name}:{given} contradicts the model: {spec}",
                    hint=f"its dimension {dim} is fixed",
                )
        elif dim != "?" and found.setdefault(dim, size) != size:
            raise OptionError(
                f"--input-shape {spec.name}:{given} makes {dim} {size}, but it is {found[dim]} "
                "already"
            )
    return {symbol: size for symbol, size in found.items() if symbol not in symbols}


def _suggestion(spec: TensorSpec) -> str:
    """Return an option that fixes an input: batch 1 and 128 of anything else."""
    sizes = [d if isinstance(d, int) else (128 if i else 1) for i, d in enumerate(spec.shape)]
    return f"--input-shape {spec.name}:{','.join(map(str, sizes))}"


def _weight_names(model: onnx.ModelProto) -> set[str]:
    """Return the names of all that is a layer's weight, however small, or large."""
    layers = {ref.initializer for ref in find_weights(model)}
    return layers | {name for name, tensor in stored_tensors(model.graph) if is_weight(tensor)}


def _foldable(model: onnx.ModelProto) -> set[str]:
    nodes = model.graph.node
    if not any(node.op_type == "BatchNormalization" for node in nodes):
        return set()
    return {name for n in nodes if n.op_type in _FOLDED_INTO_EACH_OTHER for name in n.input}


def _set_shapes(skeleton: onnx.ModelProto, specs: Sequence[TensorSpec]) -> None:
    """Write fixed shapes into the inputs and forget the symbolic ones that follow from them."""
    for value, spec in zip(skeleton.graph.input, specs, strict=False):
        value.type.tensor_type.ClearField("shape")
        value.type.tensor_type.shape.dim.extend(
            onnx.TensorShapeProto.Dimension(dim_value=int(d)) for d in spec.shape
        )
    del skeleton.graph.value_info[:]
    for value in skeleton.graph.output:
        for dim in value.type.tensor_type.shape.dim:
            dim.ClearField("dim_param")


def _drop_unused(
    program: onnx.ModelProto, weights: Mapping[str, onnx.TensorProto], inputs: int
) -> tuple[onnx.ModelProto, dict[str, onnx.TensorProto]]:
    """Remove the weights that no node reads any more."""
    read = {name for node in program.graph.node for name in node.input}
    read |= {value.name for value in program.graph.output}
    kept = [
        value
        for index, value in enumerate(program.graph.input)
        if index < inputs or value.name in read
    ]
    del program.graph.input[:]
    program.graph.input.extend(kept)
    return program, {value.name: weights[value.name] for value in kept[inputs:]}
