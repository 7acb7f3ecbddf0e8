"""From scheduled kernels to code, with TVM's LLVM code generator."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax
from tvm.relax import vm_build
from tvm.relax.backend.cpu_generic.pipeline import finalize_passes

from sparse_tvm.backends.base import BackendTarget
from sparse_tvm.backends.object_code import compile_kernels
from sparse_tvm.backends.share_storage import share_storage
from sparse_tvm.backends.shorten_program import shorten_program
from sparse_tvm.backends.straight_program import straight_program
from sparse_tvm.errors import BuildError
from sparse_tvm.passes.program import Program
from sparse_tvm.schedules.cpu.intrinsics import FAST_MATH


def generate(program: Program, target: BackendTarget) -> Any:
    """Generate code for ``main(inputs..., weights)``, weights being one tuple.

    Returns
    -------
    tvm.relax.VMExecutable
        To be exported as a library.

    Raises
    ------
    BuildError
        When code generation fails.
    """
    with tvm.target.Target(target.tvm_target()) as tvm_target:
        plan_memory, *lower = finalize_passes(tvm_target)
        finish = tvm.transform.Sequential(
            [
                relax.transform.BundleModelParams(),
                relax.transform.ToNonDataflow(),
                relax.transform.RemovePurityChecking(),
                relax.transform.CallTIRRewrite(),
                plan_memory,
                share_storage,
                straight_program,
                *lower,
                shorten_program,
            ]
        )
        try:
            with tvm.transform.PassContext(opt_level=3, config=FAST_MATH):
                builder = relax.ExecBuilder()
                kernels = vm_build._vmcodegen(builder, finish(program.module))
                libraries = compile_kernels(kernels, tvm_target)
                return vm_build._vmlink(builder, tvm_target, ext_libs=libraries)
        except Exception as error:
            text = str(error).strip().splitlines()
            reason = text[-1] if text else repr(error)
            raise BuildError(f"code generation failed: {reason}") from error
