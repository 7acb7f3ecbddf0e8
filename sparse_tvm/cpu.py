"""What this machine's CPU can do, and how much of it this process may use."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # version 2: "<quota|max> <period>"
_CGROUP1 = Path("/sys/fs/cgroup/cpu")

# Of x86-64 Linux: the system call, its code ARCH_REQ_XCOMP_PERM, and the state that tiles are.
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18

_LLVM_NAMES = {  # Linux's name -> LLVM's, where they differ
    "3dnowprefetch": "prfchw",
    "abm": "lzcnt",
    "amx_bf16": "amx-bf16",
    "amx_int8": "amx-int8",
    "amx_tile": "amx-tile",
    "avx512_bf16": "avx512bf16",
    "avx512_bitalg": "avx512bitalg",
    "avx512_fp16": "avx512fp16",
    "avx512_vbmi2": "avx512vbmi2",
    "avx512_vnni": "avx512vnni",
    "avx512_vp2intersect": "avx512vp2intersect",
    "avx512_vpopcntdq": "avx512vpopcntdq",
    "avx_vnni": "avxvnni",
    "bmi1": "bmi",
    "lahf_lm": "sahf",
    "pclmulqdq": "pclmul",
    "pni": "sse3",
    "rdrand": "rdrnd",
    "sha_ni": "sha",
    "sse4_1": "sse4.1",
    "sse4_2": "sse4.2",
}
_ARM_BITS = {  # of what the kernel tells a process: by word, LLVM's names
    16: {  # AT_HWCAP
        "neon": 1,
        "aes": 3,
        "sha2": 6,
        "crc": 7,
        "lse": 8,
        "fullfp16": 10,
        "rdm": 12,
        "complxnum": 14,
        "rcpc": 15,
        "dotprod": 20,
        "sve": 22,
        "fp16fml": 23,
    },
    26: {  # AT_HWCAP2
        "sve2": 1,
        "i8mm": 13,
        "bf16": 14,
    },
}
_ARM_PARTS = {
    0xD03: "Cortex-A53",
    0xD08: "Cortex-A72",
    0xD0B: "Cortex-A76",
    0xD0C: "Neoverse N1",
    0xD40: "Neoverse V1",
    0xD49: "Neoverse N2",
    0xD4F: "Neoverse V2",
}
_BASELINE = {"x86_64": {"sse", "sse2"}, "aarch64": {"neon"}}
_ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}

_ONE_CORE_PER_THREAD = -2


def architecture() -> str:
    """Return the machine's architecture as LLVM triples begin: ``x86_64``, ``aarch64``."""
    machine = platform.machine().lower()
    return _ARCHITECTURES.get(machine, machine)


def host_features() -> frozenset[str]:
    """Return the CPU's features by LLVM's names, such as ``avx2``, ``fma``, ``avx512f``.

    Where the system does not tell, only what every CPU of the architecture has.
    """
    baseline = _BASELINE.get(architecture(), set())
    if architecture() == "aarch64":  # in an emulator, /proc/cpuinfo is the host's
        return _arm_features() | baseline
    flags = _cpuinfo("flags").split()
    return frozenset(_LLVM_NAMES.get(flag, flag) for flag in flags) | baseline


def _arm_features() -> frozenset[str]:
    try:
        ask = ctypes.CDLL(None).getauxval
    except AttributeError:
        return frozenset()
    ask.argtypes, ask.restype = [ctypes.c_ulong], ctypes.c_ulong
    return frozenset(
        name
        for word, bits in _ARM_BITS.items()
        for name, bit in bits.items()
        if ask(word) >> bit & 1
    )


def cpu_part() -> int | None:
    """Return the part number of an Arm CPU, such as 0xD08 for Cortex-A72, where Linux tells."""
    part = _cpuinfo("CPU part")
    return int(part, 16) if part else None


def cpu_model() -> str:
    """Return the CPU's model name, such as ``AMD EPYC 7763``, or its architecture."""
    part = _ARM_PARTS.get(cpu_part() or 0, "")
    return _cpuinfo("model name") or part or platform.processor() or architecture()


def allow_amx() -> bool:
    """Ask Linux to let this process use AMX's tiles; tell whether it may."""
    if not {"amx-tile"} <= host_features():
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0)


def use_threads(threads: int) -> None:
    """Let TVM's parallel regions use this many threads; the pool itself has one per core."""
    import tvm_ffi

    cores = [str(core) for core in range(max(threads, usable_cores()))]
    configure = tvm_ffi.get_global_func("runtime.config_threadpool")
    configure(_ONE_CORE_PER_THREAD, len(cores), cores)
    configure(_ONE_CORE_PER_THREAD, threads, cores[:threads])


def usable_cores() -> int:
    """Return how many physical cores this process may use, at least 1.

    Affinity counts, and so does a container's CPU quota, rounded down: a thread beyond the quota
    is stopped in the middle of a parallel region and makes the others wait.
    """
    cores = len({_siblings(cpu) for cpu in _allowed_cpus()})
    quota = _cgroup_quota()
    return max(1, cores if quota is None else min(cores, int(quota)))


def _cpuinfo(field: str) -> str:
    """Return the first value of `field` in /proc/cpuinfo, or an empty string."""
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""


def _allowed_cpus() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _siblings(cpu: int) -> str:
    """Return what identifies the physical core of a logical CPU."""
    try:
        return Path(_TOPOLOGY.format(cpu)).read_text().strip()
    except OSError:
        return str(cpu)


def _cgroup_quota() -> float | None:
    """Return the CPUs' worth of time that the container may use, None without a limit."""
    try:
        if _CGROUP_QUOTA.exists():
            quota, period = _CGROUP_QUOTA.read_text().split()
        else:
            quota = (_CGROUP1 / "cpu.cfs_quota_us").read_text()
            period = (_CGROUP1 / "cpu.cfs_period_us").read_text()
        return float(quota) / float(period) if float(quota) > 0 else None
    except (OSError, ValueError):  # no such files, or "max"
        return None
