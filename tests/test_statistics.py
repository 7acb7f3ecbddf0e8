"""What pruning is assumed to leave is what it leaves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_tvm.sparsity.analysis import analyse
from sparse_tvm.sparsity.formats import BSR
from sparse_tvm.sparsity.masks import prune_array
from sparse_tvm.sparsity.statistics import AssumedWeight, MeasuredWeight

blocks = st.tuples(st.integers(1, 9), st.integers(1, 9))


def weight(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    block=blocks,
    share=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_measured_weight_counts_the_blocks_that_are_stored(shape, block, share, seed):
    w = weight(shape, seed) * (np.random.default_rng(seed).random(shape) >= share)
    measured = MeasuredWeight(w)
    assert measured.shape == shape
    assert measured.stored_blocks(block) == len(BSR.from_dense(w, block).indices)
    assert measured.stored_blocks((1, 1)) == measured.nonzeros == np.count_nonzero(w)
    assert measured.sparsity == pytest.approx(1 - np.count_nonzero(w) / w.size)


def test_measured_weight_knows_its_structure():
    w = prune_array(weight((64, 64)), 0.9, "4x1")
    assert MeasuredWeight(w).block == analyse(w != 0).block == (4, 1)
    assert MeasuredWeight(prune_array(w, 0.95, "unstructured")).block is None


STRUCTURES = [(1, 1), (4, 1), (1, 8), (16, 16)]
STORED = [(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (1, 4), (4, 4), (3, 1), (6, 1), (5, 3)]


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.parametrize("block", STORED, ids=str)
@pytest.mark.parametrize("share", [0.5, 0.9, 0.98])
@pytest.mark.parametrize("shape", [(192, 128), (125, 83)], ids=str)
def test_assumed_weight_predicts_random_masks(structure, block, share, shape):
    """Blocks pruned at random: the mean count of fifty masks, within what chance explains."""
    assumed = AssumedWeight(shape, share, structure)
    (n, k), (r, c) = shape, structure
    rng = np.random.default_rng(0)
    counts = []
    for _ in range(50):
        kept = rng.random((-(-n // r), -(-k // c))) >= share
        mask = kept.repeat(r, axis=0).repeat(c, axis=1)[:n, :k]
        counts.append(MeasuredWeight(mask).stored_blocks(block))
    tolerance = 5 * np.std(counts, ddof=1) / np.sqrt(len(counts)) + 1
    assert assumed.stored_blocks(block) == pytest.approx(np.mean(counts), abs=tolerance)


def test_assumed_weight_without_pruning_stores_everything():
    assumed = AssumedWeight((10, 7), 0.0)
    assert (assumed.nonzeros, assumed.sparsity, assumed.block) == (70, 0.0, None)
    assert assumed.stored_blocks((4, 2)) == 3 * 4
    everything = AssumedWeight((10, 7), 1.0, (4, 1))
    assert (everything.nonzeros, everything.block) == (0, (4, 1))
    assert everything.stored_blocks((4, 2)) == 0


@pytest.mark.parametrize("structure", [(1, 1), (4, 1), (16, 1)], ids=str)
def test_assumed_weight_is_what_the_pruner_makes_of_random_values(structure):
    shape, share = (768, 768), 0.9
    w = prune_array(weight(shape), share, "x".join(map(str, structure)))
    measured, assumed = MeasuredWeight(w), AssumedWeight(shape, share, structure)
    assert assumed.nonzeros == pytest.approx(measured.nonzeros, rel=1e-3)
    assert assumed.block == measured.block
    for block in [(1, 1), (2, 1), (4, 1), (8, 1), (16, 1)]:
        predicted = assumed.stored_blocks(block)
        assert predicted == pytest.approx(measured.stored_blocks(block), rel=0.02)
