"""Storage for tensors whose sizes only run time knows, shared as that of known sizes is.

TVM's planning of memory lets tensors of known sizes take turns in few buffers. What has a symbolic
size gets a buffer of its own unless another one has the same expression for its size, so a model of
any size writes each layer's output to memory that has long left the caches. Here such storages take
turns, too. One that is shared is as large as the largest of those that it stands for, whatever the
sizes turn out to be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.sym import Analyzer

ALLOC_STORAGE = "relax.memory.alloc_storage"

_TYPICAL = 64
"""An extent that nobody knows, to guess which of two sizes is larger: only speed depends on it."""

_ALIKE = 8
"""How many times as large storages may be that share: a small one that is kept for long, as a
residual is, would hold memory that large ones take turns in, and leave them cold."""

Expr = Any


def _shared_module(module: tvm.IRModule, _context: Any) -> tvm.IRModule:
    for variable, function in module.functions_items():
        if isinstance(function, relax.Function):
            module.update_func(variable, _shared(function))
    return module


def _shared(function: relax.Function) -> relax.Function:
    """The function with fewer storages; as it was where it branches, which ours do not."""
    bindings = [each for block in function.body.blocks for each in block.bindings]
    if any(isinstance(each.value, relax.If) for each in bindings):
        return function
    buffers = _take_turns(list(_storages(function, bindings)))
    if not buffers:
        return function
    sizes = {hash(buffer.members[0].var): buffer.size for buffer in buffers}
    instead = {
        hash(member.var): buffer.members[0].var
        for buffer in buffers
        for member in buffer.members[1:]
    }
    kept = []
    for binding in bindings:
        if hash(binding.var) in instead:
            continue
        arguments = _arguments(binding, sizes, instead)
        if arguments is not None:
            call = binding.value
            value = relax.Call(call.op, arguments, call.attrs, call.ty_args)
            kept.append(relax.VarBinding(binding.var, value))
        else:
            kept.append(binding)
    body = relax.SeqExpr([relax.BindingBlock(kept)], function.body.body)
    return relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs)


def _arguments(binding: Any, sizes: dict[int, Expr], instead: dict[int, Expr]) -> list[Expr] | None:
    """What a call takes that makes a storage, or lies in one; None where nothing changes."""
    if hash(binding.var) in sizes:
        return [relax.ShapeExpr([sizes[hash(binding.var)]]), *binding.value.args[1:]]
    args = binding.value.args if isinstance(binding.value, relax.Call) else []
    if not any(hash(arg) in instead for arg in args):
        return None
    return [instead.get(hash(arg), arg) for arg in args]


@dataclass(frozen=True)
class _Storage:
    """A storage of symbolic size, and the bindings between which it is used."""

    var: relax.Var
    size: Expr
    guess: int
    kind: tuple[str, str]
    first: int
    last: int


@dataclass
class _Buffer:
    """What storages share that are of one kind, and of different times."""

    members: list[_Storage] = field(default_factory=list)

    @property
    def guess(self) -> int:
        return max(member.guess for member in self.members)

    @property
    def size(self) -> Expr:
        """The largest of its members' sizes, each asked for once."""
        sizes: list[Expr] = []
        for member in self.members:
            if not any(tvm_ffi.structural_equal(member.size, known) for known in sizes):
                sizes.append(member.size)
        largest = sizes[0]
        for size in sizes[1:]:
            largest = tirx.max(largest, size)
        return largest


def _take_turns(storages: Sequence[_Storage]) -> list[_Buffer]:
    """Buffers for all storages: each takes the smallest free one that may do, or the largest."""
    buffers: list[_Buffer] = []
    for storage in storages:
        free = [
            buffer
            for buffer in buffers
            if buffer.members[0].kind == storage.kind
            and max(buffer.guess, storage.guess) <= _ALIKE * min(buffer.guess, storage.guess)
            and all(member.last < storage.first for member in buffer.members)
        ]
        roomy = [buffer for buffer in free if buffer.guess >= storage.guess]
        if roomy:
            chosen = min(roomy, key=lambda buffer: buffer.guess)
        elif free:
            chosen = max(free, key=lambda buffer: buffer.guess)
        else:
            buffers.append(chosen := _Buffer())
        chosen.members.append(storage)
    return buffers


def _storages(function: relax.Function, bindings: Sequence[Any]) -> Iterator[_Storage]:
    """The storages whose size depends on the inputs' extents alone, in order."""
    known = _symbols(function)
    last_uses = _last_uses(bindings, function.body.body)
    for index, binding in enumerate(bindings):
        if not _makes_storage(binding.value):
            continue
        shape, device, scope = binding.value.args[:3]
        size = shape.values[0]
        variables = tirx.analysis.undefined_vars(size)
        if not variables or not all(hash(variable) in known for variable in variables):
            continue
        analyzer = Analyzer()
        for variable in variables:
            analyzer.bind(variable, tirx.IntImm("int64", _TYPICAL))
        guess = analyzer.simplify(size)
        last = last_uses.get(hash(binding.var), index)
        kept = last == len(bindings)  # a result is the caller's, who shall not hold more than that
        if isinstance(guess, tirx.IntImm) and not kept:
            kind = str(device), str(scope)
            yield _Storage(binding.var, size, int(guess), kind, index, last)


def _last_uses(bindings: Sequence[Any], result: Expr) -> dict[int, int]:
    """For each storage the last binding in which something that lies there is used.

    Whatever a kernel does not write lies where its operands do: views, tuples, other names.
    """
    lies: dict[int, set[int]] = {}
    last: dict[int, int] = {}
    for index, binding in enumerate(bindings):
        value = binding.value
        places: set[int] = set()
        for variable in relax.analysis.free_vars(value):
            places |= lies.get(hash(variable), set())
        for place in places:
            last[place] = index
        if _makes_storage(value):
            lies[hash(binding.var)] = {hash(binding.var)}
        elif not is_kernel(value):
            lies[hash(binding.var)] = places
    for variable in relax.analysis.free_vars(result):
        for place in lies.get(hash(variable), set()):
            last[place] = len(bindings)
    return last


def _makes_storage(value: Expr) -> bool:
    return isinstance(value, relax.Call) and getattr(value.op, "name", "") == ALLOC_STORAGE


def is_kernel(value: Expr) -> bool:
    """Whether it is a call that writes what it is handed and returns nothing."""
    called = isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar)
    return called and isinstance(value.ty, relax.TupleType) and not value.ty.fields


def _symbols(function: relax.Function) -> set[int]:
    """The symbols that the extents of inputs are."""
    found: set[int] = set()
    for param in function.params:
        shape = getattr(param.ty, "shape", None)
        for extent in getattr(shape, "values", None) or ():
            if isinstance(extent, tirx.Var):
                found.add(hash(extent))
    return found


share_storage = tvm.transform.module_pass(_shared_module, opt_level=0, name="ShareStorage")
"""The pass; it comes behind TVM's own planning of memory."""
