"""How exp, erf and tanh are lowered while we build: to polynomials, not to calls of libm.

The rules apply only under a PassContext with the configuration ``FAST_MATH``, so other users of
TVM in the same process are left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from sparse_tvm.schedules.cpu import vector_math

FAST_MATH = {"tirx.enable_fast_math": True, "tirx.disable_storage_rewrite": True}
"""PassContext configuration that turns these rules on.

TVM's storage rewriting is off: it forgets which buffers are registers, and lets those of different
widths share one, which LLVM then takes apart in every iteration.
"""

_ABOVE_TVM = 200


def _float32_only(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def lower(call: Any) -> Any:
        is_float32 = str(call.ty.dtype).startswith("float32")
        return function(call.args[0]) if is_float32 else call

    return lower


for _name in ("exp", "erf", "tanh", "sigmoid"):
    tirx.register_intrin_lowering(
        f"tirx.{_name}",
        target="llvm.fastmath",
        f=_float32_only(getattr(vector_math, _name)),
        level=_ABOVE_TVM,
    )
