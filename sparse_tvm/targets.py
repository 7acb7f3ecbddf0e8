"""The targets a model can be compiled for: one registry entry each.

``native`` stands for the best entry that this machine's CPU has the features for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparse_tvm.cpu import architecture, host_features
from sparse_tvm.errors import TargetError


@dataclass(frozen=True)
class Target:
    """A CPU family, as code generation, kernels and the cost model need to know it.

    Attributes
    ----------
    name : str
        As ``--target`` takes it.
    cpu : str
        LLVM's ``mcpu``.
    triple : str
        LLVM's target triple.
    features : tuple[str, ...]
        Features (LLVM's names) without which the code does not run.
    attributes : tuple[str, ...]
        LLVM's ``mattr``, beyond what ``cpu`` implies.
    vector_bits : int
        Width of a vector register.
    registers : int
        Architectural vector registers.
    l1_bytes : int
        First-level data cache of a core, on most CPUs meant.
    bytes_per_cycle_memory : float
        Measured bandwidth of one core from memory.
    """

    name: str
    cpu: str
    triple: str
    features: tuple[str, ...]
    attributes: tuple[str, ...]
    vector_bits: int
    registers: int
    l1_bytes: int
    bytes_per_cycle_memory: float

    @property
    def lanes(self) -> int:
        """float32 elements in a vector register."""
        return self.vector_bits // 32

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


_X86_64_V2 = ("cx16", "popcnt", "sahf", "sse3", "sse4.1", "sse4.2", "ssse3")
_X86_64_V3 = (*_X86_64_V2, "avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe")
_X86_64_V4 = (*_X86_64_V3, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl")

TARGETS = {
    target.name: target
    for target in (
        Target(
            name="x86-64-v4",
            cpu="x86-64-v4",
            triple="x86_64-unknown-linux-gnu",
            features=_X86_64_V4,
            attributes=("-prefer-256-bit",),  # or LLVM halves our 512-bit vectors
            vector_bits=512,
            registers=32,
            l1_bytes=48 << 10,
            bytes_per_cycle_memory=6.0,
        ),
        Target(
            name="x86-64-v3",
            cpu="x86-64-v3",
            triple="x86_64-unknown-linux-gnu",
            features=_X86_64_V3,
            attributes=(),
            vector_bits=256,
            registers=16,
            l1_bytes=32 << 10,
            bytes_per_cycle_memory=6.0,
        ),
        Target(
            name="x86-64-v2",
            cpu="x86-64-v2",
            triple="x86_64-unknown-linux-gnu",
            features=_X86_64_V2,
            attributes=(),
            vector_bits=128,
            registers=16,
            l1_bytes=32 << 10,
            bytes_per_cycle_memory=6.0,
        ),
    )
}
"""Every target by name, the most capable of a family first."""


def get_target(name: str = "native") -> Target:
    """Return the target called ``name``.

    Raises
    ------
    TargetError
        When there is no such target, or ``native`` finds none that fits this machine.
    """
    known = f"known targets: native, {', '.join(TARGETS)}"
    if name != "native":
        if name not in TARGETS:
            raise TargetError(f"unknown target {name!r}", hint=known)
        return TARGETS[name]
    host = host_features()
    for target in TARGETS.values():
        if target.triple.startswith(architecture()) and host.issuperset(target.features):
            return target
    raise TargetError(f"no target fits this machine's CPU ({architecture()})", hint=known)
