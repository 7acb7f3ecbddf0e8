"""Schedules of an operator without a kernel from among which measurements choose.

A schedule is a text: the name of TVM's own loops or of those of :mod:`generic`, or what
MetaSchedule found, as JSON: its steps, and what it decided wherever there was something to decide.
Applying that again takes no search, and always leads to the same code.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator, Mapping
from hashlib import sha256
from importlib import import_module
from types import ModuleType
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm_ffi import structural_hash, structural_walk

from sparse_tvm.schedules.cpu.generic import schedule_generic
from sparse_tvm.schedules.cpu.simd import Simd
from sparse_tvm.tuning.schedule_records import GENERIC, NAIVE

_SEED = 1
"""MetaSchedule's samples are the same ones again when tuning goes on where it was stopped."""

_SAMPLES = 3
"""Taken for each one wanted: some are the same, of simple operators most."""

_RULES = "llvm"
"""Those of CPUs in general: those of x86 call for intrinsics that take long to import."""


def fingerprint(function: tirx.PrimFunc) -> str:
    """What two functions have in common that compute the same in the same blocks.

    Names of the function and its variables do not matter; those of blocks do, for by them the steps
    of a schedule find them.
    """
    names = sorted(_blocks(function))
    text = f"{structural_hash(_anonymous(function)):x} {' '.join(names)}"
    return sha256(text.encode()).hexdigest()[:16]


def apply_schedule(function: tirx.PrimFunc, schedule: str, simd: Simd) -> tirx.PrimFunc:
    """A function of blocks, scheduled.

    Raises
    ------
    Exception
        Of several kinds, where the schedule does not fit.
    """
    if schedule == NAIVE:
        return function
    if schedule == GENERIC:
        return schedule_generic(function, simd).with_attrs(dict(function.attrs.items()))
    found = s_tir.Schedule(_own(function))
    s_tir.schedule.Trace.apply_json_to_schedule(json.loads(schedule), found)
    return found.mod["main"].with_attrs(dict(function.attrs.items()))


def candidates(
    function: tirx.PrimFunc, target: Mapping[str, Any], cores: int, count: int, simd: Simd
) -> list[str]:
    """Schedules that differ in the code they lead to: the usual one first, then samples.

    Parameters
    ----------
    target : Mapping[str, Any]
        As TVM takes it.
    cores : int
        For how many MetaSchedule cuts the work.
    count : int
        Schedules of MetaSchedule's, at most.
    """
    found: dict[int, str] = {}
    for schedule in _offered(function, target, cores, count):
        if len(found) == count + 2:
            break
        try:
            scheduled = apply_schedule(function, schedule, simd)
        except Exception:
            continue
        found.setdefault(structural_hash(_anonymous(scheduled)), schedule)
    return list(found.values())


def _offered(
    function: tirx.PrimFunc, target: Mapping[str, Any], cores: int, count: int
) -> Iterator[str]:
    yield GENERIC
    yield NAIVE
    if count:
        yield from _sampled(function, target, cores, _SAMPLES * count)


def _sampled(
    function: tirx.PrimFunc, target: Mapping[str, Any], cores: int, count: int
) -> Iterator[str]:
    """Samples of what MetaSchedule would try."""
    search = _meta_schedule()
    space = search.space_generator.PostOrderApply(
        sch_rules=search.ScheduleRule.create(_RULES),
        postprocs=search.Postproc.create(_RULES),
        mutator_probs=search.Mutator.create(_RULES),
    )
    context = search.TuneContext(
        mod=tvm.IRModule({"main": _own(function).with_attr("global_symbol", "main")}),
        target=tvm.target.Target({**target, "num-cores": cores}),
        space_generator=space,
        search_strategy="replay-trace",
        rand_state=_SEED,
        num_threads=1,
    )
    context.pre_tuning(
        max_trials=count,
        num_trials_per_iter=count,
        design_spaces=context.generate_design_space(),
        database=search.database.MemoryDatabase(),
        cost_model=search.CostModel.create("random"),  # asked for, but not by this strategy
    )
    for found in context.generate_measure_candidates() or ():
        yield json.dumps(_plain(found.sch.trace.as_json()))


@functools.cache
def _meta_schedule() -> ModuleType:
    """MetaSchedule, without the descriptions of intrinsics, which take most of a minute."""
    name = "tvm.s_tir.tensor_intrin"
    if name not in sys.modules:
        sys.modules[name] = s_tir.tensor_intrin = ModuleType(name)
    return import_module("tvm.s_tir.meta_schedule")


def _anonymous(function: tirx.PrimFunc) -> tirx.PrimFunc:
    named = function.attrs is not None and "global_symbol" in function.attrs
    return function.without_attr("global_symbol") if named else function


def _own(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """A copy that shares nothing: steps of MetaSchedule's change functions where they are."""
    return tvm.ir.load_json(tvm.ir.save_json(_anonymous(function)))


def _blocks(function: tirx.PrimFunc) -> list[str]:
    """Names of a function's blocks."""
    found: list[Any] = []
    structural_walk(function.body, (s_tir.SBlock, found.append))
    return [str(block.name_hint) for block in found]


def _plain(value: Any) -> Any:
    """A value of TVM's as JSON has it."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, tirx.IntImm | tirx.FloatImm):
        return _plain(value.value)
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value]
