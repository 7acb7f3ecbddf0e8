"""Fourier transforms, columns, deformed convolutions and reversed sequences, at several sizes."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator
from onnx_models import build, normal

import sparse_tvm
from sparse_tvm.errors import SparseTvmError


def check(model, tmp_path, feeds, reference=None):
    """Compile a model and compare it with ONNX Runtime, or another reference."""
    onnx.save(model, tmp_path / "m.onnx")
    sparse_tvm.compile(tmp_path / "m.onnx", tmp_path / "m.so", verify=False)
    reference = reference or onnxruntime.InferenceSession(tmp_path / "m.onnx")
    artifact = sparse_tvm.load(tmp_path / "m.so", threads=2)
    for each in feeds:
        [ours], [theirs] = artifact.run(each).values(), reference.run(None, each)
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("parts", "options", "length"),
    [
        (1, "", None),
        (2, "", 16),
        (1, "<onesided=1>", None),
        (2, "<inverse=1>", None),
        (1, "<onesided=1>", 9),
        (2, "<inverse=1>", 20),
    ],
)
@pytest.mark.parametrize("axis", [1, -2])
def test_fourier_transform(tmp_path, parts, options, length, axis):
    bins = "k" if length is None else str(length)
    graph = f"""(float[n,12,{parts}] x) => (float[n,{"b" if options else bins},2] y) {{
        y = DFT{options}(x, {"length" if length else ""}, axis)
    }}"""
    model = build(graph, opset=20, axis=np.array(axis), length=np.array(length or 12))
    check(model, tmp_path, [{"x": normal(n, 12, parts)} for n in (1, 5)])


def test_a_symbolic_transform_is_refused(tmp_path):
    graph = "(float[1,n,1] x) => (float[1,n,2] y) { y = DFT(x, , axis) }"
    onnx.save(build(graph, opset=20, axis=np.array(1)), tmp_path / "m.onnx")
    with pytest.raises(SparseTvmError, match="its length is symbolic"):
        sparse_tvm.compile(tmp_path / "m.onnx", tmp_path / "m.so")


@pytest.mark.parametrize("onesided", [0, 1])
def test_spectrogram_of_any_length(tmp_path, onesided):
    bins = 400 // 2 + 1 if onesided else 400
    graph = f"""(float[n,s,1] x) => (float[n,f,{bins},2] y) {{
        y = STFT<onesided={onesided}>(x, step, window, length)
    }}"""
    window = np.hanning(400).astype("float32")
    numbers = {"step": np.array(160), "length": np.array(400)}
    model = build(graph, window=window, **numbers)
    feeds = [{"x": normal(*size, 1)} for size in ((1, 400), (2, 1600), (1, 1039))]
    check(model, tmp_path, feeds, Spectrogram(window, 160, onesided))


class Spectrogram:
    """What ONNX Runtime has to 1e-3 only."""

    def __init__(self, window, step, onesided):
        self._window, self._step = window, step
        self._transform = np.fft.rfft if onesided else np.fft.fft

    def run(self, _, feeds):
        size = len(self._window)
        windows = np.lib.stride_tricks.sliding_window_view(feeds["x"][..., 0], size, 1)
        bins = self._transform(windows[:, :: self._step] * np.float64(self._window))
        return [np.stack([bins.real, bins.imag], -1)]


@pytest.mark.parametrize(
    "options",
    [
        "",
        "strides=[2, 2]",
        "pads=[1, 0, 1, 0]",
        "dilations=[1, 2]",
        "strides=[3, 1], pads=[0, 1, 0, 1]",
    ],
)
def test_columns_to_image(tmp_path, options):
    def blocks(size, axis):
        def given(name, default):
            text = options.split(f"{name}=[")
            return [int(n) for n in text[1].split("]")[0].split(",")] if text[1:] else default

        pads = given("pads", [0] * 4)
        room = size + pads[axis] + pads[axis + 2] - given("dilations", [1, 1])[axis] * 2 - 1
        return room // given("strides", [1, 1])[axis] + 1

    count = blocks(11, 0) * blocks(9, 1)
    graph = f"""(float[n,18,{count}] x) => (float[n,2,11,9] y) {{
        y = Col2Im<{options}>(x, image, kernel)
    }}""".replace("<>", "")
    model = build(graph, opset=18, image=np.array([11, 9]), kernel=np.array([3, 3]))
    check(model, tmp_path, [{"x": normal(n, 18, count)} for n in (1, 3)])


@pytest.mark.parametrize(("groups", "masked"), [(1, True), (2, False)])
def test_deformed_convolution(tmp_path, groups, masked):
    inputs = "x, w, o, b, m" if masked else "x, w, o, b"
    graph = f"""(float[n,4,10,9] x, float[n,36,10,9] o, float[n,18,10,9] m)
        => (float[n,6,10,9] y) {{
        y = DeformConv<pads=[1, 1, 1, 1], group={groups}, offset_group=2>({inputs})
    }}"""
    if not masked:
        graph = graph.replace(", float[n,18,10,9] m", "")
    model = build(graph, opset=19, w=normal(6, 4 // groups, 3, 3), b=normal(6))
    feeds = [
        {"x": normal(n, 4, 10, 9), "o": 2 * normal(n, 36, 10, 9), "m": normal(n, 18, 10, 9)}
        for n in (1, 2)
    ]
    feeds = [each if masked else {k: each[k] for k in ("x", "o")} for each in feeds]
    check(model, tmp_path, feeds, ReferenceEvaluator(model))


def test_reversed_sequences(tmp_path):
    graph = """(float[t,n,3] x, int64[n] lengths) => (float[t,n,3] y) {
        y = ReverseSequence<batch_axis=1, time_axis=0>(x, lengths)
    }"""
    feeds = [
        {"x": normal(t, n, 3), "lengths": np.arange(n) % t + 1} for t, n in ((1, 1), (7, 3), (5, 9))
    ]
    check(build(graph), tmp_path, feeds)


def test_a_scan_of_old_is_refused(tmp_path):
    graph = """(float[1,2] h, float[1,3,2] x) => (float[1,2] y) {
        y = Scan <num_scan_inputs=1, body = b (float[2] s, float[2] e) => (float[2] t) {
            t = Add(s, e)
        }> ("", h, x)
    }""".replace('""', "")
    onnx.save(build(graph, opset=8), tmp_path / "m.onnx")
    with pytest.raises(SparseTvmError, match="Scan of opset 8 has a batch"):
        sparse_tvm.compile(tmp_path / "m.onnx", tmp_path / "m.so")
