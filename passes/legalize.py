"""Relax operators that are not ours become TIR, fused where they are elementwise.

These are TVM's own passes, with its rules mended; a backend's ``legalize`` applies them, with
rules of its own for operators whose TIR would call libraries that artifacts do not load. Our
operators pass through them as opaque calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tvm
from tvm import relax, s_tir, te, tirx, topi
from tvm_ffi import structural_map, structural_walk

from sparse_tvm.passes.graph import OPAQUE, dtype_of, shape_of

_RESHAPES = ("relax.reshape", "relax.expand_dims", "relax.squeeze", "relax.flatten")
_VIEW = "sparse_tvm.view"
"""Attribute of kernels that copy a tensor into another shape."""

Rule = Callable[[relax.BlockBuilder, relax.Call], Any]


def legalized(
    module: tvm.IRModule,
    target: Mapping[str, Any],
    opaque: Mapping[str, Rule],
    nests: Mapping[str, Rule] | None = None,
) -> tvm.IRModule:
    """The module in TIR for a target (as TVM takes it).

    ``opaque`` has rules for operators that become no loop nests, by Relax's names; ``nests`` has
    rules for loop nests that take the place of TVM's. Reshapes stay calls of Relax where they are
    views.
    """
    with tvm.target.Target(dict(target)):
        lower = tvm.transform.Sequential(
            [
                relax.transform.LegalizeOps(
                    {
                        "relax.max": _largest,
                        "relax.min": _smallest,
                        **dict.fromkeys(_RESHAPES, _view),
                        **(nests or {}),
                    }
                ),
                relax.transform.AnnotateTIROpPattern(),
            ]
        )
        fuse = tvm.transform.Sequential(
            [
                relax.transform.FoldConstant(),
                relax.transform.FuseOps(),
                relax.transform.FuseTIR(),
            ]
        )
        finish = tvm.transform.Sequential(
            [
                # What is no loop nest can only come now: the passes above stumble over it.
                relax.transform.LegalizeOps(dict(opaque), skip_ops=["relax.reshape"]),
                relax.backend.DispatchSortScan(),  # cumulative sums
                relax.transform.DeadCodeElimination(["main"]),
            ]
        )
        fused = _with_all_reads(_views(fuse(_sizes_apart(lower(module)))))
        return finish(_sizes_first(fused))


def _sizes_first(module: tvm.IRModule) -> tvm.IRModule:
    """Read sizes that depend on data before anything has them in its shape.

    FuseOps orders bindings by the tensors that they take.
    """
    main = module["main"]
    bindings = [binding for block in main.body.blocks for binding in block.bindings]
    if not any(isinstance(binding, relax.MatchCast) for binding in bindings):
        return module
    given = {size for param in main.params for size in _variables(param.ty)}
    reading: dict[Any, relax.Binding] = {}
    for binding in bindings:
        reading[binding.var] = binding
        if isinstance(binding, relax.MatchCast):
            read = (size for size in _variables(binding.ty) if size not in given)
            reading.update(dict.fromkeys(read, binding))
    ordered: dict[relax.Binding, None] = {}

    def place(binding: relax.Binding) -> None:
        pending = [binding]
        while pending:
            needed = [reading.get(v) for v in _needs(pending[-1])]
            missing = [b for b in needed if b is not None and b not in ordered]
            if missing:
                pending += missing
            else:
                ordered[pending.pop()] = None

    for binding in bindings:
        place(binding)
    [block] = main.body.blocks
    body = relax.SeqExpr([type(block)(list(ordered))], main.body.body)
    module["main"] = relax.Function(main.params, body, main.ret_ty, main.is_pure, main.attrs)
    return module


def _needs(binding: relax.Binding) -> list[Any]:
    """The tensors and sizes that a binding's value is made of."""
    if isinstance(binding, relax.MatchCast):
        return _variables(binding.value)
    return _variables(binding.value) + _variables(binding.var.ty)


def _variables(node: Any) -> list[Any]:
    found: list[Any] = []
    structural_walk(node, (relax.Var, found.append))
    structural_walk(node, (tirx.Var, found.append))
    return found


def _sizes_apart(module: tvm.IRModule) -> tvm.IRModule:
    """Fuse nothing into what takes a size that none of its tensors has, as ``arange`` may.

    FuseTIR defines such a size twice where the fused function takes others beside its tensors.
    """
    for var, function in module.functions.items():
        if not isinstance(function, tirx.PrimFunc):
            continue
        buffers = [p.ty for p in function.params if isinstance(p.ty, tirx.BufferType)]
        bound = [v for b in buffers for size in b.shape for v in tirx.analysis.undefined_vars(size)]
        sizes = [p for p in function.params if not isinstance(p.ty, tirx.BufferType)]
        if not all(any(size.same_as(var) for var in bound) for size in sizes):
            module[var] = function.with_attr("op_pattern", OPAQUE)
    return module


def _with_all_reads(module: tvm.IRModule) -> tvm.IRModule:
    """Say of each block all that it reads: FuseTIR keeps one of several regions of a buffer.

    A block reads one several times where one tensor is several inputs: ``concat(x, x)``.
    """
    for var, function in module.functions.items():
        if isinstance(function, tirx.PrimFunc):
            body = structural_map(function.body, (s_tir.SBlock, _reading_all))
            module[var] = function.with_body(body)
    return module


