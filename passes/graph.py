"""Looking at, and rebuilding, the one dataflow block of ``main``.

A pass subclasses :class:`Rewrite`: for each binding it may return a replacement, built from the
*original* graph (``self.graph``), whose operands are translated by ``self.new(...)``. Bindings
nobody uses any more disappear, so a pass replaces the last binding of a pattern and no other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.sym import Analyzer

from sparse_tvm.passes.program import Program

Expr = Any

_ANALYZER = Analyzer()

INJECTIVE = 2
"""Relax's ``op_pattern`` of functions each of whose outputs is made of a few elements."""

OPAQUE = 8
"""Relax's ``op_pattern`` of functions into which nothing may be fused."""


def shape_of(expr: Expr) -> tuple[Any, ...]:
    """Shape of a tensor expression: numbers, or expressions where it depends on symbols."""
    return tuple(int(dim) if isinstance(dim, tirx.IntImm) else dim for dim in expr.ty.shape.values)


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are equal whatever the values of their symbols."""
    return len(a) == len(b) and all(map(same_dim, a, b))


def same_dim(a: Any, b: Any) -> bool:
    """Whether two extents are equal whatever the values of their symbols."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(_ANALYZER.can_prove_equal(a, b))


def product(dims: Iterable[Any]) -> Any:
    """Product of extents, a number if all of them are."""
    result: Any = 1
    for dim in dims:
        result = dim if isinstance(result, int) and result == 1 else result * dim
    return result


def dtype_of(expr: Expr) -> str:
    """Element type of a tensor expression."""
    return str(expr.ty.dtype)


def is_tensor(expr: Expr) -> bool:
    """Whether the expression is a tensor whose shape is known, if only by symbols."""
    type_ = getattr(expr, "ty", None)
    return isinstance(type_, relax.TensorType) and isinstance(type_.shape, relax.ShapeExpr)


def is_number(expr: Expr) -> bool:
    """Whether an expression is a symbolic extent, or made of such, rather than a tensor."""
    return isinstance(expr.ty, tvm.ir.PrimType)


def same(a: Expr, b: Expr) -> bool:
    """Whether both are one and the same expression (``==`` would build a comparison)."""
    return a is not None and b is not None and bool(a.same_as(b))


def op_name(expr: Expr) -> str | None:
    """``"relax.matmul"`` for a call of that operator, else None."""
    if isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op):
        return str(expr.op.name)
    return None


def constant_value(expr: Expr) -> np.ndarray | None:
    """The array behind a constant, else None."""
    if isinstance(expr, tvm.ir.GenericConst):
        value: np.ndarray = expr.value.numpy()
        return value
    return None


def scalar_value(expr: Expr) -> float | None:
    """The number behind a constant with one element, else None."""
    value = constant_value(expr)
    return float(value.reshape(())[()]) if value is not None and value.size == 1 else None


class Graph:
    """Definitions and uses in ``main`` as a pass finds it."""

    def __init__(self, function: relax.Function) -> None:
        self.function = function
        self.bindings = [b for block in function.body.blocks for b in block.bindings]
        self.result = function.body.body
        self._value = {binding.var: binding.value for binding in self.bindings}
        self._users: dict[Any, int] = {}
        for expr in (*(b.value for b in self.bindings), self.result):
            for operand in _operands(expr):
                self._users[operand] = self._users.get(operand, 0) + 1

    def value(self, expr: Expr) -> Expr:
        """What a variable is bound to (through plain copies); anything else is itself."""
        while isinstance(expr, relax.Var) and expr in self._value:
            value = self._value[expr]
            if not isinstance(value, relax.Var):
                return value
            expr = value
        return expr

    def op(self, expr: Expr, *names: str) -> relax.Call | None:
        """The call that defines ``expr``, if it calls one of ``relax.<names>``."""
        value = self.value(expr)
        name = op_name(value)
        return value if name is not None and name.removeprefix("relax.") in names else None

    def uses(self, expr: Expr) -> int:
        """How many places read this variable."""
        return self._users.get(expr, 0)

    def used_once(self, expr: Expr) -> bool:
        """Whether one place reads this variable."""
        return self.uses(expr) == 1

    def operands(self, call: relax.Call, want: Any) -> Iterable[tuple[Expr, Expr]]:
        """Both orders of a binary call's operands for which ``want(second)`` holds."""
        a, b = call.args
        return [(x, y) for x, y in ((a, b), (b, a)) if want(y)]


