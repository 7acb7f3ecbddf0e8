"""Packing for tensor cores: the order of registers, and 2:4 with the places of its values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_tvm.schedules.cuda.fragments import compress, fragments, places_of


def halves(words: np.ndarray) -> np.ndarray:
    return words.view(np.float16).reshape(*words.shape, 2)


def test_a_thread_has_rows_g_and_g_plus_8():
    w = np.arange(2 * 32 * 48, dtype=np.float16).reshape(2, 32, 48)
    found = halves(fragments(w))
    assert found.shape == (2, 2, 3, 32, 4, 2)
    for thread in (0, 5, 31):
        g, t = divmod(thread, 4)
        tile = w[1, 16:, 32:]
        expected = [
            [tile[row, column], tile[row, column + 1]]
            for column, row in ((2 * t, g), (2 * t, g + 8), (2 * t + 8, g), (2 * t + 8, g + 8))
        ]
        np.testing.assert_array_equal(found[1, 1, 2, thread], expected)


@given(st.integers(0, 2**32 - 1))
def test_what_is_compressed_can_be_spread_again(seed):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((16, 8, 4)) * (
        rng.permuted(np.tile([1, 1, 0, 0], (16, 8, 1)), axis=-1) * (rng.random((16, 8, 4)) < 0.8)
    )
    values, places = compress(w.reshape(16, 32))
    again = np.zeros_like(w)
    at = places.reshape(16, 8, 2)
    np.put_along_axis(again, at.astype(int), values.reshape(16, 8, 2), axis=-1)
    np.testing.assert_array_equal(again, w)
    assert (at[..., 0] < at[..., 1]).all()  # as the instruction demands


def test_places_by_row_and_half():
    places = np.random.default_rng(0).integers(0, 4, (16, 16)).astype(np.uint8)
    words = places_of(places)[0, 0]
    for row in range(16):
        for stored in range(16):
            word = int(words[row % 8 * 2 + stored // 8])
            assert word >> (row // 8 * 16 + stored % 8 * 2) & 3 == places[row, stored]


def test_more_than_two_of_four():
    with pytest.raises(ValueError, match="more than two of four"):
        compress(np.array([[1.0, 2, 0, 3]]))