def _reading_all(block: s_tir.SBlock) -> s_tir.SBlock:
    if not isinstance(block.body, tirx.BufferStore):
        return block
    sources = [region.source for region in (*block.reads, *block.writes)]
    found, *_ = s_tir.analysis.get_sblock_access_region(block, {s: s for s in sources})
    written = block.body.buffer
    reads = [region for region in found if not region.source.same_as(written)]
    return s_tir.SBlock(
        block.iter_vars,
        reads,
        block.writes,
        block.name_hint,
        block.body,
        block.init,
        block.alloc_buffers,
        block.match_buffers,
        block.annotations,
    )


def _view(builder: relax.BlockBuilder, call: relax.Call) -> Any:
    """A reshape as a kernel that copies, to be fused with its neighbours or to become a view."""
    source = call.args[0]
    before: Any = builder.lookup_binding(source) if isinstance(source, relax.Var) else None
    if _copies(before, builder.get()):  # several in a row are one
        source = before.args[1].fields[0]
    return builder.call_te(
        topi.reshape,
        source,
        list(call.ty.shape.values),
        primfunc_name_hint="reshape",
        primfunc_attrs={_VIEW: 1},
    )


def _copies(value: Any, module: tvm.IRModule) -> bool:
    """Whether a value is a call of a kernel that copies a tensor into another shape."""
    if getattr(getattr(value, "op", None), "name", None) != "relax.call_tir":
        return False
    attributes = module[value.args[0]].attrs
    return attributes is not None and _VIEW in attributes


def _views(module: tvm.IRModule) -> tvm.IRModule:
    """Turn reshapes that nothing was fused with into views.

    A copy stays where the model would hand out the same memory twice, or an input's.
    """
    main = module["main"]
    values = {b.var: b.value for block in main.body.blocks for b in block.bindings}
    shaped = {
        var: value.args[1].fields[0] for var, value in values.items() if _copies(value, module)
    }

    def made(expr: Any, through: dict[Any, Any]) -> Any:
        """What an expression is the same memory as."""
        while True:
            value = values.get(expr) if isinstance(expr, relax.Var) else None
            if isinstance(value, relax.Var):
                expr = value
            elif expr in through:
                expr = through[expr]
            else:
                return expr

    result = values.get(main.body.body)
    results = _leaves(result) if isinstance(result, relax.Tuple) else [main.body.body]
    outputs = [made(each, {}) for each in results]
    owners, inputs = [made(output, shaped) for output in outputs], set(main.params)
    kept = {
        output
        for output, owner in zip(outputs, owners, strict=True)
        if sum(map(owner.same_as, owners)) > 1 or owner in inputs
    }
    builder, blocks = relax.BlockBuilder(), []
    for block in main.body.blocks:
        bindings = []
        for binding in block.bindings:
            if binding.var in shaped and binding.var not in kept:
                view = relax.op.reshape(shaped[binding.var], binding.var.ty.shape)
                binding = relax.VarBinding(binding.var, builder.normalize(view))
            bindings.append(binding)
        blocks.append(type(block)(bindings))
    body = relax.SeqExpr(blocks, main.body.body)
    module["main"] = relax.Function(main.params, body, main.ret_ty, main.is_pure, main.attrs)
    return module


def _leaves(expr: Any) -> list[Any]:
    if isinstance(expr, relax.Tuple):
        return [leaf for field in expr.fields for leaf in _leaves(field)]
    return [expr] if isinstance(expr, relax.Var) else []


def _largest(builder: relax.BlockBuilder, call: relax.Call) -> Any:
    return _extreme(builder, call, tirx.max, -1)


def _smallest(builder: relax.BlockBuilder, call: relax.Call) -> Any:
    return _extreme(builder, call, tirx.min, 1)


def _extreme(
    builder: relax.BlockBuilder, call: relax.Call, better: Callable[..., Any], sign: int
) -> Any:
    """A reduction to the largest or smallest: infinite where all elements are.

    TVM's own begins with the largest finite number, which a row of infinities then comes to.
    """
    x, keepdims = call.args[0], bool(call.attrs.keepdims)
    rank, dtype = len(shape_of(x)), dtype_of(x)
    if not dtype.startswith("float"):
        return builder.call_te(topi.max if sign < 0 else topi.min, x, call.attrs.axis, keepdims)
    axes = call.attrs.axis
    reduced = [int(axis) % rank for axis in axes] if axes is not None else list(range(rank))
    kept = [axis for axis in range(rank) if axis not in reduced]
    reduce = te.comm_reducer(lambda a, b: better(a, b), lambda of: sign * tirx.infinity(of))

    def compute(data: te.Tensor) -> te.Tensor:
        over = {axis: te.reduce_axis((0, data.shape[axis]), f"k{axis}") for axis in reduced}

        def element(*indices: Any) -> Any:
            at = dict(zip(range(rank) if keepdims else kept, indices, strict=True)) | over
            return reduce(data(*(at[axis] for axis in range(rank))), axis=list(over.values()))

        shape = [
            1 if axis in reduced else data.shape[axis]
            for axis in range(rank)
            if keepdims or axis in kept
        ]
        return te.compute(shape, element, name="extreme", tag=topi.tag.COMM_REDUCE)

    return builder.call_te(compute, x)
