"""Channels that become pixels, in planes, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from harness import FORMS, run, simd
from image_harness import Extent, from_planes, to_planes

from sparse_tvm.schedules.cpu.pixel_shuffle import pixel_shuffle
from sparse_tvm.schedules.cpu.planes import Border, Planes

READ = Border(2, front=(1, 1), tail=(1, 1), padded=True)


@pytest.mark.parametrize("target", FORMS, ids=lambda target: target.name)
@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("border", [Border(1), READ])
@pytest.mark.parametrize(
    ("blocks", "starts", "ends"),
    [
        ((2, 2), (0, 0), (0, 0)),
        ((3, 1), (2, 0), (1, 3)),
        ((2, 4), (1, 3), (1, 0)),
        ((1, 2), (4, 5), (0, 1)),
    ],
)
def test_pixel_shuffle(target, symbolic, border, blocks, starts, ends):
    image = {"batch": 2, "height": 6, "width": 11, "symbolic": symbolic, "seed": 0}
    extent, outputs = Extent(image), 3
    block_rows, block_columns = blocks
    x = extent.random(outputs * block_rows * block_columns)

    def planes(size):
        wide = [size[i] * blocks[i] - starts[i] - ends[i] for i in (0, 1)]
        return Planes(*size, Border(3)), Planes(*wide, border)

    source, wanted = planes(extent.symbols)
    here, there = planes(extent.numbers)
    kernel = pixel_shuffle(
        extent.batch, x.shape[1], source, wanted, blocks, starts, extent.names, simd(target)
    )
    arguments = [to_planes(x, here), *extent.sizes]
    stored = run(kernel, target, 2, arguments, (2, outputs, there.size))
    height, width = extent.numbers
    split = x.reshape(2, outputs, block_rows, block_columns, height, width)
    whole = split.transpose(0, 1, 4, 2, 5, 3)
    whole = whole.reshape(2, outputs, height * block_rows, width * block_columns)
    cut = [slice(starts[i], whole.shape[2 + i] - ends[i]) for i in (0, 1)]
    expected = whole[:, :, cut[0], cut[1]]
    np.testing.assert_array_equal(from_planes(stored, there), expected)
    if border.padded:
        np.testing.assert_array_equal(stored, to_planes(expected, there))
