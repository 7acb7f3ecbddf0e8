"""Fewer instructions for the virtual machine, which is where small models spend their time.

TVM's lowering makes shapes, sizes and tensors anew for every kernel, and forgets every weight after
its use. An instruction takes 50 to 100 ns: nothing beside a large kernel, much beside a small one,
and thirteen layers of 256 features took 250 of them. Here shapes, sizes and tensors over the same
memory are made once, and what costs nothing to keep is kept until the program returns.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import tvm
from tvm import relax

_SAME_EACH_TIME = {"vm.builtin.make_shape", "vm.builtin.make_prim_value", "relax.vm.alloc_tensor"}
"""Shapes and sizes are read from a heap whose places are written once, before they are read, and
tensors are views of storage that is there."""

_KILL = "relax.vm.kill_object"

Expr = Any


def _shortened_module(module: tvm.IRModule, _context: Any) -> tvm.IRModule:
    for variable, function in module.functions_items():
        if isinstance(function, relax.Function):
            module.update_func(variable, _shortened(function))
    return module


def _shortened(function: relax.Function) -> relax.Function:
    """The function with fewer bindings; as it was where it branches, which ours do not."""
    bindings = [each for block in function.body.blocks for each in block.bindings]
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
        elif _callee(value) == _KILL and hash(value.args[0]) in self._weights:
            return None
        elif _callee(value) in _SAME_EACH_TIME:
            made = self._made.setdefault(_identity(value), binding.var)
            if not made.same_as(binding.var):
                self._instead[hash(binding.var)] = made
                return None
        return relax.VarBinding(binding.var, value)

    def renamed(self, expr: Expr) -> Expr:
        """An expression, flat as they are here, in terms of the variables that are left."""
        if isinstance(expr, relax.Var):
            return self._instead.get(hash(expr), expr)
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self.renamed(field) for field in expr.fields])
        if isinstance(expr, relax.TupleGetItem):
            return relax.TupleGetItem(self.renamed(expr.tuple_value), expr.index)
        if isinstance(expr, relax.Call):
            args = [self.renamed(arg) for arg in expr.args]
            if all(new.same_as(old) for new, old in zip(args, expr.args, strict=True)):
                return expr  # with its type, by which a result of nothing gets no register
            return relax.Call(expr.op, args, expr.attrs, expr.ty_args)
        return expr


def _last_kills(bindings: Sequence[Any]) -> list[Any]:
    """The bindings, of which a variable that several stood for is killed by the last kill only."""
    left: list[Any] = []
    killed: set[int] = set()
    for binding in reversed(bindings):
        if _callee(binding.value) == _KILL:
            variable = hash(binding.value.args[0])
            if variable in killed:
                continue
            killed.add(variable)
        left.append(binding)
    return left[::-1]


def _callee(value: Expr) -> str | None:
    if not isinstance(value, relax.Call):
        return None
    if isinstance(value.op, relax.ExternFunc):
        return str(value.op.global_symbol)
    return str(value.op.name) if isinstance(value.op, tvm.ir.Op) else None


def _identity(call: relax.Call) -> Hashable:
    """Equal for calls of one function with equal arguments."""
    return (_callee(call), *map(_argument, call.args))


def _argument(arg: Expr) -> Hashable:
    if isinstance(arg, relax.Var):
        return "variable", hash(arg)
    return str(arg)


shorten_program = tvm.transform.module_pass(_shortened_module, opt_level=0, name="ShortenProgram")
"""The pass; it comes after TVM's lowering to the virtual machine."""
