"""Pruned weights in a small file: the values that stay as float16, and a bit for each block."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparse_tvm.errors import ModelError
from sparse_tvm.sparsity.blocks import parse_block
from sparse_tvm.sparsity.formats import occupied_blocks
from sparse_tvm.sparsity.masks import spread

_VALUES, _BLOCKS, _SHAPE = ".values", ".blocks", ".shape"
_FACTS = "facts"


def save_packed(
    path: Path, weights: Mapping[str, NDArray[np.float32]], block: str, facts: Mapping[str, Any]
) -> None:
    """Write weights.

    Parameters
    ----------
    path : Path
        The .npz.
    weights : Mapping[str, array]
        By name, float32. Matrices ``[N, K]`` are packed; others, such as biases, are kept whole.
    block : str
        Of which the zeros of the matrices are made, such as ``"4x1"``, or ``"1x1"``.
    facts : Mapping[str, Any]
        How the weights came to be, and how good they are: for JSON.
    """
    arrays: dict[str, NDArray[Any]] = {}
    size = parse_block(block)
    for name, weight in weights.items():
        if weight.ndim != 2:
            arrays[name] = weight
            continue
        keep = occupied_blocks(weight != 0, size)
        arrays[name + _VALUES] = weight[spread(keep, size, weight.shape)].astype(np.float16)
        arrays[name + _BLOCKS] = np.packbits(keep)
        arrays[name + _SHAPE] = np.array(weight.shape)
    arrays[_FACTS] = np.array(json.dumps({**facts, "block": block}))
    # Not savez_compressed: that writes the time of day into the file.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(name + ".npy"), "w") as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def load_packed(path: Path) -> tuple[dict[str, NDArray[np.float32]], dict[str, Any]]:
    """Read weights that `save_packed` wrote, and the facts about them.

    Raises
    ------
    ModelError
        When `path` is no such file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        facts: dict[str, Any] = json.loads(str(arrays.pop(_FACTS)))
        size = parse_block(facts["block"])
        weights: dict[str, NDArray[np.float32]] = {}
        for name, array in arrays.items():
            if name.endswith(_VALUES):
                stem = name.removesuffix(_VALUES)
                shape = tuple(arrays[stem + _SHAPE])
                blocks = tuple(-(-n // b) for n, b in zip(shape, size, strict=True))
                bits = np.unpackbits(arrays[stem + _BLOCKS], count=int(np.prod(blocks)))
                weight = np.zeros(shape, np.float32)
                weight[spread(bits.astype(bool).reshape(blocks), size, shape)] = array
                weights[stem] = weight
            elif not name.endswith((_BLOCKS, _SHAPE)):
                weights[name] = array
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ModelError(
            f"{path} holds no packed weights: {error}",
            hint="give a file of scripts/prune_minilm.py",
        ) from error
    return weights, facts
