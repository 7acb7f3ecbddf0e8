"""What a target is: a CPU family as code generation, kernels and the cost model see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_SHARES = 8
"""Of the last cache, that are within one core's reach."""

_MISSED, _GROWTH = 0.167, 1.7
"""Share from memory of what fills the last cache when it is read in turns, and the power of how
often it fills it with which that grows: as measured on an AMD EPYC (Zen 4)."""

_UNDISTURBED = 0.15
"""Share of the first cache that stays there of what is read at random beside a stream."""


def beside(one: float, other: float, apart: float) -> float:
    """Cycles of both, beside each other: the sum where ``apart`` is 1, else nearer the longer."""
    longer = max(one, other)
    return longer * float((1 + (min(one, other) / longer) ** apart) ** (1 / apart))


@dataclass(frozen=True)
class Caches:
    """Data caches, in bytes, as most CPUs of a family have them.

    Attributes
    ----------
    l1, l2 : int
        Of one core.
    l3 : int
        What one core has of the last cache when all cores share it; 0 without one.
    """

    l1: int
    l2: int
    l3: int

    def shares(self, nbytes: float) -> tuple[float, float, float]:
        """Of so many bytes that are read in turns, what comes from the second cache, from the last
        one, and from memory: a core has most of the last one, as the others seldom use theirs."""
        far = min(1.0, _MISSED * self.filled(nbytes) ** _GROWTH)
        second = min(1 - far, self.l2 / max(1.0, nbytes))
        return second, 1 - far - second, far

    def filled(self, nbytes: float) -> float:
        """How many times so many bytes fill what a core has of the last cache."""
        return nbytes / max(self.l2, _SHARES * self.l3)


@dataclass(frozen=True)
class Costs:
    """What a core takes for the steps of a kernel: the cost model's parameters.

    Attributes
    ----------
    ghz : float
        Sustained clock, which turns cycles into seconds.
    fma : float
        Cycles per vector multiply-add, where many are independent.
    spilled : float
        The same, where the sum did not fit into the registers.
    load : float
        Cycles per load of a vector that hits the first cache.
    narrow : float
        Share of its time, and of a multiply-add's, that one takes of half a vector or less.
    scalars_per_load : int
        Weights that one load brings: 1 where each is broadcast from memory, 4 where
        multiply-adds take their factor from an element of a vector.
    l2_line : float
        Cycles that a 64-byte line takes longer from the second cache than from the first.
    streamed : float
        Bytes of weights that take a computing core another cycle: most of the way from the last
        cache they come beside its work.
    words : float
        The same of weights in int8 and bf16, whose products leave little time to come in. Where the
        CPU foresees them, `streamed` and `memory` tell of these, too.
    memory : float
        Bytes per cycle of one core from memory, while it finds nearly all else in its first cache.
    disturbed : float
        How much longer that takes where it finds nothing there, as a share: what is read at random
        from the second cache takes the place of what the CPU would ask for ahead.
    second, last : float
        The same from the second cache, and from the last one.
    row : float
        Cycles to begin and end a block row.
    sum : float
        Cycles per vector to load a sum and store it again, between parts of columns.
    index : float
        Cycles that a stored block takes longer for being sparse.
    apart : float
        How well loads and multiply-adds keep out of each other's way: what takes `a` cycles of one
        and `b` of the other takes ``(a**apart + b**apart) ** (1 / apart)``. With 1 they take turns,
        the larger the more only the longer counts.
    """

    ghz: float
    fma: float
    spilled: float
    load: float
    narrow: float
    scalars_per_load: int
    l2_line: float
    streamed: float
    words: float
    memory: float
    disturbed: float
    second: float
    last: float
    row: float
    sum: float
    index: float
    apart: float


@dataclass(frozen=True)
class Target:
    """A CPU family.

    Attributes
    ----------
    name : str
        As ``--target`` takes it.
    description : str
        What users know it by: CPUs that are of the family.
    aliases : tuple[str, ...]
        Other names that ``--target`` takes.
    cpu : str
        LLVM's ``mcpu``.
    triple : str
        LLVM's target triple.
    features : tuple[str, ...]
        Features (LLVM's names) that the code may use, and without which it does not run.
    attributes : tuple[str, ...]
        LLVM's ``mattr``, beyond what ``cpu`` implies.
    vector_bits : int
        Width of a vector register.
    registers : int
        Architectural vector registers.
    caches : Caches
        Sizes.
    costs : Costs
        The cost model's parameters.
    foresees : bool
        Whether a stream of weights that nothing is computed beside comes sooner if nobody asks
        for it ahead: the CPU does, and each request takes the place of one of its own.
    parts : tuple[int, ...]
        Part numbers of the CPUs that it is made for; ``native`` prefers it on these.
    """

    name: str
    description: str
    aliases: tuple[str, ...]
    cpu: str
    triple: str
    features: tuple[str, ...]
    attributes: tuple[str, ...]
    vector_bits: int
    registers: int
    caches: Caches
    costs: Costs
    foresees: bool = False
    parts: tuple[int, ...] = ()

    @property
    def architecture(self) -> str:
        """As the triple begins: ``x86_64``, ``aarch64``."""
        return self.triple.split("-")[0]

    @property
    def lanes(self) -> int:
        """float32 elements in a vector register."""
        return self.vector_bits // 32

    def has(self, *features: str) -> bool:
        """Whether its code may use all of these features (LLVM's names, as ``amx-int8``)."""
        return set(features) <= set(self.features)

    def beside(self, loads: float, multiplied: float) -> float:
        """Cycles of so many of loads and of multiply-adds, beside each other."""
        return beside(loads, multiplied, self.costs.apart)

    def memory_cycles(self, x_bytes: float) -> float:
        """Cycles for a byte from memory, while so many bytes of X are read at random."""
        near = min(1.0, _UNDISTURBED * self.caches.l1 / max(1.0, x_bytes))
        return (1 + self.costs.disturbed * (1 - near)) / self.costs.memory

    def seconds(self, cycles: float) -> float:
        """Seconds that so many cycles of a core take."""
        return cycles / (self.costs.ghz * 1e9)

    def tvm_target(self) -> dict[str, Any]:
        """The target as TVM takes it."""
        target: dict[str, Any] = {"kind": "llvm", "mtriple": self.triple, "mcpu": self.cpu}
        return {**target, "mattr": list(self.attributes)} if self.attributes else target

    def as_json(self) -> dict[str, Any]:
        """The target as the manifest stores it."""
        return {
            "name": self.name,
            "triple": self.triple,
            "cpu": self.cpu,
            "features": list(self.features),
            "vector_bits": self.vector_bits,
        }
