"""Import an ONNX model into TVM's Relax, with its weights kept beside the program."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import onnx
import tvm
from tvm import relax

from sparse_tvm.errors import ModelError, OptionError
from sparse_tvm.frontends.guard import bounded_memory
from sparse_tvm.frontends.importer.graph import (
    SUPPORTED_OPS,
    Importer,
    Narrower,
    NodeError,
    SameSize,
)
from sparse_tvm.frontends.importer.input_ranges import Range, input_ranges, typical_ranges
from sparse_tvm.frontends.importer.sizes import as_text
from sparse_tvm.frontends.importer.tvm_adapter import abandon
from sparse_tvm.frontends.input_shapes import InputShapes, Shapes, choose_shapes
from sparse_tvm.frontends.onnx.detach import as_array
from sparse_tvm.frontends.onnx.quantised import CONTRIB_DOMAIN, was_quantised
from sparse_tvm.frontends.onnx.read import describe, first_few, one_line, read_onnx
from sparse_tvm.frontends.onnx.rewrite import all_nodes
from sparse_tvm.frontends.onnx.simplify import input_specs, set_input_shapes, simplify
from sparse_tvm.frontends.onnx.specs import demand_tensor
from sparse_tvm.frontends.onnx.weights import find_weights
from sparse_tvm.frontends.onnx.widen import widened_types
from sparse_tvm.spec import LARGEST_SIZE, TensorSpec

_SUPPORTED_CONTRIB_OPS = {
    "BiasGelu",
    "EmbedLayerNormalization",
    "FastGelu",
    "SkipLayerNormalization",
}


@dataclass
class ImportedModel:
    """A model as a Relax program and its weights.

    Parameters
    ----------
    module : tvm.IRModule
        ``main(inputs..., weights...)``; its attribute ``num_input`` counts the inputs, and
        ``tir_var_upper_bound`` holds the largest sizes of symbolic dimensions, where there are.
        All shapes are known, as expressions of the inputs' symbolic dimensions. It returns a
        bare tensor when the model has one output, else a tuple.
    weights : dict[str, np.ndarray]
        Read-only arrays by parameter name, in the order of the parameters.
    inputs, outputs : list[TensorSpec]
        With the model's names, in the model's order. Symbolic dimensions have names, sizes
        computed from them are expressions: ``"sequence + 1"``.
    layers : dict[str, str]
        Names of layers by the parameter that is their weight.
    source : path or onnx.ModelProto
        What the model was imported from.
    bounds : dict[str, tuple[int, int]]
        Smallest and largest size of those symbolic dimensions that are bounded.
    widened : list[str]
        The types of 16 bits that the model has, ``float16`` and ``bfloat16``.
    quantised : bool
        Whether it rounds to integers on its way, by scales of its own.
    """

    module: tvm.IRModule
    weights: dict[str, np.ndarray]
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    layers: dict[str, str]
    source: str | os.PathLike[str] | onnx.ModelProto
    bounds: dict[str, tuple[int, int]] = field(default_factory=dict)
    widened: list[str] = field(default_factory=list)
    quantised: bool = False

    @property
    def notes(self) -> list[str]:
        """What the user should know of how the model was imported."""
        if not self.widened:
            return []
        types = " and ".join(self.widened)
        note = f"the model's {types} values became float32, and only layers of less round them"
        if "bfloat16" in self.widened:
            note += "; bfloat16 inputs and outputs are float32"
        return [note]


def import_onnx(
    model: str | os.PathLike[str] | onnx.ModelProto,
    input_shapes: InputShapes | None = None,
) -> ImportedModel:
    """Read, simplify and import a model.

    Parameters
    ----------
    model : path or onnx.ModelProto
        A model of float32, or of 16-bit floats.
    input_shapes : InputShapes | None
        Shapes of inputs by name, to fix symbolic dimensions, name or bound them.

    Raises
    ------
    ModelError
        When the model cannot be read or holds operators that cannot be compiled (all are
        named).
    OptionError
        When `input_shapes` does not fit the model.
    """
    proto = read_onnx(model, mapped=True)
    try:
        with bounded_memory(proto):
            return _import(proto, input_shapes, source=model)
    except ModelError as error:
        message = f"{describe(model)}: {error.message}"
        raise ModelError(message, hint=error.hint) from error.__cause__


def _import(
    proto: onnx.ModelProto,
    input_shapes: InputShapes | None,
    source: str | os.PathLike[str] | onnx.ModelProto,
) -> ImportedModel:
    for output in proto.graph.output:
        demand_tensor(output)
    shapes = choose_shapes(input_specs(proto), input_shapes or {})
    program, tensors = simplify(proto, shapes.specs, definitions=_defined_only())
    _check_operators(program)
    module, ranges, typical, only = _import_program(program, shapes)
    return ImportedModel(
        module=module,
        weights={name: as_array(tensor) for name, tensor in tensors.items()},
        inputs=[
            replace(
                spec,
                values=ranges.get(spec.name),
                typical=typical.get(spec.name),
                multiples=shapes.multiples_of(spec),
                only=only.get(spec.name),
            )
            for spec in shapes.specs
        ],
        outputs=_output_specs(module, program),
        layers=_layers(proto, program, tensors),
        source=source,
        bounds=shapes.bounds,
        widened=widened_types(proto),
        quantised=was_quantised(proto),
    )


@cache
def _defined_only() -> frozenset[str]:
    """Return the operators that cannot be imported, but that the standard defines by others."""
    schemas: list[Any] = [s for s in onnx.defs.get_all_schemas() if s.domain == ""]
    return frozenset(
        schema.name
        for schema in schemas
        if (schema.has_function or schema.has_context_dependent_function)
        and schema.name not in SUPPORTED_OPS
    )


def _check_operators(program: onnx.ModelProto) -> None:
    """Refuse a model that holds operators that cannot be compiled, and name them all."""
    refused: dict[str, list[str]] = {}
    for node in all_nodes(program.graph):
        known = _SUPPORTED_CONTRIB_OPS if node.domain == CONTRIB_DOMAIN else SUPPORTED_OPS
        if node.op_type not in known:
            op = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            refused.setdefault(op, []).append(node.name or node.output[0])
    if refused:
        found = [f"{op} (node {first_few(nodes)})" for op, nodes in refused.items()]
        raise ModelError(f"operators that cannot be compiled: {', '.join(found)}")


def _import_program(
    program: onnx.ModelProto, shapes: Shapes
) -> tuple[tvm.IRModule, dict[str, Range], dict[str, Range], dict[str, int]]:
    """Translate the graph, whose last inputs are the weights, and find its inputs' ranges:
    those that they must keep to, and those that they are meant to be in; and the only values
    that some may have.

    Symbolic dimensions that an operator demands to be the same become one in `shapes`, and what
    the graph demands of them is added to its bounds.
    """
    given = dict(shapes.bounds)
    opset = next(entry.version for entry in program.opset_import if entry.domain in ("", "ai.onnx"))
    while True:
        set_input_shapes(program, shapes.specs)
        importer = Importer(program.graph, opset, shapes.bounds, shapes.multiples)
        try:
            module = _build(importer)
        except SameSize as same:
            shapes.merge(*same.names)
            continue
        except Narrower:  # which the bounds know by now
            continue
        ranges, typical = input_ranges(importer), typical_ranges(importer)
        _check_bounds(given, shapes)
        main = module["main"].with_attr("num_input", len(shapes.specs))
        module["main"] = main.with_attrs(_bound_attributes(shapes))
        module = relax.transform.EliminateCommonSubexpr()(module)
        module = relax.transform.DeadCodeElimination()(module)
        if _has_constant_calls(module):
            module = relax.transform.FoldConstant()(module)
        return module, ranges, typical, importer.only_values


def _build(importer: Importer) -> tvm.IRModule:
    try:
        return importer.build()
    except NodeError as error:
        node, cause = error.node, error.__cause__ or error
        raise ModelError(
            f"node {node.name or node.output[0]} ({node.op_type}) cannot be imported: "
            f"{one_line(cause)}"
        ) from cause
    finally:
        abandon(importer.builder)


def _check_bounds(given: Mapping[str, tuple[int, int]], shapes: Shapes) -> None:
    """Refuse sizes that the user wants but the model does not allow."""
    for name, (lowest, wanted) in given.items():
        least, largest = shapes.bounds.get(name, (1, wanted))
        if wanted > largest:
            raise OptionError(
                f"--input-shape has {name} up to {wanted}, but the model allows at most {largest}"
            )
        if lowest < least:
            raise OptionError(
                f"--input-shape has {name} from {lowest}, but the model needs at least {least}"
            )


def _bound_attributes(shapes: Shapes) -> dict[str, dict[str, int]]:
    """Return the bounds of dimensions as TVM's memory planner reads them."""
    lower = {name: low for name, (low, _) in shapes.bounds.items() if low > 1}
    upper = {name: high for name, (_, high) in shapes.bounds.items() if high < LARGEST_SIZE}
    found = {"tir_var_lower_bound": lower, "tir_var_upper_bound": upper}
    return {name: bounds for name, bounds in found.items() if bounds}


