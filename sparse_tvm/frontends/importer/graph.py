"""Build a Relax function from a simplified ONNX graph, whatever is symbolic in its shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from typing import Any

import onnx
import tvm
from onnx import numpy_helper
from tvm import relax, tirx

from sparse_tvm.frontends.importer import index_expressions, operators, rules, sequences
from sparse_tvm.frontends.importer.branches import branch, one_of
from sparse_tvm.frontends.importer.forms import INTEGERS, Form
from sparse_tvm.frontends.importer.index_expressions import Coordinates, IndexExpression
from sparse_tvm.frontends.importer.known import MAX_ELEMENTS, Known
from sparse_tvm.frontends.importer.loops import unroll
from sparse_tvm.frontends.importer.sizes import Size, Sizes, as_text
from sparse_tvm.frontends.importer.tensors import Tensor, materialise, shape_of
from sparse_tvm.frontends.importer.tvm_adapter import OPERATORS, TvmConverter, input_variables
from sparse_tvm.frontends.onnx.detach import size_of

OWN_OPS = frozenset({*operators.RULES, *sequences.OPERATORS, "Identity", "If", "Loop", "Scan"})
"""What is not left to TVM's importer, at least where that would not do."""

SUPPORTED_OPS = OPERATORS | OWN_OPS
"""What can be imported."""

_SAME_VALUE = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"})

_WINDOWS = ("Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool")


class Narrower(Exception):
    """Raised where an operator demands a bound of a dimension that was not known before."""


class SameSize(Exception):
    """Raised where an operator demands that two symbolic dimensions are the same.

    Attributes
    ----------
    names : tuple[str, str]
        The two dimensions.
    """

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second} must be the same")
        self.names = (first, second)


class NodeError(Exception):
    """Raised where a node cannot be imported; the cause says why.

    Attributes
    ----------
    node : onnx.NodeProto
        The node.
    """

    def __init__(self, node: onnx.NodeProto) -> None:
        super().__init__(node.name or node.output[0])
        self.node = node


