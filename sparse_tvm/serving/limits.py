"""What values and sizes a model takes, beyond its specs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_tvm.errors import ArtifactError
from sparse_tvm.spec import TensorSpec

_TABLES = {"input_ids": "vocab_size", "token_type_ids": "type_vocab_size"}
"""Inputs that index a table, and where a Hugging Face configuration has the table's length."""

_POSITIONS = "max_position_embeddings"


@dataclass(frozen=True)
class Limits:
    """Ranges, each from its first to its last.

    Parameters
    ----------
    values : Mapping[str, tuple[int, int]]
        By input: integers that index a table of the model.
    sizes : Mapping[str, tuple[int, int]]
        By symbolic dimension.
    """

    values: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def limits_of(
    inputs: Sequence[TensorSpec], bounds: Mapping[str, Sequence[int]], tokenizer: Path
) -> Limits:
    """Return the limits in a manifest and those in the configuration beside the artifact: the
    narrower ones where both say something, as an index beyond its table would crash the model.

    Parameters
    ----------
    inputs : sequence of TensorSpec
        The model's inputs.
    bounds : Mapping[str, sequence of int]
        Smallest and largest sizes of symbolic dimensions.
    tokenizer : Path
        The directory that may hold the model's ``config.json``.
    """
    config = read_config(tokenizer / "config.json")
    values: dict[str, tuple[int, int]] = {}
    sizes = {name: (low, high) for name, (low, high) in bounds.items()}
    for spec in inputs:
        if spec.values is not None:
            values[spec.name] = spec.values[0], spec.values[1] - 1
        if isinstance(length := config.get(_TABLES.get(spec.name, "")), int):
            low, high = values.get(spec.name, (0, length - 1))
            values[spec.name] = low, min(high, length - 1)
        if spec.name == "input_ids" and isinstance(longest := config.get(_POSITIONS), int):
            for dim in spec.shape[1:]:
                if isinstance(dim, str):
                    low, high = sizes.get(dim, (1, longest))
                    sizes[dim] = low, min(high, longest)
    return Limits(values, sizes)


def read_config(path: Path) -> Any:
    """Return a configuration in JSON, or an empty one where there is no such file.

    Raises
    ------
    ArtifactError
        When it cannot be read.
    """
    try:
        return json.loads(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: {error}") from error
