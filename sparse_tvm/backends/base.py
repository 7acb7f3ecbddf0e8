"""What a backend is: everything about a kind of device that the rest of the compiler asks for.

Graph passes and the pipeline know backends only through this class. A package adds one of its own
with :func:`~sparse_tvm.backends.register`, or by an entry point (see
:mod:`sparse_tvm.backends`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from sparse_tvm.families import KernelFamily, WeightedFamily
from sparse_tvm.operators import Layout, Operator, WeightedOperator, forms_of

if TYPE_CHECKING:
    from sparse_tvm.passes.infrastructure import Phase
    from sparse_tvm.passes.program import Program

_Operator = TypeVar("_Operator", bound=Operator)


def _values(structure: str) -> int:
    """How many values go together in a structure of blocks; one in any other."""
    rows, by, columns = structure.partition("x")
    return int(rows) * int(columns) if by else 1


class BackendTarget(Protocol):
    """What every target has, whatever its backend."""

    @property
    def name(self) -> str:
        """As ``--target`` takes it."""

    def tvm_target(self) -> dict[str, Any]:
        """The target as TVM takes it."""

    def as_json(self) -> dict[str, Any]:
        """The target as the manifest stores it."""


class Backend(ABC):
    """A kind of device: its targets, kernel families, passes and code generation.

    Attributes
    ----------
    name : str
        As manifests have it.
    device : str
        What its programs run on (see :mod:`sparse_tvm.devices`).
    precision : str
        In which layers compute unless the user says otherwise.
    families : list[KernelFamily]
        Of all operators; :meth:`add` appends.
    """

    name: ClassVar[str]
    device: ClassVar[str] = "cpu"
    precision: ClassVar[str] = "fp32"

    def __init__(self, families: Sequence[KernelFamily[Any]] = ()) -> None:
        self.families = list(families)

    def add(self, family: KernelFamily[Any]) -> None:
        """Add a kernel family: its candidates compete with those of the others."""
        if any(known.name == family.name for known in self.families):
            raise ValueError(f"backend {self.name} has a family {family.name!r} already")
        self.families.append(family)

    @property
    @abstractmethod
    def targets(self) -> Sequence[BackendTarget]:
        """All targets, the most capable of a kind first."""

    @abstractmethod
    def find_target(self, name: str) -> BackendTarget | None:
        """The target that ``name``, one of its other names, or ``native`` stands for."""

    def runs_here(self, target: BackendTarget) -> bool:
        """Whether this machine can run a target's code, as far as is known without trying."""
        return True

    def other_seconds(
        self, values: float, multiplications: float, target: BackendTarget
    ) -> float | None:
        """Roughly what a call takes that is no layer, on one core; None where nobody knows.

        ``values`` of activations are read or written, and so often two of them are multiplied and
        added.
        """
        return None

    @abstractmethod
    def phases(self) -> Sequence[Phase]:
        """The passes from graph to kernels: layout of activations, lowering, scheduling."""

    @abstractmethod
    def generate(self, program: Program, target: BackendTarget) -> Any:
        """Generate code for ``main(inputs..., weights)``, weights being one tuple.

        Raises
        ------
        BuildError
            When code generation fails.
        """

    @abstractmethod
    def write_library(self, code: Any, target: BackendTarget, path: Path) -> None:
        """Write what :meth:`generate` made as a shared library.

        Raises
        ------
        BuildError
            When no linker works.
        """

    def accepting(self, op: Operator, target: BackendTarget) -> list[KernelFamily[Any]]:
        """The families that compute ``op`` on ``target``."""
        return [f for f in self._of(op) if f.refuses(op, target) is None]

    def refuses(self, op: Operator, target: BackendTarget) -> str | None:
        """Why no family computes ``op`` on ``target``; None if one does."""
        families = self._of(op)
        reasons = [family.refuses(op, target) for family in families]
        if None in reasons:
            return None
        different = dict.fromkeys(filter(None, reasons))
        return "; ".join(different) or f"{self.name} has no kernel for {op.name}"

    def in_precision(
        self, op: _Operator, precision: str, target: BackendTarget
    ) -> tuple[_Operator, str | None]:
        """An operator in the first types for a precision that a family computes on `target`.

        As it is if there are none; then the text says what refuses the last of them.
        """
        refusal = None
        for types in forms_of(precision):
            form = replace(op, types=types)
            refusal = self.refuses(form, target)
            if refusal is None:
                return form, None
        return op, refusal

    def structures(self, op: WeightedOperator, target: BackendTarget) -> list[str]:
        """What pruning chooses among for a layer, as ``prune --structure`` has it, finest first.

        All that its kernels skip; nothing where zeros make none of them faster.
        """
        families = [f for f in self.accepting(op, target) if isinstance(f, WeightedFamily)]
        found = dict.fromkeys(name for f in families for name in f.structures(op, target))
        return sorted(found, key=_values)

    def family(self, name: str) -> KernelFamily[Any]:
        """The family called ``name``.

        Raises
        ------
        KeyError
            When there is none.
        """
        for family in self.families:
            if family.name == name:
                return family
        raise KeyError(name)

    def family_for(self, op: Operator, target: BackendTarget) -> KernelFamily[Any]:
        """The family that builds the kernel of ``op``: the one that packed its weight, if any.

        Raises
        ------
        ValueError
            When none accepts it.
        """
        if isinstance(op, WeightedOperator) and op.layout is not None:
            return self.family(op.layout.family)
        accepting = self.accepting(op, target)
        if not accepting:
            raise ValueError(str(self.refuses(op, target)))
        return accepting[0]

    def weighted_family(self, layout: Layout) -> WeightedFamily[Any]:
        """The family that a layout belongs to."""
        family = self.family(layout.family)
        assert isinstance(family, WeightedFamily)
        return family

    def _of(self, op: Operator) -> list[KernelFamily[Any]]:
        return [family for family in self.families if isinstance(op, family.operator)]
