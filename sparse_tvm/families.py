"""Kernel families: all that is known of the kernels of one operator lies in one place.

A family says what the kernel of a call is (:meth:`KernelFamily.build`) and how much it has to do
(:meth:`~KernelFamily.work`); one whose operator has a weight also says which layouts that may have
(:meth:`WeightedFamily.candidates`), what a call costs (:meth:`~WeightedFamily.cost`), and how the
weight is packed (:meth:`~WeightedFamily.pack`). Passes, the tuner, the planner and the profiler
ask the family, and know nothing of its kernels.

Only ``build`` needs TVM; families import it there, so that planning and profiling work without.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from sparse_tvm.operators import Layout, Operator, WeightedOperator
from sparse_tvm.sparsity.statistics import WeightStatistics

Op = TypeVar("Op", bound=Operator)
Weighted = TypeVar("Weighted", bound=WeightedOperator)
AnyTarget = Any
"""A target of the family's backend."""

TYPICAL_TOKENS = (128, 1, 4, 16, 32, 64)
"""Tokens at a time that a layer may see where nobody says how many; the usual number first."""


@dataclass(frozen=True)
class Extents:
    """Shape and element type of one operand of a call; an extent that run time decides is None.

    ``numbers`` marks an operand that is not a tensor but its extents: whole numbers, handed to
    the kernel one by one unless they are known.
    """

    shape: tuple[int | None, ...]
    dtype: str = "float32"
    numbers: bool = False


def elements(operand: Extents) -> int:
    """Elements of an operand whose extents are known."""
    return prod(dim for dim in operand.shape if dim is not None)


def bytes_of(operands: Iterable[Extents]) -> float:
    """Bytes of tensors whose extents are known."""
    return float(sum(elements(o) * np.dtype(o.dtype).itemsize for o in operands if not o.numbers))


@dataclass(frozen=True)
class Kernel:
    """A kernel ready to be called.

    Attributes
    ----------
    title : str
        What it is, for people and profiles; a valid function name.
    function : tvm.tirx.PrimFunc
        Its arguments are the operands in order, then the output.
    """

    title: str
    function: Any


@dataclass(frozen=True)
class Work:
    """What one call has to do, whoever does it.

    Attributes
    ----------
    flops : float
        Two for every multiplication that is needed; 0 for work of another kind.
    bytes : float
        Operands and output, each once.
    near_bytes : float
        Loads of activations that rows of a sparse weight cannot share, from the first cache.
    rate : float
        How many times the FLOPs of float32's multiply-adds the kernel's unit reaches.
    """

    flops: float = 0.0
    bytes: float = 0.0
    near_bytes: float = 0.0
    rate: float = 1.0


@dataclass(frozen=True)
class Wish:
    """A form that the user asked for.

    Attributes
    ----------
    format : str
        ``dense``, ``csr``, ``bsr``, or another that a family knows.
    block : tuple[int, int] | None
        Rows x columns of a block; None for any.
    """

    format: str
    block: tuple[int, int] | None = None


class KernelFamily(ABC, Generic[Op]):
    """The kernels of one operator on one backend."""

    name: ClassVar[str]
    operator: ClassVar[type[Operator]]

    def refuses(self, op: Op, target: AnyTarget) -> str | None:
        """Why no kernel of the family computes ``op`` on ``target``; None if one does."""
        return None

    @abstractmethod
    def build(
        self, op: Op, operands: Sequence[Extents], output: Extents, target: AnyTarget
    ) -> Kernel:
        """The kernel of a call with these operands, in the backend's layout of activations."""

    def forms(
        self, op: Op, operands: Sequence[Extents], output: Extents, target: AnyTarget
    ) -> Mapping[str, Op]:
        """Other forms that the kernel of a call may have, by names: a measurement chooses."""
        return {}

    @abstractmethod
    def work(
        self, op: Op, operands: Sequence[Extents], output: Extents, nonzeros: int | None = None
    ) -> Work:
        """What a call of known extents has to do; ``nonzeros`` of the weight, None for all."""


class WeightedFamily(KernelFamily[Weighted]):
    """The kernels of an operator whose constant weight may be stored in several ways.

    ``counts_rows`` tells that its kernels of activations in tiles want to know, as a last operand,
    how many rows each leading index really has.
    """

    counts_rows: ClassVar[bool] = False

    @abstractmethod
    def candidates(
        self, op: Weighted, weight: WeightStatistics, target: AnyTarget, wish: Wish | None = None
    ) -> Sequence[Layout]:
        """Layouts that the weight may have: all worth comparing, or those nearest to a wish."""

    def structures(self, op: Weighted, target: AnyTarget) -> Sequence[str]:
        """What pruning is to take away as a unit, for kernels of ``op`` to skip it.

        As ``prune --structure`` has it; none where zeros make no kernel faster.
        """
        return ()

    def stacked(
        self, layers: Sequence[Sequence[np.ndarray]], layout: Layout
    ) -> list[np.ndarray] | None:
        """The packed weights of several layers, one below the other, as those of one layer.

        Arrays are as :meth:`pack` makes them, in order; None where the family has no such form.
        """
        return None

    def variants(
        self, op: Weighted, weight: WeightStatistics, target: AnyTarget, wish: Wish | None = None
    ) -> Sequence[Layout]:
        """More layouts that only a measurement can tell to be better, for the tuner."""
        return ()

    def second_form(self, layout: Layout, arrays: Mapping[str, np.ndarray]) -> str | None:
        """What the report says of arrays that hold a weight twice, for different sizes."""
        return None

    def remark(self, op: Weighted) -> str | None:
        """Why the family has no sparse layouts for ``op``, where it has none."""
        return None

    def unpacked(self, op: Weighted) -> Layout:
        """The layout of a weight that only run time brings, which is read as ``[N, K, 1]``.

        Raises
        ------
        ValueError
            When the family has none.
        """
        raise ValueError(f"{self.name} has no layout for a weight that is no constant")

    @abstractmethod
    def cost(
        self, op: Weighted, layout: Layout, weight: WeightStatistics, tokens: int, target: AnyTarget
    ) -> float:
        """Seconds that a call for so many tokens (or pixels) takes on one core, as predicted."""

    @abstractmethod
    def pack(
        self, op: Weighted, w: np.ndarray, layout: Layout, target: AnyTarget
    ) -> dict[str, np.ndarray]:
        """The arrays that the kernel reads in place of the weight ``[N, K]``, by name, in order."""
