"""Functions that are compiled to be timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparse_tvm.linker import Linker
from sparse_tvm.tuning.runner import Argument, Side


@dataclass(frozen=True)
class Built:
    """A function to be timed, that is built but not compiled.

    Attributes
    ----------
    function : tvm.tirx.PrimFunc
        The function.
    target : BackendTarget
        What it is for.
    weight : Mapping[int, np.ndarray]
        The arrays that a layer's weight became, by their place among the arguments.
    arguments : Mapping[int, Sequence[Argument]]
        All arguments, by the number of tokens.
    title : str
        The kernel's name.
    """

    function: Any
    target: Any
    weight: Mapping[int, np.ndarray]
    arguments: Mapping[int, Sequence[Argument]]
    title: str

    def side(self) -> Side:
        """Compile it for this process."""
        library = _executable(self.function, self.target).jit()
        return Side(library["kernel"], library["idle"], self.weight, self.arguments)

    def ship(self, path: Path) -> dict[str, Any]:
        """Write a library, and its weight beside it, for a runner elsewhere to be sent."""
        executable = _executable(self.function, self.target)
        executable.export_library(str(path), fcompile=Linker(self.target.triple))
        with path.with_suffix(".npz").open("wb") as file:
            weight: dict[str, Any] = {str(place): array for place, array in self.weight.items()}
            np.savez(file, **weight)
        return {"arguments": self.arguments}


def _executable(function: Any, target: Any) -> Any:
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
        return tvm.compile(module, tvm_target)
