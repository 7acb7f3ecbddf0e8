"""How near a pruned sentence encoder is to the unpruned one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr


@dataclass(frozen=True)
class Scores:
    """Of unit vectors against the unpruned model's.

    `spearman`: rank correlation of the similarities of all pairs. `cosine`: the mean over
    sentences. `neighbours`: the share of sentences whose nearest neighbour is the same.
    """

    spearman: float
    cosine: float
    neighbours: float

    @classmethod
    def of(cls, unpruned: np.ndarray, pruned: np.ndarray) -> Scores:
        """Compare two float32 ``[sentences, features]``."""
        pairs = np.triu_indices(len(unpruned), 1)
        left, right = unpruned @ unpruned.T, pruned @ pruned.T
        correlation = float(spearmanr(left[pairs], right[pairs]).statistic)
        for similarities in (left, right):
            np.fill_diagonal(similarities, -2)
        same = left.argmax(1) == right.argmax(1)
        return cls(correlation, float((unpruned * pruned).sum(1).mean()), float(same.mean()))
