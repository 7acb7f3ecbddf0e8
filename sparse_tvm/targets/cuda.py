"""NVIDIA's GPUs, by compute capability, as code generation, kernels and the cost model see them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparse_tvm.cpu import architecture


@dataclass(frozen=True)
class Gpu:
    """What the cost model knows of a device: the one that most users of an architecture have.

    Attributes
    ----------
    capability : int
        As NVIDIA numbers architectures: 80 for ``sm_80``.
    device : str
        The device that the numbers are of.
    processors : int
        Streaming multiprocessors.
    ghz : float
        Sustained clock.
    tensor : int
        Multiply-adds per cycle of one multiprocessor, of 16-bit floats, by ``mma.sync``.
    fma : int
        Multiply-adds per cycle of one multiprocessor, of float32.
    memory, l2 : float
        Bytes per second from device memory, and from the second cache, in all.
    shared_bytes : int
        Shared memory of a multiprocessor that blocks can have.
    warpgroup : int
        Multiply-adds per cycle of one multiprocessor, of 16-bit floats, by ``wgmma``; 0 without.
    """

    capability: int
    device: str
    processors: int
    ghz: float
    tensor: int
    fma: int
    memory: float
    l2: float
    shared_bytes: int
    warpgroup: int = 0

    @property
    def architecture(self) -> str:
        """As NVIDIA's compilers take it."""
        return f"sm_{self.capability}"


A100 = Gpu(80, "A100", 108, 1.41, 1024, 64, 1.6e12, 4.0e12, 164 * 1024)
L4 = Gpu(89, "L4", 58, 2.0, 512, 128, 0.3e12, 1.8e12, 100 * 1024)
H100 = Gpu(90, "H100", 132, 1.7, 1280, 128, 3.3e12, 5.5e12, 228 * 1024, 2048)
B200 = Gpu(100, "B200", 148, 1.8, 1280, 128, 7.7e12, 8.0e12, 228 * 1024)
"""``mma.sync`` reaches about 60 % of what ``wgmma`` and ``tcgen05`` do on the last two."""


@dataclass(frozen=True)
class CudaTarget:
    """One or several architectures of NVIDIA's GPUs.

    Attributes
    ----------
    name : str
        As ``--target`` takes it.
    description : str
        What users know it by.
    gpus : tuple[Gpu, ...]
        The architectures that code is made for, the least capable first.
    """

    name: str
    description: str
    gpus: tuple[Gpu, ...]

    aliases: tuple[str, ...] = ()

    @property
    def gpu(self) -> Gpu:
        """The device that costs are predicted for: the most capable one."""
        return self.gpus[-1]

    @property
    def least(self) -> Gpu:
        """The least capable architecture, whose instructions all others have."""
        return self.gpus[0]

    @property
    def triple(self) -> str:
        """Of the host's code, which is for this machine's architecture, any CPU of it."""
        return f"{architecture()}-linux-gnu"

    def tvm_target(self) -> dict[str, Any]:
        """The target as TVM takes it: device code for the least capable architecture."""
        return {
            "kind": "cuda",
            "arch": self.least.architecture,
            "max_threads_per_block": 1024,
            "max_shared_memory_per_block": 48 * 1024,
            "thread_warp_size": 32,
            "host": {"kind": "llvm", "mtriple": self.triple},
        }

    def as_json(self) -> dict[str, Any]:
        """The target as the manifest stores it."""
        return {
            "name": self.name,
            "triple": self.triple,
            "features": [],
            "architectures": [gpu.architecture for gpu in self.gpus],
        }


CUDA_TARGETS = (
    CudaTarget("cuda-sm80", "A100, A30", (A100,), ("a100",)),
    CudaTarget("cuda-sm89", "L4, L40, RTX 40", (L4,), ("l4",)),
    CudaTarget("cuda-sm90", "H100, H200", (H100,), ("h100", "h200")),
    CudaTarget("cuda-sm100", "B200, GB200", (B200,), ("b200",)),
    CudaTarget("cuda", "all of these, and newer ones by PTX", (A100, L4, H100, B200)),
)
