"""From kernels to object code, several at once.

``tvm.compile`` lowers all functions as one module, generates code for it, and makes an object file
when the library is exported, all on one core. Here each kernel is a module by itself, and threads
take one after another: TVM lets go of Python's lock meanwhile. So the code is the same however many
threads there are.

The passes are TVM's, in its order, without those for GPUs. Finding out how much of each buffer is
used takes most of TVM's time where loops are unrolled; functions written by hand, as our kernels
are, have the buffers they need, so that pass is for scheduled functions only.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.runtime.module import load_static_library

from sparse_tvm.backends.straight_program import (
    BODY_ATTRIBUTE,
    is_buffer,
    parameters_of,
    symbols_of,
)
from sparse_tvm.cpu import usable_cores
from sparse_tvm.passes.lower_kernels import KERNEL_ATTRIBUTE
from sparse_tvm.schedules.cpu.intrinsics import FAST_MATH


def compile_kernels(module: tvm.IRModule, target: tvm.target.Target) -> list[tvm.runtime.Module]:
    """Compile the functions of `module`, all of them kernels, for the CPU `target`.

    Returns
    -------
    list[tvm.runtime.Module]
        Object code of each function, to be linked into one library.

    Raises
    ------
    Exception
        Whatever TVM raises.
    """
    functions = list(module.functions.items())
    if not functions:
        return []
    with (
        tempfile.TemporaryDirectory() as directory,
        ThreadPoolExecutor(min(usable_cores(), len(functions))) as pool,
    ):
        jobs = [
            pool.submit(_compile, variable, function, target, Path(directory) / f"{i}.o")
            for i, (variable, function) in enumerate(functions)
        ]
        try:
            return [job.result() for job in jobs]
        finally:  # after an error, or Ctrl-C, what has not begun need not
            pool.shutdown(cancel_futures=True)


def _compile(
    variable: tvm.ir.GlobalVar, function: tirx.PrimFunc, target: tvm.target.Target, path: Path
) -> tvm.runtime.Module:
    """Compile one function by way of an object file at `path`."""
    by_hand = KERNEL_ATTRIBUTE in function.attrs
    host = target.with_host(target)
    with host, tvm.transform.PassContext(opt_level=3, config=FAST_MATH):
        module = tirx.transform.BindTarget(host)(tvm.IRModule({variable: function}))
        lowered = tvm.transform.Sequential(_lowering(by_hand))(module)
        code = tvm.get_global_func("target.build.llvm")(lowered, target)
        code.write_to_file(str(path))
    return load_static_library(str(path), [variable.name_hint])


def _lowering(by_hand: bool) -> Sequence[Any]:
    """The passes of ``tvm.s_tir.pipeline.default_s_tir_pipeline`` that matter on CPUs."""
    return [
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        *([] if by_hand else [s_tir.transform.CompactBufferAllocation()]),
        s_tir.transform.LowerMatchBuffer(),
        s_tir.transform.StmtSimplify(),
        s_tir.transform.AnnotateIrregularLoop(),
        s_tir.transform.LowerOpaqueBlock(),
        tirx.transform.FlattenBuffer(),
        tirx.transform.BF16ComputeLegalize(),
        tirx.transform.NarrowDataType(32),
        s_tir.transform.LoopPartition(),
        tirx.transform.VectorizeLoop(),
        s_tir.transform.InjectVirtualThread(),
        s_tir.transform.HoistIfThenElse(),
        tirx.transform.UnrollLoop(),
        s_tir.transform.RenormalizeSplitPattern(),
        tirx.transform.StmtSimplify(),
        tirx.transform.RemoveNoOp(),
        s_tir.transform.RewriteUnsafeSelect(),
        tirx.transform.CommonSubexprElim(),
        tirx.transform.FP8ComputeLegalize(),
        tirx.transform.VerifyMemory(),
        tirx.transform.AnnotateEntryFunc(),
        tirx.transform.SplitHostDevice(),
        _bodies_apart,
        tirx.transform.MakePackedAPI(),
        tirx.transform.FP8StorageLegalize(),
        tirx.transform.BF16StorageLegalize(),
        tirx.transform.LowerTVMBuiltin(),
        tirx.transform.LowerIntrin(),
    ]


def _with_bodies_apart(module: tvm.IRModule, _context: Any) -> tvm.IRModule:
    for variable, function in module.functions_items():
        if function.attrs is not None and BODY_ATTRIBUTE in function.attrs:
            symbol = str(function.attrs[BODY_ATTRIBUTE])
            called = tvm.ir.GlobalVar(symbol)
            module.update_func(called, _body_of(function, symbol))
            module.update_func(variable, _calling(function, called))
    return module


def _body_of(function: tirx.PrimFunc, symbol: str) -> tirx.PrimFunc:
    """What a function does, for callers that have addresses and numbers and return its code.

    All is as in the function that TVM makes of one that takes tensors.
    """
    addresses = [
        tirx.Var(each.name, each.data.ty) if is_buffer(each) else each for each in function.params
    ]
    declared = [
        statement
        for buffer, address in zip(function.params, addresses, strict=True)
        if is_buffer(buffer)
        for statement in (
            tirx.DeclBuffer(buffer, data=address),
            tirx.AttrStmt(
                buffer, "storage_alignment", _int32(buffer.data_alignment), tirx.Evaluate(0)
            ),
        )
    ]
    body = tirx.AttrStmt(
        _int32(0), "compute_scope", tvm.ir.StringImm(f"{symbol}_compute_"), function.body
    )
    body = tirx.SeqStmt([*declared, body, tirx.Return(_int32(0))])
    for key, value in (("device_type", _CPU), ("device_id", 0)):
        body = tirx.AttrStmt("default", key, _int32(value), body)
    made = tirx.PrimFunc([*addresses, *symbols_of(function)], body, tvm.ir.PrimType("int32"))
    host = function.attrs["target"].host
    return made.with_attrs(
        {"global_symbol": symbol, "target": host, "calling_conv": _ALREADY_LOWERED}
    )


def _calling(function: tirx.PrimFunc, body: tvm.ir.GlobalVar) -> tirx.PrimFunc:
    """The function that takes tensors."""
    code = tvm.ir.Call(body, parameters_of(function), ret_ty=tvm.ir.PrimType("int32"))
    failed = tirx.Evaluate(tirx.tvm_throw_last_error())
    return function.with_body(tirx.IfThenElse(tirx.NE(code, 0), failed, None))


def _int32(value: int) -> Any:
    return tirx.IntImm("int32", value)


_CPU = 1
_ALREADY_LOWERED = 1
"""A calling convention for which TVM leaves a function's parameters as they are."""

_bodies_apart = tvm.transform.module_pass(_with_bodies_apart, opt_level=0, name="BodiesApart")
