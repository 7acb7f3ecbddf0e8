"""The whole program as one function of the library, where it is a straight run of kernels.

TVM's virtual machine decodes instructions, makes shapes and tensors, counts references to weights
and hands them over one by one, and each kernel checks all its operands: nothing beside a large
kernel, half of a small model's time. Here `STRAIGHT` is made, which calls the kernels in turn with
addresses. It takes inputs and outputs, memory for what lies in between, and a table of the weights'
addresses; it returns 0, or how many bytes that memory needs where it has fewer, and has done
nothing then.

The kernels' code is there once: `STRAIGHT` calls a kernel's body, and so does the function that
the virtual machine calls (`object_code.py`). The machine's program stays, for the first runs,
large models, traces and other runtimes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import tvm
from tvm import relax, s_tir, tirx

from sparse_tvm.backends.share_storage import ALLOC_STORAGE, is_kernel
from sparse_tvm.backends.shorten_program import callee_of
from sparse_tvm.vm import CONSTANTS, STRAIGHT

BODY_ATTRIBUTE = "sparse_tvm.body"
"""The symbol of a function's body, which takes what `parameters_of` lists."""

_ALIGNMENT = 64
"""Bytes, of each storage in the workspace."""

_ALLOC_TENSOR = "relax.memory.alloc_tensor"
_ALLOC_UNPLANNED = "relax.builtin.alloc_tensor"

Expr = Any


class _NotStraightError(Exception):
    """The program has something that is neither a kernel nor memory."""


def parameters_of(function: tirx.PrimFunc) -> list[Expr]:
    """What a function's body takes: data of buffers or numbers, in order, then its symbols.

    Symbols are the variables that buffers' extents are, and no number is.
    """
    return [*_own_parameters(function), *symbols_of(function)]


def _own_parameters(function: tirx.PrimFunc) -> list[Expr]:
    return [each.data if is_buffer(each) else each for each in function.params]


def symbols_of(function: tirx.PrimFunc) -> list[tirx.Var]:
    """The variables that a function learns from extents of its buffers."""
    numbers = {hash(param) for param in function.params}
    found: dict[int, tirx.Var] = {}
    for buffer in filter(is_buffer, function.params):
        for extent in buffer.shape:
            if isinstance(extent, tirx.Var) and hash(extent) not in numbers:
                found.setdefault(hash(extent), extent)
    return list(found.values())


def is_buffer(param: tirx.Var) -> bool:
    """Whether a parameter is a buffer, and no number."""
    return isinstance(param.ty, tirx.BufferType)


def _straightened(module: tvm.IRModule, _context: Any) -> tvm.IRModule:
    try:
        program = _Straight(module)
    except _NotStraightError:
        return module
    for variable in program.called:
        marked = module[variable].with_attr(BODY_ATTRIBUTE, _symbol_of(variable))
        module.update_func(variable, marked)
    module.update_func(tvm.ir.GlobalVar(STRAIGHT), program.function())
    module.update_func(tvm.ir.GlobalVar(CONSTANTS), program.constants())
    return module


