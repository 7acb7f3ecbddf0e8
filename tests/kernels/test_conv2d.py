"""The convolution kernels against a loop over taps in NumPy: any extents, formats and CPU."""

from __future__ import annotations

import numpy as np
from harness import PER_FORM, every_form, run, simd, thread_counts
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from sparse_tvm.operators import Activation, Bias, Clamp, Layout, Residual
from sparse_tvm.schedules.cpu.block_arrays import balanced_partition, stored_arrays
from sparse_tvm.schedules.cpu.conv2d import Conv2d, conv2d, depthwise_conv2d, tiling_of

RELU = Activation("relu")
STEPS = [Bias(), Residual(), RELU, Clamp(high=0.5), Clamp(-0.25, 0.25)]
sides = st.integers(1, 20)
problems = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "channels": st.integers(1, 5),
        "size": st.tuples(sides, sides),
        "out": st.integers(1, 20),
        "kernel": st.tuples(st.integers(1, 4), st.integers(1, 4)),
        "stride": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "dilation": st.tuples(st.integers(1, 2), st.integers(1, 2)),
        "pads": st.tuples(*[st.integers(0, 2)] * 4),
        "epilogue": st.lists(st.sampled_from(STEPS)),
        "threads": thread_counts,
        "seed": st.integers(0, 2**16),
    }
)
SMALL = {
    "batch": 2,
    "channels": 3,
    "size": (9, 7),
    "out": 5,
    "kernel": (3, 3),
    "stride": (2, 1),
    "dilation": (1, 1),
    "pads": (1, 1, 1, 0),
    "epilogue": [Bias(), Residual(), RELU],
    "threads": 2,
    "seed": 0,
}
LONG_ROWS = {**SMALL, "size": (1, 100), "kernel": (1, 3), "pads": (0, 1, 0, 1)}
FEW = settings(PER_FORM, max_examples=3)  # each compiles for seconds
formats = st.sampled_from([("dense", 1), ("dense", 4), ("dense", 6), ("csr", 1), ("bsr", 4)])


@given(problem=problems, form=formats)
@example(problem=SMALL, form=("dense", 6))
@example(problem=SMALL, form=("bsr", 4))
@example(
    problem={**SMALL, "size": (1, 100), "kernel": (1, 3), "pads": (0, 1, 0, 1)}, form=("csr", 1)
)
@FEW
@every_form
def test_conv2d(target, problem, form):
    format, rows = form[0], min(form[1], problem["out"])
    conv = convolution(problem)
    rng = np.random.default_rng(problem["seed"])
    w = rng.standard_normal((conv.out_channels, conv.channels, *conv.kernel)).astype("float32")
    if format != "dense":
        w[rng.random(w.shape) < 0.7] = 0
    layout = Layout("convolution", format, (rows, 1))
    arrays = stored_arrays(w.reshape(len(w), -1), layout)
    tiling = tiling_of(conv, rows, simd(target))
    if layout.sparse:
        arrays["indices"] = tiling.offsets()[arrays["indices"]]
        arrays["partition"] = balanced_partition(arrays["indptr"], tiling.jobs)
    else:
        arrays["offsets"] = tiling.offsets()

    def build(shapes):
        epilogue = problem["epilogue"]
        return conv2d(conv, problem["batch"], shapes, layout, epilogue, simd(target))

    check(target, problem, conv, w, list(arrays.values()), build, rng)


@given(problem=problems, multiplier=st.integers(1, 2))
@example(problem=SMALL, multiplier=2)
@FEW
@every_form
def test_depthwise_conv2d(target, problem, multiplier):
    conv = convolution({**problem, "out": problem["channels"] * multiplier})
    rng = np.random.default_rng(problem["seed"])
    w = rng.standard_normal((conv.out_channels, 1, *conv.kernel)).astype("float32")
    arrays = [w.reshape(len(w), -1)]

    def build(shapes):
        return depthwise_conv2d(conv, problem["batch"], shapes, problem["epilogue"], simd(target))

    check(target, problem, conv, w, arrays, build, rng)


def convolution(problem):
    conv = Conv2d(
        problem["channels"],
        problem["size"],
        problem["out"],
        problem["kernel"],
        problem["stride"],
        problem["dilation"],
        problem["pads"],
    )
    assume(min(conv.out_size) > 0)
    return conv


def check(target, problem, conv, w, arrays, build, rng):
    x = rng.standard_normal((problem["batch"], conv.channels, *conv.size)).astype("float32")
    shape = (problem["batch"], conv.out_channels, *conv.out_size)
    expected = reference(x.astype("float64"), w.astype("float64"), conv)
    extras = []
    for step in problem["epilogue"]:
        if step.operand:
            is_bias = isinstance(step, Bias)
            extra = rng.standard_normal(conv.out_channels if is_bias else shape).astype("float32")
            extras.append(extra)
            expected += extra.reshape(-1, 1, 1) if is_bias else extra
        elif isinstance(step, Clamp):
            expected = np.clip(expected, step.low, step.high)
        else:
            expected = np.maximum(expected, 0)
    kernel = build((x.shape, shape))
    result = run(kernel, target, problem["threads"], [x, *arrays, *extras], shape)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-4)


def reference(x, w, conv):
    """Convolution as a sum over taps; a group for each input channel if ``w`` has one."""
    top, left, bottom, right = conv.pads
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    if w.shape[1] != conv.channels or (w.shape[1] == 1 and conv.out_channels != 1):
        x = np.repeat(x, len(w) // conv.channels, axis=1)
    (height, width), result = conv.out_size, 0
    for i in range(conv.kernel[0]):
        for j in range(conv.kernel[1]):
            rows, columns = i * conv.dilation[0], j * conv.dilation[1]
            taken = x[
                :,
                :,
                rows : rows + (height - 1) * conv.stride[0] + 1 : conv.stride[0],
                columns : columns + (width - 1) * conv.stride[1] + 1 : conv.stride[1],
            ]
            if w.shape[1] == taken.shape[1]:
                result = result + np.einsum("bchw,oc->bohw", taken, w[:, :, i, j])
            else:
                result = result + taken * w[:, 0, i, j].reshape(-1, 1, 1)
    return result