class Importer:
    """The function that a graph becomes, and what is known of the graph's values by name.

    Parameters
    ----------
    graph : onnx.GraphProto
        Of opset 11 or newer; every input has a shape.
    opset : int
        The version of the operator set.
    bounds : dict[str, tuple[int, int]]
        Smallest and largest values of symbolic dimensions; what the graph implies is added.
    multiples : dict[str, int]
        What symbolic dimensions are multiples of; what the graph implies is added.
    """

    def __init__(
        self,
        graph: onnx.GraphProto,
        opset: int,
        bounds: dict[str, tuple[int, int]],
        multiples: dict[str, int],
    ) -> None:
        self.graph, self.opset = graph, opset
        self.sizes = Sizes(bounds, multiples)
        self.known: dict[str, Known] = {}
        self.index_expressions: dict[str, IndexExpression | Coordinates] = {}
        self.sequences: dict[str, sequences.Elements] = {}
        self.only_values: dict[str, int] = {}
        self._makers: dict[str, onnx.NodeProto] = {}
        self.builder = relax.BlockBuilder()
        self._tvm = TvmConverter(self.builder, opset)
        self._tensors: dict[str, relax.Expr] = {}

    def build(self) -> tvm.IRModule:
        """Return a module whose ``main`` computes the graph.

        Raises
        ------
        SameSize, Narrower, NodeError
            See there.
        """
        self._read_initializers(self.graph)
        inputs = input_variables(self.graph.input)
        for variable in inputs:
            self._tensors[variable.name] = variable
            for size in shape_of(variable):
                if isinstance(size, tirx.Var):
                    self.sizes.declare(size)
        with self.builder.function("main", params=inputs):
            with self.builder.dataflow():
                for variable in inputs:
                    self._tensors[variable.name] = self._in_multiples(variable)
                for node in self.graph.node:
                    self.import_node(node)
                outputs = [self.tensor(value.name) for value in self.graph.output]
                result = outputs[0] if len(outputs) == 1 else relax.Tuple(outputs)
                result = self.builder.emit_output(result)
            self.builder.emit_func_output(result)
        return self.builder.get()

    def _in_multiples(self, variable: relax.Var) -> relax.Expr:
        """Spell an input's sizes as the multiples that they are: ``height // 2 * 2``."""
        multiples, sizes = self.sizes.multiples, shape_of(variable)
        whole = [
            size // multiples[size.name] * multiples[size.name]
            if isinstance(size, tirx.Var) and size.name in multiples
            else size
            for size in sizes
        ]
        if all(size is other for size, other in zip(sizes, whole, strict=True)):
            return variable
        type_ = relax.TensorType(whole, variable.ty.dtype)
        return self.builder.match_cast(variable, type_)

    def _read_initializers(self, graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            if tensor.data_type == onnx.TensorProto.STRING:
                continue
            array = numpy_helper.to_array(tensor)
            self._tensors[tensor.name] = relax.const(array, array.dtype.name)
            if size_of(tensor) <= MAX_ELEMENTS:
                self.known[tensor.name] = Known.of(array)
            expression = index_expressions.from_table(array, self.sizes)
            if expression is not None:
                self.index_expressions[tensor.name] = expression

    def import_node(self, proto: onnx.NodeProto) -> None:
        """Import a node, and name what it computes."""
        self._makers.update(dict.fromkeys(proto.output, proto))
        try:
            attributes = self._tvm.attributes(proto)
            if proto.op_type == "Identity":
                self.alias(proto.output[0], proto.input[0])
            elif proto.op_type == "If":
                self._import_branches(proto)
            elif proto.op_type in ("Loop", "Scan"):
                unroll(proto, attributes, self)
            elif proto.op_type in sequences.OPERATORS:
                sequences.apply(proto, attributes, self)
            else:
                self._import_operator(proto, attributes)
        except (SameSize, Narrower, NodeError):
            raise
        except Exception as error:
            raise NodeError(proto) from error

    def _import_operator(self, proto: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        node = rules.Node(proto, self, attributes, self.opset)
        standard = proto.domain in ("", "ai.onnx")
        outputs = rules.apply(node) if standard else None
        if outputs is None:
            value = self.by_tvm(node, node.tensors())
            outputs = (Tensor(self.normalize(value), self),)
        if len(outputs) == 1 and isinstance(outputs[0], Tensor):
            outputs = self.fields(outputs[0])
        if any(proto.output[len(outputs) :]):
            raise ValueError(f"its output {proto.output[len(outputs)]} is not supported")
        for name, output in zip(proto.output, outputs, strict=False):
            self._bind(name, output, node)

    def _import_branches(self, proto: onnx.NodeProto) -> None:
        """Import the branch that an ``If`` always takes, or both, and choose between results."""
        (name,) = proto.input
        known = self.known.get(name)
        if known is not None and known.is_constant:
            results = self.import_graph(branch(proto, bool(known.constant())))
            for output, result in zip(proto.output, results, strict=True):
                self.alias(output, result)
            return
        taken = self.import_graph(branch(proto, True))
        other = self._import_other(proto, taken)
        if other is None:
            for output, result in zip(proto.output, taken, strict=True):
                self.alias(output, result)
            return
        self._demand_one_rank(name, taken, other)
        condition = self.normalize(relax.op.reshape(self.tensor(name), ()))
        for output, yes, no in zip(proto.output, taken, other, strict=True):
            self._choose(output, condition, yes, no)

    def _import_other(self, proto: onnx.NodeProto, taken: list[str]) -> list[str] | None:
        """Import the branch that is taken where a condition does not hold.

        None where that cannot be done, limits sizes that the first branch does not, or has
        results of other ranks, if the condition asks whether an input is some number: that number
        is demanded of the input.
        """
        single = self._single_value(proto.input[0])
        if single is None:
            return self.import_graph(branch(proto, False))
        before = dict(self.sizes.bounds), dict(self.sizes.multiples)
        with contextlib.suppress(NodeError, Narrower):
            other = self.import_graph(branch(proto, False))
            same_limits = before == (self.sizes.bounds, self.sizes.multiples)
            if same_limits and not self._differ_in_rank(taken, other):
                return other
        self.sizes.restore(*before)
        self.only_values.update([single])
        return None

    def _single_value(self, condition: str) -> tuple[str, int] | None:
        """The integer input that a condition compares with a number, and that number."""
        equal = self._makers.get(condition)
        if equal is None or equal.op_type != "Equal":
            return None
        for name, other in (equal.input, reversed(equal.input)):
            known = self.known.get(other)
            while (maker := self._makers.get(name)) is not None and maker.op_type in _SAME_VALUE:
                name = maker.input[0]
            if known is not None and known.elements.size == 1 and known.dtype in INTEGERS:
                value = known.elements.item()
                if isinstance(value, int) and name in {each.name for each in self.graph.input}:
                    return name, value
        return None

    def _demand_one_rank(self, condition: str, taken: list[str], other: list[str]) -> None:
        """Where branches differ in rank and sizes decide, let those be such that one is taken."""
        equal = self._makers.get(condition)
        while equal is not None and equal.op_type in _SAME_VALUE:
            equal = self._makers.get(equal.input[0])
        if equal is None or equal.op_type != "Equal" or not self._differ_in_rank(taken, other):
            return
        sizes = [self.known[name].sizes() for name in equal.input if name in self.known]
        if [len(size) for size in sizes] == [1, 1]:
            [[left], [right]] = sizes
            if self.sizes.demand_equal(left, right):
                raise Narrower

    def _differ_in_rank(self, taken: list[str], other: list[str]) -> bool:
        """Whether a result of one branch is a tensor of another rank than that of the other."""
        return any(
            len(self.shape(yes)) != len(self.shape(no))
            for yes, no in zip(taken, other, strict=True)
            if self.sequences.keys().isdisjoint((yes, no))
        )

    def _choose(self, output: str, condition: relax.Expr, yes: str, no: str) -> None:
        """Give the name of one of two values, or sequences of as many, to that one."""
        if yes in self.sequences or no in self.sequences:
            both = [self.sequences.get(name) or () for name in (yes, no)]
            if len(both[0]) != len(both[1]):
                raise ValueError("how long a sequence is depends on data")
            names = [f"{output}.{index}" for index in range(len(both[0]))]
            for name, *pair in zip(names, *both, strict=True):
                self._choose(name, condition, *pair)
            self.sequences[output] = tuple(names)
            return
        tensors = self.tensor(yes), self.tensor(no)
        if self.sizes.same(*map(shape_of, tensors)):
            chosen = relax.op.where(condition, *tensors)
        else:
            chosen = self._one_of(condition, *tensors)
        self._tensors[output] = self.builder.emit(chosen)

    def _one_of(self, condition: relax.Expr, yes: relax.Expr, no: relax.Expr) -> relax.Expr:
        """Return one of two tensors of different sizes; its sizes are counted at run time."""
        shapes = [shape_of(yes), shape_of(no)]
        if len(shapes[0]) != len(shapes[1]):
            raise ValueError("which of two ranks its output has depends on data")
        either = [self.normalize(materialise(Known.shape(shape))) for shape in shapes]
        counted = self.counts(self.normalize(relax.op.where(condition, *either)), "if")
        both = zip(*shapes, counted, strict=True)
        sizes = [size if self.sizes.equal(size, other) else own for size, other, own in both]
        return self.compute(partial(one_of, sizes), condition, yes, no, name="one_of")

    def import_graph(self, graph: onnx.GraphProto) -> list[str]:
        """Import the nodes of a graph within a node, and return the names of its outputs."""
        self._read_initializers(graph)
        for node in graph.node:
            self.import_node(node)
        return [value.name for value in graph.output]

    def alias(self, name: str, of: str) -> None:
        """Give a value another name."""
        values: list[dict[str, Any]] = [self.known, self.index_expressions]
        for forms in (*values, self._tensors, self.sequences):
            if of in forms:
                forms[name] = forms[of]

    def carried(self, name: str) -> Form:
        """Return a value of the graph: known if it is, else a run-time tensor."""
        known = self.known.get(name)
        return Tensor(self.tensor(name), self) if known is None else known

    def define(self, name: str, value: Form) -> None:
        """Give a value a name."""
        if isinstance(value, Known):
            self.known[name] = value
        else:
            assert isinstance(value, Tensor)
            self._tensors[name] = self.builder.emit(value.value)

    def fields(self, output: Tensor) -> tuple[Tensor, ...]:
        """Take a tuple apart."""
        value = output.value
        if isinstance(value, relax.Tuple):
            return tuple(Tensor(self.normalize(field), self) for field in value.fields)
        if not isinstance(value.ty, relax.TupleType):
            return (output,)
        value = self.builder.emit(value)
        fields = range(len(value.ty.fields))
        emit = self.builder.emit
        return tuple(Tensor(emit(relax.TupleGetItem(value, field)), self) for field in fields)

    def demand_same(self, one: Size, other: Size) -> None:
        """Make one dimension of two symbolic ones, where they are."""
        if isinstance(one, tirx.Var) and isinstance(other, tirx.Var):
            names = one.name, other.name
            if len(set(names)) == 2 and self.sizes.counted.isdisjoint(names):
                raise SameSize(*names)

    def compute(self, function: Callable[..., Any], *arguments: Any, name: str) -> relax.Expr:
        """Return what a function of tensor expressions computes, as a loop nest called `name`."""
        return self.builder.emit_te(function, *arguments, primfunc_name_hint=name)

    def counts(self, vector: relax.Expr, name: str) -> list[Size]:
        """Return the elements of an int64 vector as symbolic sizes, called by `name`.

        They are read at run time, and taken as 0 if negative.
        """
        zero = relax.const(0, "int64")
        known = self.builder.emit(relax.op.maximum(vector, zero))
        [rank] = shape_of(known)
        sizes = [self.sizes.count(name) for _ in range(rank)]
        shape = self.builder.emit(relax.op.tensor_to_shape(known))
        self.builder.match_cast(shape, relax.ShapeType(sizes))
        return sizes

    def _bind(self, name: str, output: Any, node: rules.Node) -> None:
        if isinstance(output, Known):
            self.known[name] = output
        elif isinstance(output, IndexExpression | Coordinates):
            self.index_expressions[name] = output
        else:
            value = self.checked(output.value, node.tensors())
            shape = shape_of(value)
            # Over less than its window an operator's output would have a negative size, and what
            # comes after divides by that.
            if node.op in _WINDOWS and not all(map(self.sizes.demand_positive, shape[2:])):
                raise ValueError(
                    "its window is larger than what it moves over; --input-shape can give more"
                )
            if all(isinstance(size, int) for size in shape) and 0 in shape:
                # No kernel need compute what has no elements, and few can.
                value = self.normalize(relax.op.zeros(shape, value.ty.dtype))
            self._tensors[name] = self._with_simple_sizes(value)

    def _with_simple_sizes(self, value: relax.Expr) -> relax.Expr:
        """Say which sizes are numbers by the bounds of dimensions, of which TVM knows nothing."""
        shape = shape_of(value)
        simple = [self.sizes.simplify(size) for size in shape]
        if sum(isinstance(size, int) for size in simple) == sum(
            isinstance(size, int) for size in shape
        ):
            return value
        return self.builder.match_cast(value, relax.TensorType(simple, value.ty.dtype))

    def tensor(self, name: str) -> relax.Expr:
        """Return a value of the graph as a run-time tensor."""
        if name not in self._tensors:
            if name in self.known:
                value = materialise(self.known[name])
            else:
                value = index_expressions.materialise(self.index_expressions[name], self.sizes)
            self._tensors[name] = self.normalize(value)
        return self._tensors[name]

    def shape(self, name: str) -> list[Size]:
        """Return the sizes of a value of the graph."""
        form = self.known.get(name) or self.index_expressions.get(name)
        if isinstance(form, Known | IndexExpression):
            return form.sizes_of_axes
        return shape_of(self.tensor(name))

    def dtype(self, name: str) -> str:
        """Return the element type of a value of the graph."""
        form = self.known.get(name) or self.index_expressions.get(name)
        if isinstance(form, Known | IndexExpression):
            return form.dtype
        return str(self.tensor(name).ty.dtype)

    def normalize(self, value: relax.Expr) -> relax.Expr:
        """Infer the type of an expression."""
        return self.builder.normalize(value)

    def definition(self, value: relax.Expr) -> relax.Expr:
        """Return what a variable is bound to."""
        bound = self.builder.lookup_binding(value) if isinstance(value, relax.Var) else None
        return value if bound is None else bound

    def by_tvm(self, node: rules.Node, inputs: Sequence[relax.Expr | None]) -> relax.Expr:
        """Convert a node as TVM does; several outputs come as a tuple."""
        return self._tvm.convert(node.op, inputs, node.attributes, node.outputs)

    def checked(self, value: relax.Expr, inputs: Sequence[relax.Expr | None]) -> relax.Expr:
        """Demand a known shape; where two symbolic sizes did not match, ask for them to be one, or
        for a dimension to be so small that they do."""
        type_ = value.ty
        if not isinstance(type_, relax.TensorType) or isinstance(type_.shape, relax.ShapeExpr):
            return value
        shapes = [shape_of(tensor) for tensor in inputs if tensor is not None]
        for first, second in combinations(shapes, 2):
            for one, other in zip(reversed(first), reversed(second), strict=False):
                self._demand_equal(one, other)
        shapes = [shape for shape in shapes if shape]
        if len(shapes) > 1 and any(not isinstance(size, int) for shape in shapes for size in shape):
            raise _misfit(shapes)
        raise ValueError("the shape of its output depends on the values of tensors")

    def demand_fitting(self, shape: Sequence[Size], target: Sequence[Size]) -> None:
        """Demand that each size of a shape is 1 or that of the target, whatever the inputs are."""
        for own, wanted in zip(reversed(shape), reversed(target), strict=False):
            if not self.sizes.equal(own, 1) and not self.sizes.equal(own, wanted):
                self._demand_equal(own, wanted)
                raise _misfit((shape, target))

    def _demand_equal(self, one: Size, other: Size) -> None:
        """Import anew where symbolic sizes can be made the same."""
        self.demand_same(one, other)
        if not self.sizes.equal(one, other) and (
            self.sizes.demand_equal(one, other) or self.sizes.demand_multiple(one, other)
        ):
            raise Narrower


def _misfit(shapes: Sequence[Sequence[Size]]) -> ValueError:
    texts = [f"[{', '.join(str(as_text(size)) for size in shape)}]" for shape in shapes]
    return ValueError(
        f"{' and '.join(texts)} fit each other for some sizes only, which --input-shape can give"
    )
