"""Winograd's convolutions in planes against NumPy: any image, epilogue, CPU and thread count."""

from __future__ import annotations

import numpy as np
import pytest
from harness import FORMS, KERNELS, run, simd, thread_counts
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from image_harness import (
    Extent,
    apply_epilogue,
    convolved,
    epilogues,
    from_planes,
    images,
    mask,
    to_planes,
)

from sparse_tvm.operators import Activation, Bias, Layout, Residual
from sparse_tvm.schedules.cpu.families.winograd import packed
from sparse_tvm.schedules.cpu.images import Images
from sparse_tvm.schedules.cpu.planes import Border, Planes, Window
from sparse_tvm.schedules.cpu.winograd import OUTPUTS, Bands, transforms
from sparse_tvm.schedules.cpu.winograd_planes import winograd_planes
from sparse_tvm.targets import TARGETS

SAME = Window((3, 3), pads=(1, 1, 1, 1))
problems = st.fixed_dictionaries(
    {
        "image": images,
        "pads": st.tuples(*[st.integers(0, 2)] * 4),
        "n": st.integers(1, 20),
        "rows": st.sampled_from([1, 2, 4, 6]),
        "outputs": st.sampled_from(list(OUTPUTS)),
        "vectors": st.integers(1, 4),
        "unit": st.integers(1, 40),
        "padded": st.booleans(),
        "epilogue": epilogues,
        "target": st.sampled_from(FORMS),
        "threads": thread_counts,
    }
)


def check(image, pads, n, rows, outputs, vectors, unit, padded, epilogue, target, threads):
    extent, window = Extent(image), Window((3, 3), pads=pads)
    assume(all(size > 0 for size in window.out_size(extent.numbers)))
    x = extent.random(image["channels"])
    rng = np.random.default_rng(image["seed"])
    w = rng.standard_normal((n, image["channels"] * 9)).astype("float32")
    gap = max(window.reads.gap, -window.wider, 1 - window.wider if padded else 0)
    same_pitch = gap + window.wider
    out = window.out_size(extent.numbers)
    borders = [window.reads.with_gap(gap), (SAME.reads if padded else Border())]
    borders = [borders[0], borders[1].with_gap(same_pitch), Border(same_pitch, front=(0, 20))]

    def planes(size):
        sizes = (size, window.out_size(size), window.out_size(size))
        return [Planes(*size, border) for size, border in zip(sizes, borders, strict=True)]

    (source, there, like), kernels = planes(extent.numbers), planes(extent.symbols)
    bands = Bands(*out, outputs, simd(target).lanes)
    unit = max(bands_ for bands_ in range(1, unit + 1) if bands.count % bands_ == 0)
    if there.pitch < bands.span:
        unit = bands.count
    layout = Layout("test", "dense", (min(rows, n), 1)).having(vectors=vectors, outputs=outputs)
    if not image["symbolic"]:
        layout = layout.having(bands=unit)
    kernel = winograd_planes(
        Images(extent.batch, image["channels"], n, *kernels[:2], window, extent.names),
        layout,
        epilogue,
        kernels[2:] * epilogue.count(Residual()),
        simd(target),
    )
    y, extras = apply_epilogue(convolved(x, w, window), epilogue, rng)
    arguments = [
        to_planes(x, source),
        packed(w, layout),
        *extent.sizes,
        *([mask(there)] if padded else []),
        *(extra if extra.ndim == 1 else to_planes(extra, like) for extra in extras),
    ]
    stored = run(kernel, target, threads, arguments, (len(x), n, there.size))
    scale = max(1.0, float(np.abs(y).max()))
    np.testing.assert_allclose(from_planes(stored, there), y, rtol=0, atol=4e-5 * scale)
    if padded:
        whole = to_planes(from_planes(stored, there), there)
        np.testing.assert_array_equal(stored, whole)


IMAGE = {"batch": 1, "channels": 5, "height": 14, "width": 14, "gap": 0, "seed": 0}
IMAGE["symbolic"] = False
ANY_SIZE = {**IMAGE, "symbolic": True}
PROBLEM = {
    "image": IMAGE,
    "pads": SAME.pads,
    "n": 9,
    "rows": 4,
    "outputs": 4,
    "vectors": 3,
    "unit": 1,
    "padded": True,
    "epilogue": [Bias(), Residual(), Activation("relu")],
    "target": TARGETS["x86-64-v2"],
    "threads": 2,
}


@given(problems)
@example(PROBLEM)
@example({**PROBLEM, "image": {**IMAGE, "batch": 2, "width": 7}, "unit": 40})
@example({**PROBLEM, "image": {**IMAGE, "height": 1, "width": 1}, "outputs": 5})
@example({**PROBLEM, "image": {**IMAGE, "height": 56, "width": 56}, "unit": 7, "padded": False})
@example({**PROBLEM, "image": ANY_SIZE})
@example({**PROBLEM, "image": {**ANY_SIZE, "batch": 2, "height": 33, "width": 33}})
@example({**PROBLEM, "image": {**ANY_SIZE, "batch": 2, "width": 3}})
@example({**PROBLEM, "image": {**ANY_SIZE, "height": 1, "width": 1}, "outputs": 5})
@settings(KERNELS, max_examples=16)
def test_convolution(problem):
    check(**problem)


@pytest.mark.parametrize("outputs", OUTPUTS)
def test_transforms_filter_as_direct_sums_do(outputs):
    found = transforms(outputs)
    rng = np.random.default_rng(outputs)
    x, taps = rng.standard_normal(outputs + 2), rng.standard_normal(3)
    products = (found.weight @ taps) * (np.array(found.input) @ x)
    wanted = [x[i : i + 3] @ taps for i in range(outputs)]
    np.testing.assert_allclose(np.array(found.output) @ products, wanted, rtol=1e-12, atol=1e-12)
