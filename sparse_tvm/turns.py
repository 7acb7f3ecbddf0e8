"""Runs of many images that take turns: some go through all layers before the next ones come.

So what a layer writes is in the caches when the next one reads it. The compiler says of which
models that may be (`sparse_tvm.passes.image_turns`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparse_tvm.spec import TensorSpec

_NEAR_BYTES = 4 << 20
"""Of the largest tensor, for each thread, which has an image at least: several such stay near."""

_WORTH = 2.0
"""How many times as large as all tensors of a turn weights may be, which each turn reads again."""


@dataclass(frozen=True)
class Turns:
    """How a model's runs take turns.

    Attributes
    ----------
    batched : tuple[bool, ...]
        Which inputs have the batch in front; the others are the same in each turn.
    widest, moved : float
        The largest tensor, and all of them, times the inputs of an image.
    weights : int
        Bytes of the weights.
    threads : int
        Of the model.
    """

    batched: tuple[bool, ...]
    widest: float
    moved: float
    weights: int
    threads: int

    @classmethod
    def of(
        cls, manifest: Mapping[str, Any], inputs: Sequence[TensorSpec], threads: int
    ) -> Turns | None:
        """What a manifest says; None where a run is of all images at once."""
        entry = manifest.get("turns")
        if entry is None:
            return None
        batched = tuple(spec.shape[:1] == (entry["dimension"],) for spec in inputs)
        weights = int(manifest["totals"]["weight_bytes"])
        return cls(batched, float(entry["widest"]), float(entry["moved"]), weights, threads)

    def images(self, values: Sequence[np.ndarray]) -> int:
        """Images of a turn, or 0 for all at once."""
        own = [value for value, has in zip(values, self.batched, strict=True) if has]
        batch = len(own[0])
        if batch < 2:
            return 0
        read = sum(value.nbytes for value in own) / batch
        near = self.threads * max(1, int(_NEAR_BYTES / (self.widest * read)))
        worth = int(self.weights / (_WORTH * self.moved * read))
        images = max(near, worth)
        return images if images < batch else 0

    def parts(self, values: Sequence[np.ndarray], images: int) -> Iterator[list[np.ndarray]]:
        """The inputs of each turn."""
        batch = next(len(v) for v, has in zip(values, self.batched, strict=True) if has)
        for start in range(0, batch, images):
            yield [
                value[start : start + images] if has else value
                for value, has in zip(values, self.batched, strict=True)
            ]
