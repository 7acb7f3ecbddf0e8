"""Weights of a Hugging Face directory: dense or compressed safetensors, in one file or many."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparse_tvm.errors import ModelError
from sparse_tvm.frontends.safetensors_file import TensorFile
from sparse_tvm.sparsity.sources import (
    bitmask_origin,
    bitmask_parts,
    decode_bitmask,
    find_bitmasks,
)

_WEIGHT_PARTS = ("_scale", "_zero_point")
_INPUT_PARTS = ("input_scale", "input_zero_point")
"""Behind a quantised weight's name, and instead of it; compressed-tensors calls them so."""


class Checkpoint:
    """The weights in a directory.

    Parameters
    ----------
    directory : Path
        With ``*.safetensors``.
    sparsity_config : Mapping[str, Any]
        What compressed-tensors wrote in ``config.json``, if it did.

    Raises
    ------
    ModelError
        When there is no safetensors file, or one is damaged.
    """

    def __init__(self, directory: Path, sparsity_config: Mapping[str, Any]) -> None:
        self.files = {path: TensorFile(path) for path in sorted(directory.glob("*.safetensors"))}
        if not self.files:
            raise ModelError(
                f"{directory}: has no *.safetensors file", hint=_pickle_hint(directory)
            )
        self._format = str(sparsity_config.get("format", ""))
        self._home = {name: file for file in self.files.values() for name in file.names()}
        self.compressed = find_bitmasks(set(self._home))
        self.quantised = {name for name in self._home if f"{name}_scale" in self._home}

    def names(self) -> set[str]:
        """Return the names of all weights."""
        stored = set(self._home)
        parts = {p for name in self.compressed for p in bitmask_parts(name, stored)}
        parts |= {f"{name}{part}" for name in self.quantised for part in _WEIGHT_PARTS}
        stems = [name.removesuffix("weight") for name in self.quantised]
        parts |= {f"{stem}{part}" for stem in stems for part in _INPUT_PARTS}
        return (stored - parts) | self.compressed

    def input_rounding(self, name: str) -> list[np.ndarray | None]:
        """Return the scale and the zero point by which a quantised weight's layer rounds."""
        stem = name.removesuffix("weight")
        names = [f"{stem}{part}" for part in _INPUT_PARTS]
        return [self._home[n][n] if n in self._home else None for n in names]

    def __getitem__(self, name: str) -> np.ndarray:
        """Return a weight: mapped, or decoded."""
        if name in self.quantised:
            scale = np.asarray(self._home[f"{name}_scale"][f"{name}_scale"], np.float32)
            return self._home[name][name].astype(np.float32) * scale
        if name not in self.compressed:
            return self._home[name][name]
        try:
            return decode_bitmask(lambda part: self._home[part][part], name)
        except (ValueError, KeyError) as error:
            path = self._home[f"{name}.bitmask"].path
            raise ModelError(f"{path}: compressed weight cannot be decoded: {error}") from error

    def origin(self, name: str) -> str | None:
        """Tell how a weight is stored, if it is stored sparse."""
        return bitmask_origin(self[name], self._format) if name in self.compressed else None


def _pickle_hint(directory: Path) -> str | None:
    if any(directory.glob("*.bin")):
        return (
            "its weights are pickles (*.bin), which are never opened here: convert them with "
            "model.save_pretrained(directory, safe_serialization=True)"
        )
    return "weights are read from safetensors files"