class _Straight:
    """The function in the making."""

    def __init__(self, module: tvm.IRModule) -> None:
        self._module, main = module, module["main"]
        *inputs, weights = main.params
        if not isinstance(weights.ty, relax.TupleType):
            raise _NotStraightError
        self.called: dict[tvm.ir.GlobalVar, None] = {}
        self._symbols: set[int] = set()
        self._weights = weights
        self._layout: list[tirx.Stmt] = []
        self._calls: list[Expr] = []
        self._workspace = tirx.decl_buffer(
            (tirx.Var("workspace_bytes", "int64"),), "uint8", "workspace", layout=None
        )
        self._constants: list[Expr] = []
        self._tuples: set[int] = set()  # of which only the result is made, and nothing taken
        self._addresses = tirx.decl_buffer(
            (tirx.Var("tensors", "int64"),), "int64", "addresses", layout=None
        )
        self._bytes: Expr = tirx.IntImm("int64", 0)
        self._learn_symbols(inputs)
        self._inputs = [self._buffer(each) for each in inputs]
        self._places: dict[int, Expr] = {
            hash(each): buffer.data for each, buffer in zip(inputs, self._inputs, strict=True)
        }
        bindings = [each for block in main.body.blocks for each in block.bindings]
        self._outputs = self._output_buffers(bindings, main.body.body)
        for binding in bindings:
            self._add(binding.var, binding.value)

    def function(self) -> tirx.PrimFunc:
        """Return what was made."""
        enough = tirx.IfThenElse(
            self._workspace.shape[0] < self._bytes, tirx.Return(self._bytes), None
        )
        failed = tirx.Evaluate(tirx.tvm_throw_last_error())
        calls = [tirx.IfThenElse(tirx.NE(call, 0), failed, None) for call in self._calls]
        done = tirx.Return(tirx.IntImm("int64", 0))
        made = tirx.PrimFunc(
            [*self._inputs, *self._outputs.values(), self._workspace, self._addresses],
            tirx.SeqStmt([*self._layout, enough, *calls, done]),
            tvm.ir.PrimType("int64"),
        )
        return s_tir.renew_defs(made).with_attr("global_symbol", STRAIGHT)  # the symbols are main's

    def constants(self) -> relax.Function:
        """A function that returns the program's own tensors, which follow weights in the table."""
        result = relax.Tuple(self._constants)
        body = relax.SeqExpr([], result)
        return relax.Function([], body, result.ty).with_attr("global_symbol", CONSTANTS)

    def _learn_symbols(self, inputs: Sequence[relax.Var]) -> None:
        for each in inputs:
            for extent in _extents(each):
                if isinstance(extent, tirx.Var):
                    self._symbols.add(hash(extent))

    def _expr(self, expr: Expr) -> Expr:
        """An expression, all of whose symbols the function has to know."""
        variables = tirx.analysis.undefined_vars(expr)
        if not all(hash(variable) in self._symbols for variable in variables):
            raise _NotStraightError
        return expr

    def _buffer(self, var: relax.Var) -> Expr:
        shape = [self._expr(extent) for extent in _extents(var)]
        return tirx.decl_buffer(shape, str(var.ty.dtype), var.name, layout=None)

    def _output_buffers(self, bindings: Sequence[Any], result: Expr) -> Mapping[int, Expr]:
        """Of each tensor that is returned its buffer, by the variable that it is allocated as."""
        values = {hash(each.var): each.value for each in bindings}
        alone = _alone_in_memory(bindings)
        while isinstance(result, relax.Var) and isinstance(
            values.get(hash(result)), relax.Var | relax.Tuple
        ):
            result = values[hash(result)]
        fields = result.fields if isinstance(result, relax.Tuple) else [result]
        buffers: dict[int, Expr] = {}
        for returned in fields:
            var = returned
            while (source := _same_memory(values.get(hash(var)))) is not None:
                var = source
            if hash(var) not in alone or hash(var) in buffers:
                raise _NotStraightError
            buffers[hash(var)] = self._buffer(returned)
        return buffers

    def _add(self, var: relax.Var, value: Expr) -> None:
        """Take a binding over: where its variable lies, or a call."""
        callee, source = callee_of(value), _same_memory(value)
        if isinstance(value, relax.Tuple) or (source is not None and hash(source) in self._tuples):
            self._tuples.add(hash(var))
        elif source is not None:
            self._places[hash(var)] = self._place(source)
        elif isinstance(value, relax.TupleGetItem) and value.tuple_value.same_as(self._weights):
            self._places[hash(var)] = self._address(value.index)
        elif hash(var) in self._outputs:
            self._places[hash(var)] = self._outputs[hash(var)].data
        elif callee == ALLOC_STORAGE:
            self._places[hash(var)] = self._bytes
            size = self._expr(value.args[0].values[0])
            end = tirx.Var(f"{var.name}_end", "int64")
            units = tirx.floordiv(size + (_ALIGNMENT - 1), _ALIGNMENT)
            self._layout.append(tirx.Bind(end, self._bytes + units * _ALIGNMENT))
            self._bytes = end
        elif callee == _ALLOC_TENSOR:
            offset = self._place(value.args[0]) + self._expr(value.args[1])
            self._places[hash(var)] = tirx.address_of(self._workspace[offset])
        elif is_kernel(value):
            self._call(value)
        else:
            raise _NotStraightError

    def _address(self, index: int) -> Expr:
        return tirx.reinterpret("handle", self._addresses[index])

    def _place(self, expr: Expr) -> Expr:
        """Where a tensor lies: its address, or its storage's offset in the workspace."""
        if isinstance(expr, tvm.ir.GenericConst):
            self._constants.append(expr)
            return self._address(len(self._weights.ty.fields) + len(self._constants) - 1)
        place = self._places.get(hash(expr)) if isinstance(expr, relax.Var) else None
        if place is None:
            raise _NotStraightError
        return place

    def _call(self, call: relax.Call) -> None:
        """Call a kernel's body with addresses, numbers and what extents tell the kernel."""
        kernel = self._module[call.op]
        if not isinstance(kernel, tirx.PrimFunc):
            raise _NotStraightError
        arguments, known = [], {}
        for param, arg in zip(kernel.params, call.args, strict=True):
            if is_buffer(param):
                if param.strides or not isinstance(param.elem_offset, tirx.IntImm):
                    raise _NotStraightError
                arguments.append(self._place(arg))
                for name, extent in zip(param.shape, _extents(arg), strict=True):
                    known[hash(name)] = self._expr(extent)
            else:
                arguments.append(self._expr(arg).astype(str(param.ty.dtype)))
        for symbol in symbols_of(kernel):
            arguments.append(known[hash(symbol)].astype(str(symbol.ty.dtype)))
        self.called[call.op] = None
        self._calls.append(tirx.call_extern("int32", _symbol_of(call.op), *arguments))


def _symbol_of(kernel: tvm.ir.GlobalVar) -> str:
    """The symbol of a kernel's body."""
    return f"{kernel.name_hint}_body"


def _extents(expr: Expr) -> Sequence[Expr]:
    shape = getattr(expr.ty, "shape", None)
    if not isinstance(shape, relax.ShapeExpr):
        raise _NotStraightError
    return list(shape.values)


def _alone_in_memory(bindings: Sequence[Any]) -> set[int]:
    """The variables of tensors whose storage has no other."""
    made = [each for each in bindings if callee_of(each.value) == _ALLOC_TENSOR]
    tensors = Counter(hash(each.value.args[0]) for each in made)
    alone = {hash(each.var) for each in made if tensors[hash(each.value.args[0])] == 1}
    unplanned = {hash(e.var) for e in bindings if callee_of(e.value) == _ALLOC_UNPLANNED}
    return alone | unplanned


def _same_memory(value: Expr) -> relax.Var | None:
    """The variable whose memory a value is: another name for it, or another shape."""
    if isinstance(value, relax.Var):
        return value
    return value.args[0] if callee_of(value) == "relax.reshape" else None


straight_program = tvm.transform.module_pass(_straightened, opt_level=0, name="StraightProgram")
"""The pass; it comes behind all planning of memory."""
