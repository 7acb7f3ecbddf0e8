"""What layers cost on a GPU, as far as it decides how weights are stored."""

from __future__ import annotations

import pytest

from sparse_tvm.operators import Layout
from sparse_tvm.schedules.cuda.warpgroup_tiles import SIDE, tiles, warpgroup_seconds
from sparse_tvm.targets.cuda import H100

DENSE, BLOCKS = Layout("", "dense"), Layout("", "bsr", (SIDE, SIDE))
TWO_OF_FOUR = Layout("", "2:4", (1, 4))
MATRICES = [(768, 768), (3072, 768), (768, 3072), (4096, 4096), (4096, 1024)]
TOKENS = [1, 16, 128, 1024, 2048, 4096, 8192, 32768]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("matrix", MATRICES)
def test_blocks_pay_by_what_they_leave_out(matrix, tokens):
    dense = warpgroup_seconds(matrix, DENSE, None, tokens, H100)
    every = matrix[0] * matrix[1] // SIDE**2
    shares = [
        warpgroup_seconds(matrix, BLOCKS, round(every * share), tokens, H100) / dense
        for share in (1, 0.75, 0.5, 0.25, 0.1)
    ]
    assert shares[0] > 1.2
    assert shares[1] > 1
    assert shares[-1] < 0.85
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize("matrix", MATRICES)
def test_activations_and_tokens_cost(matrix):
    for layout in (DENSE, TWO_OF_FOUR):
        plain = [warpgroup_seconds(matrix, layout, None, tokens, H100) for tokens in TOKENS]
        assert plain == sorted(plain)
        active = [warpgroup_seconds(matrix, layout, None, tokens, H100, True) for tokens in TOKENS]
        assert all(a > b for a, b in zip(active, plain, strict=True))


def test_what_an_h200_took():
    measured = {  # microseconds, scripts/cuda_speed.py --layers
        (DENSE, 4096, 4096, 4096): 189.1,
        (TWO_OF_FOUR, 4096, 4096, 4096): 142.5,
        (DENSE, 3072, 768, 4096): 30.5,
        (TWO_OF_FOUR, 3072, 768, 4096): 22.9,
        (BLOCKS, 3072, 768, 4096): 11.8,
        (BLOCKS, 768, 3072, 4096): 10.8,
        (DENSE, 768, 3072, 128): 8.8,
    }
    for (layout, n, k, tokens), seconds in measured.items():
        stored = round(n * k / SIDE**2 * 0.1) if layout == BLOCKS else None
        predicted = warpgroup_seconds((n, k), layout, stored, tokens, H100) * 1e6
        assert 0.8 < predicted / seconds < 1.25


def test_each_tile_fits_a_multiprocessor():
    for layout in (DENSE, BLOCKS, TWO_OF_FOUR):
        for tile in tiles(layout):
            assert tile.shared_bytes(layout.format == "2:4") <= 227 * 1024
            assert tile.stages >= 3
