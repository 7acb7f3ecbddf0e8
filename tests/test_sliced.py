"""Sliced rows: what they are made of, and how many steps they take."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_tvm.sparsity.sliced import SlicedRows, steps_per_slot, window_steps


def random_matrix(n, k, density, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, k)) * (rng.random((n, k)) < density)).astype("float32")


@given(
    n=st.integers(1, 40),
    k=st.integers(16, 60),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    lanes=st.sampled_from([4, 8, 16]),
    together=st.sampled_from([1, 4]),
    seed=st.integers(0, 99),
)
def test_any_matrix_comes_back(n, k, density, lanes, together, seed):
    w = random_matrix(n, k, density, seed)
    rows = SlicedRows.from_dense(w, lanes, together)
    np.testing.assert_array_equal(rows.to_dense(), w)
    assert np.count_nonzero(rows.data) == np.count_nonzero(w)
    assert rows.windows.max(initial=0) <= k - lanes
    assert rows.places.max(initial=0) < lanes
    assert not np.any(np.diff(rows.indptr) % together)


def test_as_many_steps_as_are_needed():
    """A lane takes one value in each step: a full row needs one for each column."""
    w = np.zeros((16, 24), np.float32)
    w[3] = 1
    assert window_steps(w != 0, 8) == 24
    w[0:8, 5] = w[8:16, 9] = 1  # with the row's own, or in a step of another slice
    assert window_steps(w != 0, 8) == 25
    w[4, 23] = 1
    assert window_steps(w != 0, 8) == 25


def test_a_row_without_a_window_is_refused():
    with pytest.raises(ValueError, match="7 columns are shorter than a window of 8"):
        SlicedRows.from_dense(np.ones((3, 7), np.float32), 8)


@pytest.mark.parametrize("density", [0.05, 0.1, 0.5])
def test_the_steps_of_random_places_are_foreseen(density):
    n, k, lanes = 512, 384, 8
    found = window_steps(random_matrix(n, k, density) != 0, lanes)
    assert steps_per_slot(density, lanes) * n / lanes * k == pytest.approx(found, rel=0.03)
