"""Functions that are compiled to be timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def compiled(function: Any, target: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A kernel, and the same with nothing in it: it still checks its arguments."""
    import tvm
    from tvm import tirx

    from sparse_tvm.schedules.cpu.intrinsics import FAST_MATH

    functions = {"kernel": function, "idle": function.with_body(tirx.Evaluate(0))}
    module = tvm.IRModule(
        {name: each.with_attr("global_symbol", name) for name, each in functions.items()}
    )
    context = tvm.transform.PassContext(opt_level=3, config=FAST_MATH)
    with tvm.target.Target(target.tvm_target()) as tvm_target, context:
        library = tvm.compile(module, tvm_target).jit()
    return library["kernel"], library["idle"]
