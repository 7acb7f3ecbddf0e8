"""The kernel of layer and RMS norm against NumPy."""

from __future__ import annotations

import numpy as np
from harness import PER_FORM, every_form, from_tiles, run, simd, thread_counts, tiles_for, to_tiles
from hypothesis import given
from hypothesis import strategies as st

from sparse_tvm.schedules.cpu.normalize import layer_norm


@given(
    lead=st.integers(1, 3),
    rows=st.integers(1, 40),
    features=st.integers(1, 70),
    epsilon=st.sampled_from([1e-12, 1e-5, 0.1]),
    offset=st.sampled_from([0.0, 100.0]),
    symbolic=st.booleans(),
    threads=thread_counts,
)
@PER_FORM
@every_form
def test_layer_norm(target, lead, rows, features, epsilon, offset, symbolic, threads):
    rng = np.random.default_rng(features)
    x = (offset + rng.standard_normal((lead, rows, features))).astype("float32")
    gamma, beta = rng.standard_normal((2, features)).astype("float32")
    kernel = layer_norm(tiles_for(lead, rows, symbolic), features, epsilon, simd(target))
    arguments = [to_tiles(x), gamma, beta]
    tiled = run(kernel, target, threads, arguments, (lead, -(-rows // 16), features, 16))
    exact = x.astype("float64")
    centred = exact - exact.mean(axis=-1, keepdims=True)
    deviation = np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + epsilon)
    # The mean's rounding error is a few units in the last place of the offset.
    atol = 1e-5 + offset * 2e-6 / deviation.min() if features > 1 else 1e-2 / np.sqrt(epsilon)
    expected = centred / deviation * gamma + beta
    np.testing.assert_allclose(from_tiles(tiled, rows), expected, rtol=1e-5, atol=atol)


@given(rows=st.integers(1, 40), features=st.integers(1, 70), symbolic=st.booleans())
@PER_FORM
@every_form
def test_rms_norm(target, rows, features, symbolic):
    rng = np.random.default_rng(features)
    x = rng.standard_normal((2, rows, features)).astype("float32")
    gamma = rng.standard_normal(features).astype("float32")
    kernel = layer_norm(tiles_for(2, rows, symbolic), features, 1e-5, simd(target), centred=False)
    tiled = run(kernel, target, 1, [to_tiles(x), gamma], (2, -(-rows // 16), features, 16))
    squares = np.square(x.astype("float64")).mean(axis=-1, keepdims=True)
    expected = x / np.sqrt(squares + 1e-5) * gamma
    np.testing.assert_allclose(from_tiles(tiled, rows), expected, rtol=1e-5, atol=1e-5)
