"""What this machine and installation have, and what of it makes compiling or running slow."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from sparse_tvm.cpu import architecture, cpu_model, host_features, usable_cores
from sparse_tvm.errors import TargetError
from sparse_tvm.extras import installed_distribution
from sparse_tvm.linker import linkers
from sparse_tvm.machine_state import doubts, read_state, signs
from sparse_tvm.targets import TARGETS, Target, get_target

_PACKAGES = ("apache-tvm", "apache-tvm-ffi", "numpy", "onnx", "onnxruntime")
_EMULATORS = ("qemu-aarch64", "qemu-aarch64-static", "qemu-x86_64", "qemu-x86_64-static")
_CPU = Path("/sys/devices/system/cpu/cpu0")
_WIDEST_BITS = {"x86_64": 512}


def diagnose() -> dict[str, Any]:
    """Return what there is, as JSON types.

    Returns
    -------
    dict[str, Any]
        ``python``, ``packages`` (versions by name, None where missing), ``cpu``,
        ``architecture``, ``features`` that some target uses, ``cores`` that this process may use,
        ``caches`` (sizes as Linux has them, by level), ``target`` that ``native`` is or None,
        ``linkers`` and ``emulators`` that were found, and ``problems``: sentences.
    """
    try:
        target = get_target()
    except TargetError:  # a machine that none fits still may compile for others
        target = None
    used = {feature for known in TARGETS.values() for feature in known.features}
    found = [name for name, command in linkers(f"{architecture()}-linux-gnu") if command]
    return {
        "python": platform.python_version(),
        "packages": {
            name: _version(name) for name in (installed_distribution() or "sparse-tvm", *_PACKAGES)
        },
        "cpu": cpu_model(),
        "architecture": architecture(),
        "features": sorted(used & host_features()),
        "cores": usable_cores(),
        "caches": _caches(),
        "target": target.name if target is not None else None,
        "linkers": found,
        "emulators": [name for name in _EMULATORS if shutil.which(name)],
        "problems": _problems(target, found),
    }


def _problems(target: Target | None, found_linkers: list[str]) -> list[str]:
    problems = []
    if target is None:
        problems.append("no target fits this CPU: models can be compiled here, but not run")
    elif target.vector_bits < _WIDEST_BITS.get(architecture(), 0):
        problems.append(f"this CPU's vectors have {target.vector_bits} bits, others' have 512")
    if not found_linkers:
        problems.append("no linker: nothing can be compiled; install gcc, clang or ziglang")
    logical = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical
    if allowed < logical:
        problems.append(f"this process may use {allowed} of {logical} logical CPUs")
    busy = os.getloadavg()[0]
    if busy > 0.5 * usable_cores():
        problems.append(f"the machine is busy (load {busy:.1f}): timings will be noisy")
    state = read_state()
    return [*problems, *doubts(state), *signs(state)]


def _caches() -> dict[str, str]:
    sizes = {}
    for index in sorted((_CPU / "cache").glob("index*")):
        if _read(index / "type") != "Instruction":
            sizes[f"L{_read(index / 'level')}"] = _read(index / "size")
    return sizes


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