def _operands(expr: Expr) -> list[Any]:
    if isinstance(expr, relax.Var):
        return [] if is_number(expr) else [expr]
    if isinstance(expr, relax.Call):
        return [v for arg in expr.args for v in _operands(arg)]
    if isinstance(expr, relax.Tuple):
        return [v for field in expr.fields for v in _operands(field)]
    if isinstance(expr, relax.TupleGetItem):
        return _operands(expr.tuple_value)
    return []


class Rewrite:
    """Base of the graph passes: walks ``main`` once and rebuilds it."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = Graph(program.module["main"])
        self.builder = relax.BlockBuilder(program.module)
        self._new: dict[Any, Expr] = {}
        self._new_weights: dict[str, relax.Var] = {}

    def rewrite(self, var: relax.Var, value: Expr) -> Expr | None:
        """Return the replacement of one binding's value, or None to keep it."""
        raise NotImplementedError

    def bind(self, var: relax.Var, value: Expr) -> None:
        """Let ``value`` stand for ``var`` from here on."""
        self._new[var] = value if isinstance(value, relax.Var) else self.emit(value, var.name)

    def new(self, expr: Expr) -> Expr:
        """Translate an expression of the original graph into the new one."""
        if isinstance(expr, relax.Var):
            return expr if is_number(expr) else self._new[expr]
        if isinstance(expr, relax.Call):
            args = [self.new(arg) for arg in expr.args]
            return relax.Call(expr.op, args, expr.attrs, expr.ty_args)
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self.new(field) for field in expr.fields])
        if isinstance(expr, relax.TupleGetItem):
            return relax.TupleGetItem(self.new(expr.tuple_value), expr.index)
        return expr

    def emit(self, expr: Expr, name: str = "") -> relax.Var:
        """Add a binding to the new graph."""
        return self.builder.emit(expr, name)

    def weight(self, name: str, array: np.ndarray) -> relax.Var:
        """Add a weight to the program, once per name, and return its parameter.

        The parameter is called otherwise where the model has a weight of that name.
        """
        if name not in self._new_weights:
            free = name
            while free in self.program.weights:
                free += "_"
            self.program.weights[free] = array
            self._new_weights[name] = relax.Var(
                free, relax.TensorType(array.shape, str(array.dtype))
            )
        return self._new_weights[name]

    def array(self, expr: Expr) -> np.ndarray | None:
        """The values of a weight parameter or a constant, else None."""
        value = self.graph.value(expr)
        if isinstance(value, relax.Var):
            return self.program.weights.get(value.name)
        return constant_value(value)

    def run(self) -> Program:
        """Rebuild ``main`` binding by binding."""
        old = self.graph.function
        self._new.update({param: param for param in old.params})
        with self.builder.function("rebuilt", list(old.params)):
            with self.builder.dataflow():
                for binding in self.graph.bindings:
                    if isinstance(binding, relax.MatchCast):  # defines sizes that depend on data
                        value = self.new(binding.value)
                        self._new[binding.var] = self.builder.match_cast(value, binding.ty)
                        continue
                    replacement = self.rewrite(binding.var, binding.value)
                    if replacement is None:
                        replacement = self.new(binding.value)
                    self.bind(binding.var, replacement)
                result = self.builder.emit_output(self.new(self.result_expr()))
            self.builder.emit_func_output(result)
        self.program.module = self._with_main()
        return self.program

    def result_expr(self) -> Expr:
        """What ``main`` returns, in terms of the original graph."""
        return self.graph.result

    def _with_main(self) -> tvm.IRModule:
        """Install the new ``main`` with exactly the weights that it uses as parameters."""
        module = self.builder.finalize()
        function = module["rebuilt"]
        function = relax.Function(
            [*function.params, *self._new_weights.values()],
            function.body,
            function.ret_ty,
            function.is_pure,
            tvm.ir.make_node("ir.DictAttrs", num_input=self.program.num_input),
        )
        del module["rebuilt"]
        module["main"] = function.with_attr("global_symbol", "main")
        return drop_unused(self.program, module)


def drop_unused(program: Program, module: tvm.IRModule) -> tvm.IRModule:
    """Remove dead bindings, and weights that no binding reads."""
    main = relax.analysis.remove_all_unused(module["main"])
    inputs = program.num_input
    used = set(relax.analysis.free_vars(main.body))
    params = [*main.params[:inputs], *(p for p in main.params[inputs:] if p in used)]
    program.weights = {p.name: program.weights[p.name] for p in params[inputs:]}
    module["main"] = relax.Function(params, main.body, main.ret_ty, main.is_pure, main.attrs)
    return module
