"""What a pass is, and how passes run: in order, each held to what it promises.

A pass is a function of a :class:`~sparse_tvm.passes.program.Program` and a :class:`Context`, marked
with :func:`graph_pass`. It gets a copy, so a pass never changes its argument. What it relies on and
what holds after it are :class:`Property` objects: sentences that can be checked. They are, along
with the well-formedness of the module, before and after each pass where checks are on: in tests
always, elsewhere on request.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from sparse_tvm.backends.base import Backend, BackendTarget
from sparse_tvm.errors import BuildError
from sparse_tvm.passes.formats import FormatOptions
from sparse_tvm.passes.program import Program
from sparse_tvm.tuning.evidence import Evidence

CHECK_VARIABLE = "SPARSE_TVM_CHECK_PASSES"
"""Environment variable: ``1`` turns the checks on where the caller does not say."""


@dataclass(frozen=True)
class Context:
    """What passes may ask besides the program.

    Attributes
    ----------
    backend : Backend
        Its families decide what becomes an operator of ours, and how weights are stored.
    target : BackendTarget
        One of the backend's.
    options : FormatOptions
        The user's wishes.
    evidence : Evidence
        What was measured of layers, and on how many threads they are to run.
    """

    backend: Backend
    target: BackendTarget
    options: FormatOptions = field(default_factory=FormatOptions)
    evidence: Evidence = field(default_factory=Evidence)


@dataclass(frozen=True)
class Property:
    """A sentence about a program.

    Attributes
    ----------
    statement : str
        Such as "every weight has a layout".
    violations : Callable[[Program], Iterable[str]]
        Where it does not hold: nothing if it does.
    """

    statement: str
    violations: Callable[[Program], Iterable[str]]


@dataclass(frozen=True)
class Pass:
    """A graph pass.

    Attributes
    ----------
    name : str
        The function's.
    transform : Callable[[Program, Context], Program]
        May change the program it is given, which is nobody else's.
    requires, ensures : tuple[Property, ...]
        What holds before and after it.
    """

    name: str
    transform: Callable[[Program, Context], Program]
    requires: tuple[Property, ...] = ()
    ensures: tuple[Property, ...] = ()

    def __call__(self, program: Program, context: Context, *, check: bool | None = None) -> Program:
        """Return the program after the pass; the argument stays as it is.

        Raises
        ------
        BuildError
            When checks are on and the pass, or one before it, broke its promise.
        """
        check = os.environ.get(CHECK_VARIABLE) == "1" if check is None else check
        if check:
            self._hold(self.requires, program, "requires")
        after = self.transform(program.copy(), context)
        if check:
            self._hold((WELL_FORMED, *self.ensures), after, "ensures")
        return after

    def _hold(self, properties: Iterable[Property], program: Program, verb: str) -> None:
        for known in properties:
            for where in known.violations(program):
                raise BuildError(f"pass {self.name} {verb} that {known.statement}: {where}")


def graph_pass(
    *, requires: Sequence[Property] = (), ensures: Sequence[Property] = ()
) -> Callable[[Callable[[Program, Context], Program]], Pass]:
    """Turn a function into a :class:`Pass`."""

    def decorate(transform: Callable[[Program, Context], Program]) -> Pass:
        return Pass(transform.__name__, transform, tuple(requires), tuple(ensures))

    return decorate


@dataclass(frozen=True)
class Phase:
    """Passes that together have a name which users meet: in progress, timings and dumps."""

    name: str
    passes: tuple[Pass, ...]

    def run(self, program: Program, context: Context, *, check: bool | None = None) -> Program:
        """Apply the passes in order."""
        for one in self.passes:
            program = one(program, context, check=check)
        return program


def _ill_formed(program: Program) -> Iterable[str]:
    from tvm import relax

    try:
        relax.analysis.well_formed(program.module)
    except Exception as error:  # of several kinds
        yield f"TVM finds the module ill-formed: {str(error).strip().splitlines()[-1]}"
    params = program.module["main"].params[program.num_input :]
    if [p.name for p in params] != list(program.weights):
        yield "parameters and weights are not the same, in the same order"
        return
    for param, array in zip(params, program.weights.values(), strict=True):
        found = (tuple(int(n) for n in param.ty.shape), str(param.ty.dtype))
        if found != (array.shape, str(array.dtype)):
            yield f"parameter {param.name} is {found}, its weight {array.shape} {array.dtype}"


WELL_FORMED = Property("the program is well-formed", _ill_formed)