def _has_constant_calls(module: tvm.IRModule) -> bool:
    found = False

    def visit(expr: relax.Expr) -> None:
        nonlocal found
        if isinstance(expr, relax.Call) and expr.args:
            found |= all(isinstance(arg, tvm.ir.GenericConst) for arg in expr.args)

    relax.analysis.post_order_visit(module["main"].body, visit)
    return found


def _output_specs(module: tvm.IRModule, program: onnx.ModelProto) -> list[TensorSpec]:
    """Return the outputs with the shapes that the program gives them."""
    result = module[
        "main"
    ].body.body.ty  # the function's own type leaves out sizes that depend on data
    types = result.fields if isinstance(result, relax.TupleType) else [result]
    for value, type_ in zip(program.graph.output, types, strict=True):
        if any(isinstance(size, tvm.tirx.IntImm) and size == 0 for size in type_.shape.values):
            raise ModelError(f"output {value.name} never has any elements")
    return [
        TensorSpec(
            value.name,
            str(type_.dtype),
            tuple(as_text(size) for size in type_.shape.values),
        )
        for value, type_ in zip(program.graph.output, types, strict=True)
    ]


def _layers(
    model: onnx.ModelProto, program: onnx.ModelProto, weights: Mapping[str, onnx.TensorProto]
) -> dict[str, str]:
    """Name the layers as in the model that was read, whatever became of their weights."""
    by_tensor: dict[str, str] = {}
    by_node: dict[str, str] = {}
    for ref in find_weights(model):
        by_tensor[ref.initializer] = ref.layer
        by_node |= dict.fromkeys(ref.nodes, ref.layer)
    layers = {name: by_tensor[name] for name in weights if name in by_tensor}
    for node in program.graph.node:
        # A node without a name went by its output, and simplification may have named it.
        layer = by_node.get(node.name) or by_node.get(node.output[0])
        for name in node.input[1:2]:
            if layer and name in weights:
                layers.setdefault(name, layer)
    return layers
