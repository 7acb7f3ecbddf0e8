"""One rule per ONNX operator, and what a rule is given.

A rule is tried with its inputs in each form in which they can be had: `Known`, then
`IndexExpression`, then `Tensor`. It returns the outputs in that form; raises `NotInForm` to be
tried with the next one; and returns None to leave a node of run-time tensors to TVM's importer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import onnx
from tvm import relax
from tvm.ir import GenericConst

from sparse_tvm.frontends.importer import index_expressions
from sparse_tvm.frontends.importer.forms import Form, NotInForm
from sparse_tvm.frontends.importer.index_expressions import Coordinates, IndexExpression
from sparse_tvm.frontends.importer.known import MAX_ELEMENTS, Known
from sparse_tvm.frontends.importer.sizes import Size
from sparse_tvm.frontends.importer.tensors import Scope, Tensor

FORMS: tuple[type[Form], ...] = (Known, IndexExpression, Tensor)
"""In the order in which they are tried."""


class Values(Scope, Protocol):
    """What is known of the tensors of a graph, by name."""

    known: dict[str, Known]
    index_expressions: dict[str, IndexExpression | Coordinates]

    def tensor(self, name: str) -> relax.Expr:
        """Return a value of the graph as a run-time tensor."""

    def by_tvm(self, node: Node, inputs: Sequence[relax.Expr | None]) -> relax.Expr:
        """Convert a node of run-time tensors as TVM's importer does."""

    def checked(self, value: relax.Expr, inputs: Sequence[relax.Expr | None]) -> relax.Expr:
        """Demand that the shape of what was computed from `inputs` is known."""

    def fields(self, value: Tensor) -> tuple[Tensor, ...]:
        """Take a tuple apart."""

    def demand_same(self, one: Size, other: Size) -> None:
        """Make one dimension of two symbolic ones, where they are."""

    def compute(self, function: Callable[..., Any], *arguments: Any, name: str) -> relax.Expr:
        """Return what a function of tensor expressions computes, as a loop nest called `name`."""

    def counts(self, vector: relax.Expr, name: str) -> list[Size]:
        """Return the elements of an int64 vector as symbolic sizes, called by `name`."""

    def shape(self, name: str) -> list[Size]:
        """Return the sizes of a value of the graph."""

    def dtype(self, name: str) -> str:
        """Return the element type of a value of the graph."""


