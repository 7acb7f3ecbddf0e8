"""Whether this machine can run an artifact: its architecture, features, matrix unit and devices."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from sparse_tvm.cpu import allow_amx, architecture, cpu_model, host_features
from sparse_tvm.devices import parse_device
from sparse_tvm.errors import ArtifactError, OptionError

_OTHER_TARGET = (
    "compile it with --target native on this machine; `sparse-tvm targets` lists what runs here"
)

TILE_FAMILIES = frozenset({"tiles", "tile_attention", "tile_convolution"})
"""Families of kernels that compute in AMX's tiles."""


def check_machine(path: str | os.PathLike[str], target: Mapping[str, Any]) -> None:
    """Refuse an artifact for another architecture, or for features that this CPU lacks."""
    compiled_for = target["triple"].split("-")[0]
    if compiled_for != architecture():
        raise ArtifactError(
            f"{path} was compiled for {compiled_for}; this machine is {architecture()}",
            hint=_OTHER_TARGET,
        )
    missing = sorted(set(target["features"]) - host_features())
    if missing:
        raise ArtifactError(
            f"{path} was compiled for {target['name']} and needs CPU features that {cpu_model()} "
            f"lacks: {', '.join(missing)}",
            hint=_OTHER_TARGET,
        )


def allow_tiles(path: str | os.PathLike[str], manifest: Mapping[str, Any]) -> None:
    """Ask Linux for AMX's tiles if a kernel uses them."""
    families = {kernel.get("family") for kernel in manifest["kernels"].values()}
    if families & TILE_FAMILIES and not allow_amx():
        raise ArtifactError(
            f"{path} multiplies with AMX, which Linux does not let this process use",
            hint="compile with --precision fp32, or with --precision int8 --target avx512-vnni",
        )


def index_of(path: str | os.PathLike[str], device: str | None, compiled_for: str) -> int:
    """Which device of its kind an artifact shall run on."""
    if device is None:
        return 0
    kind, index = parse_device(device)
    if kind != compiled_for:
        raise OptionError(
            f"{path} was compiled for {compiled_for}, not for {kind}",
            hint="compile it with a --target of that kind; `sparse-tvm targets` lists them",
        )
    return index
