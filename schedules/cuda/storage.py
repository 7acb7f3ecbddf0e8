"""Functions of float32 made to read and write their tensors as float16 or bfloat16."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tvm import ir, s_tir, te, tirx
from tvm_ffi import structural_map

from sparse_tvm.schedules.cuda.weights import LARGEST_HALF

HALF = "float16"

LARGEST = {HALF: LARGEST_HALF, "bfloat16": 3.3895313892515355e38}
"""The largest numbers of types that values are stored as."""


def stored_as(function: tirx.PrimFunc, dtypes: Sequence[str]) -> tirx.PrimFunc | None:
    """The function with parameters of these element types, computing as before.

    Tensors that it reads come first, those that it writes last. What it writes and reads again, as
    sums are, is complete before it is converted.

    Returns
    -------
    tirx.PrimFunc | None
        None where a tensor is handed on as a whole, to something that wants it as it was.
    """
    tensors = function.params[: len(dtypes)]
    changed = {
        param: tirx.decl_buffer(param.shape, dtype, name=param.name)
        for param, dtype in zip(tensors, dtypes, strict=True)
        if str(param.dtype) != dtype
    }
    if not changed:
        return function
    written, read = _accessed(function.body)
    sums = {
        param: tirx.decl_buffer(param.shape, param.dtype, name=f"{param.name}_sum")
        for param in changed
        if param in written and param in read
    }
    body = _Storage({p: b for p, b in changed.items() if p not in sums}, sums).apply(function.body)
    if sums:
        root = body.block
        copies = [_copy(sums[param], changed[param]) for param in sums]
        body = _with_root(body, [root.body, *copies], [*root.alloc_buffers, *sums.values()])
    if any(param in used for param in changed for used in _accessed(body, names=True)):
        return None
    params = [changed.get(param, param) for param in function.params]
    return tirx.PrimFunc(params, body, function.ret_type, function.attrs)


def plainly_named(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """The function with names that are C++'s: TVM prints a model's own as they are."""
    plain: dict[Any, Any] = {}

    def rename(var: Any) -> Any:
        if re.fullmatch(r"[A-Za-z_]\w*", var.name, re.ASCII):
            return var
        if var not in plain:
            plain[var] = ir.Var("_" + re.sub(r"\W", "_", var.name, flags=re.ASCII), var.ty)
        return plain[var]

    return structural_map(function, (ir.Var, rename))


class _Storage:
    """Replaces buffers: some by others of another type, some by others of the same."""

    def __init__(self, converted: dict[Any, Any], renamed: dict[Any, Any]) -> None:
        self._converted, self._renamed = converted, renamed
        self._all = {**converted, **renamed}

    def apply(self, body: Any) -> Any:
        return structural_map(
            body,
            [
                (ir.TensorLoad, self._load),
                (tirx.BufferStore, self._store),
                (ir.TensorRegion, self._region),
            ],
        )

    def _load(self, load: Any) -> Any:
        if load.source in self._renamed:
            return tirx.BufferLoad(self._renamed[load.source], load.indices)
        if load.source in self._converted:
            value = tirx.BufferLoad(self._converted[load.source], load.indices)
            return tirx.Cast(str(load.source.dtype), value)
        return load

    def _store(self, store: Any) -> Any:
        if store.buffer in self._renamed:
            return tirx.BufferStore(self._renamed[store.buffer], store.value, store.indices)
        if store.buffer in self._converted:
            buffer = self._converted[store.buffer]
            return tirx.BufferStore(buffer, as_type(store.value, buffer.dtype), store.indices)
        return store

    def _region(self, region: Any) -> Any:
        known = self._all.get(region.source)
        return region if known is None else tirx.BufferRegion(known, region.region)


def as_type(value: Any, dtype: Any) -> Any:
    """A float32 as another type, saturating."""
    if str(dtype) in LARGEST:
        largest = tirx.const(LARGEST[str(dtype)], "float32")
        value = tirx.max(tirx.min(value, largest), -largest)
    return tirx.Cast(str(dtype), value)


def _accessed(body: Any, names: bool = False) -> tuple[set[Any], set[Any]]:
    """The buffers that are written and read element by element, or all variables there are."""
    written: set[Any] = set()
    read: set[Any] = set()

    def note_load(load: Any) -> Any:
        read.add(load.source)
        return load

    def note_store(store: Any) -> Any:
        written.add(store.buffer)
        return store

    def note_name(var: Any) -> Any:
        read.add(var)
        return var

    callbacks: list[Any] = [(ir.TensorLoad, note_load), (tirx.BufferStore, note_store)]
    structural_map(body, [(ir.Var, note_name)] if names else callbacks)
    return written, read


def _copy(source: Any, target: Any) -> Any:
    """The loops that convert one buffer into another."""
    x = te.placeholder(source.shape, str(source.dtype), name="x")
    y = te.compute(
        source.shape, lambda *i: as_type(x(*i), target.dtype), name=f"{target.name}_stored"
    )
    function = te.create_prim_func([x, y])
    old_x, old_y = function.params
    return _Storage({}, {old_x: source, old_y: target}).apply(function.body.block.body)


def _with_root(realize: Any, bodies: list[Any], buffers: list[Any]) -> Any:
    """The root block with other statements and buffers."""
    root = realize.block
    block = s_tir.SBlock(
        root.iter_vars,
        root.reads,
        root.writes,
        root.name_hint,
        tirx.SeqStmt(bodies),
        root.init,
        buffers,
        root.match_buffers,
        root.annotations,
    )
    return s_tir.SBlockRealize(realize.iter_values, realize.predicate, block)