class Node:
    """An ONNX node with its inputs at hand, in one form.

    Attributes
    ----------
    op : str
        The operator.
    opset : int
        The version of the operator set.
    attributes : dict[str, Any]
        By name; those left out are absent.
    outputs : int
        How many outputs the node has.
    form : type[Form]
        The form of the inputs.
    sizes : Sizes
        What is known of the symbolic dimensions.
    """

    def __init__(
        self, node: onnx.NodeProto, values: Values, attributes: dict[str, Any], opset: int
    ) -> None:
        self.op, self.opset = node.op_type, opset
        self.attributes = attributes
        self.names = list(node.input)
        self.output_names = list(node.output)
        self.form: type[Form] = Tensor
        self.scope: Values = values
        self.sizes = values.sizes

    @property
    def outputs(self) -> int:
        """How many outputs the node has."""
        return len(self.output_names)

    def wants(self, output: int) -> bool:
        """Whether an output is used."""
        return output < self.outputs and bool(self.output_names[output])

    def has(self, position: int) -> bool:
        """Whether an input is given."""
        return bool(self._name(position))

    def can_have(self, form: type[Form]) -> bool:
        """Whether all inputs can be had in a form."""
        given = [name for name in self.names if name]
        if form is Tensor:
            return True
        known, expressions = self.scope.known, self.scope.index_expressions
        return bool(given) and all(
            name in known or (form is IndexExpression and name in expressions) for name in given
        )

    def input(self, position: int) -> Any:
        """Return an input in the form that is being tried."""
        if not self.has(position):
            raise NotInForm
        if self.form is Tensor:
            return Tensor(self.tensor(position), self.scope)
        found = self.known(position) if self.form is Known else self.index_expression(position)
        if found is None:
            raise NotInForm
        return found

    def inputs(self) -> list[Any]:
        """Return all inputs that are given, in the form that is being tried."""
        return [self.input(position) for position, name in enumerate(self.names) if name]

    def known(self, position: int) -> Known | None:
        """Return an input's elements, where they follow from constants and sizes."""
        return self.scope.known.get(self._name(position))

    def index_expression(self, position: int) -> IndexExpression | None:
        """Return an input as an expression of its elements' indices, where it is one."""
        value = self.scope.index_expressions.get(self._name(position))
        known = self.known(position)
        if value is None and known is not None:
            value = index_expressions.from_known(known, self.sizes)
        return value if isinstance(value, IndexExpression) else None

    def coordinates(self, position: int) -> Sequence[IndexExpression]:
        """Return the expressions that an input stacks along its last axis; none if not so."""
        value = self.scope.index_expressions.get(self._name(position))
        return value.parts if isinstance(value, Coordinates) else ()

    def tensor(self, position: int) -> relax.Expr:
        """Return an input as a run-time tensor."""
        return self.scope.tensor(self._name(position))

    def tensors(self) -> list[relax.Expr | None]:
        """Return all inputs as run-time tensors, None for those left out."""
        return [self.scope.tensor(name) if name else None for name in self.names]

    def constant(self, position: int) -> Any:
        """Return an input's elements as a NumPy array; None if they are not constant."""
        known = self.known(position)
        if known is not None and known.is_constant:
            return known.constant()
        name = self._name(position)
        if not name or known is not None or name in self.scope.index_expressions:
            return None
        value = self.scope.tensor(name)
        return value.value.numpy() if isinstance(value, GenericConst) else None

    def scalar(self, position: int) -> Any:
        """Return the number that an input is; None if it is no constant of one element."""
        array = self.constant(position)
        return array.item() if array is not None and array.size == 1 else None

    def shape(self, position: int) -> list[Size]:
        """Return an input's sizes."""
        return self.scope.shape(self._name(position))

    def dtype(self, position: int) -> str:
        """Return an input's element type."""
        return self.scope.dtype(self._name(position))

    def axis(self, default: int = 0, rank: int | None = None) -> int:
        """Return the attribute ``axis``, counted from 0."""
        axis: int = self.attributes.get("axis", default)
        return axis % (len(self.shape(0)) if rank is None else rank)

    def axes(self, position: int, rank: int | None = None) -> list[int] | None:
        """Return axes, counted from 0, from an input, or in older opsets an attribute."""
        if "axes" in self.attributes:
            listed = list(self.attributes["axes"])
        elif self.has(position):
            listed = self.integers(position)
        else:
            return None
        return [axis % (len(self.shape(0)) if rank is None else rank) for axis in listed]

    def vector(self, position: int, default: Sequence[Size] | None = None) -> list[Size]:
        """Return the elements of an input that holds sizes.

        Raises
        ------
        ValueError
            When they depend on data.
        """
        if not self.has(position) and default is not None:
            return list(default)
        known = self.known(position)
        if known is not None:
            return known.sizes()
        array = self.constant(position)
        if array is None:
            raise ValueError("a shape depends on the values of tensors")
        listed: list[Size] = array.reshape(-1).tolist()
        return listed

    def integers(self, position: int, default: Sequence[int] | None = None) -> list[int]:
        """Return the elements of an input that holds plain integers."""
        vector = self.vector(position, default)
        if not all(isinstance(element, int) for element in vector):
            raise ValueError("a parameter of it depends on symbolic sizes")
        return [int(element) for element in vector]

    def emit(self, value: relax.Expr) -> Tensor:
        """Return an expression as a tensor, its type inferred."""
        return Tensor(self.scope.normalize(value), self.scope)

    def compute(self, function: Callable[..., Any], *arguments: Any, name: str) -> Tensor:
        """Return what a function of tensor expressions computes, as a loop nest called `name`."""
        return Tensor(self.scope.compute(function, *arguments, name=name), self.scope)

    def fields(self, value: Tensor) -> tuple[Tensor, ...]:
        """Take a tuple apart."""
        return self.scope.fields(value)

    def counts(self, vector: relax.Expr) -> list[Size]:
        """Return the elements of an int64 vector, read at run time, as sizes."""
        return self.scope.counts(self.scope.normalize(vector), self.op.lower())

    def depends_on_data(self, position: int) -> bool:
        """Whether the elements of an input are known at run time only."""
        return self.known(position) is None and self.constant(position) is None

    def _name(self, position: int) -> str:
        return self.names[position] if position < len(self.names) else ""


Rule = Callable[[Node], Any]
"""Returns an output, a tuple of outputs, or None."""

RULES: dict[str, Rule] = {}
"""By operator."""


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Register the rule of operators."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(operators, function))
        return function

    return register


def apply(node: Node) -> tuple[Any, ...] | None:
    """Return a node's outputs, in the first form that allows it; None to leave it to TVM."""
    function = RULES.get(node.op)
    if function is None:
        return None
    for form in FORMS:
        if not node.can_have(form):
            continue
        node.form = form
        try:
            outputs = function(node)
        except NotInForm:
            continue
        except (ArithmeticError, IndexError, TypeError, ValueError):
            if form is Tensor:
                raise
            continue
        if outputs is None:
            continue
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not any(isinstance(o, Known) and o.elements.size > MAX_ELEMENTS for o in outputs):
            return outputs
    node.form = Tensor
    return None
