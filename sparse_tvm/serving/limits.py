"""What values and sizes a model takes, beyond its specs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
    """Return the limits in a manifest, and those in the configuration beside the artifact.

    Parameters
    ----------
    inputs : sequence of TensorSpec
        The model's inputs.
    bounds : Mapping[str, sequence of int]
        Smallest and largest sizes of symbolic dimensions.
    tokenizer : Path
        The directory that may hold the model's ``config.json``.
    """
    path = tokenizer / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    values: dict[str, tuple[int, int]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for spec in inputs:
        if isinstance(length := config.get(_TABLES.get(spec.name, "")), int):
            values[spec.name] = 0, length - 1
        elif spec.values is not None:
            values[spec.name] = spec.values[0], spec.values[1] - 1
        if spec.name == "input_ids" and isinstance(config.get(_POSITIONS), int):
            sizes.update({d: (1, config[_POSITIONS]) for d in spec.shape[1:] if isinstance(d, str)})
    sizes.update({name: (low, high) for name, (low, high) in bounds.items()})
    return Limits(values, sizes)
