"""Fewer instructions for the virtual machine, which is where small models spend their time.

TVM's lowering makes shapes, sizes and tensors anew for every kernel, and forgets every weight after
its use. An instruction takes 50 to 100 ns: nothing beside a large kernel, much beside a small one,
and thirteen layers of 256 features took 250 of them. Here shapes, sizes and tensors over the same
memory are made once, and what costs nothing to keep is kept until the program returns.

``main`` takes all weights as one tuple, and takes it apart with an instruction per weight. A second
function, ``WEIGHTS_APART``, takes them one by one: a runtime binds them once, when it loads the
program. ``main`` calls it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import tvm
from tvm import relax

from sparse_tvm.vm import WEIGHTS_APART

_SAME_EACH_TIME = {"vm.builtin.make_shape", "vm.builtin.make_prim_value", "relax.vm.alloc_tensor"}
"""Shapes and sizes are read from a heap whose places are written once, before they are read, and
tensors are views of storage that is there."""

_KILL = "relax.vm.kill_object"

_CHECK_TUPLE = "vm.builtin.check_tuple_info"
"""That a tuple has so many fields: of weights apart the program knows by their number."""

Expr = Any


def _shortened_module(module: tvm.IRModule, _context: Any) -> tvm.IRModule:
    for variable, function in module.functions_items():
        if isinstance(function, relax.Function):
            shorter = _shortened(function)
            apart = _weights_apart(shorter) if variable.name_hint == "main" else None
            if apart is not None:
                called = tvm.ir.GlobalVar(WEIGHTS_APART)
                module.update_func(called, apart)
                shorter = _taking_apart(shorter, called)
            module.update_func(variable, shorter)
    return module


def _weights_apart(function: relax.Function) -> relax.Function | None:
    """The function with a parameter for each field of its last one, where that is but taken apart.

    None where there is no such tuple, or something else is done with it.
    """
    if not function.params or not isinstance(function.params[-1].ty, relax.TupleType):
        return None
    *inputs, weights = function.params
    fields = [relax.Var(f"weight_{i}", each) for i, each in enumerate(weights.ty.fields)]
    instead: dict[int, Expr] = {}
    kept = []
    for binding in _bindings(function):
        value = binding.value
        if isinstance(value, relax.TupleGetItem) and value.tuple_value.same_as(weights):
            instead[hash(binding.var)] = fields[value.index]
        elif callee_of(value) != _CHECK_TUPLE or not value.args[0].same_as(weights):
            kept.append(relax.VarBinding(binding.var, _renamed(value, instead)))
    body = relax.SeqExpr([relax.BindingBlock(kept)], _renamed(function.body.body, instead))
    if any(variable.same_as(weights) for variable in relax.analysis.free_vars(body)):
        return None
    made = relax.Function([*inputs, *fields], body, function.ret_ty, function.is_pure)
    return made.with_attr("global_symbol", WEIGHTS_APART)


def _taking_apart(function: relax.Function, called: tvm.ir.GlobalVar) -> relax.Function:
    """A function of the same parameters that calls the one with weights apart."""
    *inputs, weights = params = [relax.Var(each.name, each.ty) for each in function.params]
    fields = [relax.Var(f"weight_{i}", each) for i, each in enumerate(weights.ty.fields)]
    bindings = [
        relax.VarBinding(field, relax.TupleGetItem(weights, i)) for i, field in enumerate(fields)
    ]
    result = relax.Var("result", function.ret_ty)
    bindings.append(relax.VarBinding(result, relax.Call(called, [*inputs, *fields])))
    body = relax.SeqExpr([relax.BindingBlock(bindings)], result)
    return relax.Function(params, body, function.ret_ty, function.is_pure, function.attrs)


def _bindings(function: relax.Function) -> list[Any]:
    return [each for block in function.body.blocks for each in block.bindings]


def _shortened(function: relax.Function) -> relax.Function:
    """The function with fewer bindings; as it was where it branches, which ours do not."""
    bindings = _bindings(function)
    if any(isinstance(each.value, relax.If) for each in bindings):
        return function
    sharing = _Sharing(function.params)
    kept = list(filter(None, map(sharing.kept, bindings)))
    body = relax.SeqExpr(
        [relax.BindingBlock(_last_kills(kept))], sharing.renamed(function.body.body)
    )
    return relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs)


class _Sharing:
    """Variables that took the place of others, by identity: ``==`` would build a comparison."""

    def __init__(self, parameters: Sequence[Expr]) -> None:
        self._parameters = set(map(hash, parameters))
        self._made: dict[Hashable, Expr] = {}
        self._instead: dict[int, Expr] = {}
        self._weights: set[int] = set()

    def kept(self, binding: Any) -> Any:
        """A binding in terms of the variables that are left; None where it is not needed."""
        value = self.renamed(binding.value)
        if isinstance(value, relax.TupleGetItem) and hash(value.tuple_value) in self._parameters:
            self._weights.add(hash(binding.var))
        elif callee_of(value) == _KILL and hash(value.args[0]) in self._weights:
            return None
        elif callee_of(value) in _SAME_EACH_TIME or _is_size(binding.value):
            made = self._made.setdefault(_identity(value), binding.var)
            if not made.same_as(binding.var):
                self._instead[hash(binding.var)] = made
                return None
        return relax.VarBinding(binding.var, value)

    def renamed(self, expr: Expr) -> Expr:
        """An expression in terms of the variables that are left."""
        return _renamed(expr, self._instead)


def _renamed(expr: Expr, instead: dict[int, Expr]) -> Expr:
    """An expression, flat as they are here, with some variables in place of others."""
    if isinstance(expr, relax.Var):
        return instead.get(hash(expr), expr)
    if isinstance(expr, relax.Tuple):
        return relax.Tuple([_renamed(field, instead) for field in expr.fields])
    if isinstance(expr, relax.TupleGetItem):
        return relax.TupleGetItem(_renamed(expr.tuple_value, instead), expr.index)
    if isinstance(expr, relax.Call):
        args = [_renamed(arg, instead) for arg in expr.args]
        if all(new.same_as(old) for new, old in zip(args, expr.args, strict=True)):
            return expr  # with its type, by which a result of nothing gets no register
        return relax.Call(expr.op, args, expr.attrs, expr.ty_args)
    return expr


def _last_kills(bindings: Sequence[Any]) -> list[Any]:
    """The bindings, of which a variable that several stood for is killed by the last kill only."""
    left: list[Any] = []
    killed: set[int] = set()
    for binding in reversed(bindings):
        if callee_of(binding.value) == _KILL:
            variable = hash(binding.value.args[0])
            if variable in killed:
                continue
            killed.add(variable)
        left.append(binding)
    return left[::-1]


def _is_size(value: Expr) -> bool:
    """Whether a function of the module computes a size from others, as it does each time."""
    called = isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar)
    return called and isinstance(value.ty, tvm.ir.PrimType)


def callee_of(value: Expr) -> str | None:
    """What a value calls, by its name; None where it is no call."""
    if not isinstance(value, relax.Call):
        return None
    if isinstance(value.op, tvm.ir.GlobalVar):
        return str(value.op.name_hint)
    if isinstance(value.op, relax.ExternFunc):
        return str(value.op.global_symbol)
    return str(value.op.name) if isinstance(value.op, tvm.ir.Op) else None


def _identity(call: relax.Call) -> Hashable:
    """Equal for calls of one function with equal arguments."""
    return (callee_of(call), *map(_argument, call.args))


def _argument(arg: Expr) -> Hashable:
    if isinstance(arg, relax.Var):
        return "variable", hash(arg)
    return str(arg)


shorten_program = tvm.transform.module_pass(_shortened_module, opt_level=0, name="ShortenProgram")
"""The pass; it comes after TVM's lowering to the virtual machine."""
