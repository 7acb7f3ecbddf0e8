"""Conversions of the layout of images against NumPy: any extents, strides and phases."""

from __future__ import annotations

import numpy as np
from harness import FORMS, KERNELS, run, simd, thread_counts
from hypothesis import assume, given
from hypothesis import strategies as st
from image_harness import Extent, apart, images, mask, phases_of, to_planes, windows

from sparse_tvm.schedules.cpu.image_pack import READ_BEYOND, image_pack
from sparse_tvm.schedules.cpu.plane_code import image_mask
from sparse_tvm.schedules.cpu.planes import Border, Planes, Rows, Window


@given(
    images,
    st.one_of(windows, apart),
    st.booleans(),
    st.booleans(),
    st.sampled_from(FORMS),
    thread_counts,
)
@KERNELS
def test_into_planes(image, window, from_planes, beyond, target, threads):
    extent = Extent(image)
    assume(all(size > 0 for size in window.out_size(extent.numbers)))
    x = extent.random(image["channels"])
    border = READ_BEYOND.with_gap(image["gap"]) if beyond else Border(image["gap"])
    if from_planes:
        source, here = (Planes(*size, border) for size in (extent.symbols, extent.numbers))
        stored = to_planes(x, here)
    else:
        source, here, stored = Rows(*extent.symbols), Rows(*extent.numbers), x
    batch, channels = x.shape[:2]
    wanted, there = (
        Planes(*window.phase_size(size), window.reads) for size in (extent.symbols, extent.numbers)
    )
    kernel = image_pack(extent.batch, channels, source, wanted, window, extent.names, simd(target))
    stored = stored.reshape(batch, channels, here.size)
    out_shape = (batch, channels * len(window.phases), there.size)
    y = run(kernel, target, threads, [stored, *extent.sizes], out_shape)
    np.testing.assert_array_equal(y, to_planes(phases_of(x, window), there, border=0))


@given(images, st.sampled_from(FORMS), thread_counts)
@KERNELS
def test_out_of_planes(image, target, threads):
    extent, border = Extent(image), Border(image["gap"])
    x = extent.random(image["channels"])
    source, rows = Planes(*extent.symbols, border), Rows(*extent.symbols)
    images = extent.batch, x.shape[1], source, rows
    kernel = image_pack(*images, Window(), extent.names, simd(target))
    stored = to_planes(x, Planes(*extent.numbers, border))
    out_shape = (*x.shape[:2], x.shape[2] * x.shape[3])
    y = run(kernel, target, threads, [stored, *extent.sizes], out_shape)
    np.testing.assert_array_equal(y.reshape(x.shape), x)


@given(images, st.sampled_from(FORMS))
@KERNELS
def test_mask(image, target):
    extent, border = Extent(image), Border(image["gap"])
    kernel = image_mask(Planes(*extent.symbols, border), extent.names)
    expected = mask(Planes(*extent.numbers, border))
    out = run(kernel, target, 1, extent.sizes, expected.shape, "int32")
    np.testing.assert_array_equal(out, expected)
