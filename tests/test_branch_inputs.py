"""Branches of which one can be compiled: the input that decides must have its value."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx_models import build, normal

import sparse_tvm
from sparse_tvm.errors import InputError
from sparse_tvm.frontends.importer.model import import_onnx

BRANCH = """%(name)s () => (float[1,1] %(name)s_q) {
    %(name)s_p = MaxPool<kernel_shape=[%(window)d], strides=[%(window)d]>(x)
    %(name)s_s = Shape(%(name)s_p)
    %(name)s_n = Gather(%(name)s_s, two)
    %(name)s_c = Equal(%(name)s_n, one)
    %(name)s_f = If(%(name)s_c) <
        then_branch = t () => (float[] a) { a = Squeeze(%(name)s_p, last) },
        else_branch = e () => (float[] b) { b = Identity(%(name)s_p) }
    >
    %(name)s_q = MatMul(%(name)s_f, %(name)s_w)
}"""


def two_rates(first: int, second: int) -> onnx.ModelProto:
    """A model of one window of audio, whose length depends on the rate."""
    yes, no = (
        BRANCH % {"name": name, "window": window} for name, window in (("y", first), ("n", second))
    )
    graph = f"""(float[1,1,t] x, int64 rate) => (float[1,1] q) {{
        fast = Equal(rate, sixteen)
        q = If(fast) <then_branch = {yes}, else_branch = {no}>
    }}"""
    tensors = {"two": np.array(2), "one": np.array(1), "last": np.array([2])}
    weights = {"y_w": normal(1, 1), "n_w": normal(1, 1) + 1}
    return build(graph, sixteen=np.array(16000), **tensors, **weights)


def test_a_branch_for_other_sizes_is_left_out(tmp_path):
    onnx.save(two_rates(8, 4), tmp_path / "m.onnx")
    sparse_tvm.compile(tmp_path / "m.onnx", tmp_path / "m.so", verify=True)
    compiled = sparse_tvm.load(tmp_path / "m.so")
    assert compiled.inputs[1].only == 16000
    assert compiled.bounds["t"] == (8, 15)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for size in (8, 13, 15):
        feeds = {"x": normal(1, 1, size), "rate": np.array(16000)}
        expected = session.run(None, feeds)[0]
        for _ in range(2):
            np.testing.assert_allclose(compiled.run(feeds)["q"], expected, rtol=1e-5)
        with pytest.raises(InputError, match="'rate' is 8000, but must be 16000"):
            compiled.run({**feeds, "rate": np.array(8000)})


def test_branches_for_the_same_sizes_are_both_there(tmp_path):
    onnx.save(two_rates(8, 8), tmp_path / "m.onnx")
    sparse_tvm.compile(tmp_path / "m.onnx", tmp_path / "m.so", verify=True)
    compiled = sparse_tvm.load(tmp_path / "m.so")
    assert compiled.inputs[1].only is None
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for rate in (8000, 16000):
        feeds = {"x": normal(1, 1, 10), "rate": np.array(rate)}
        np.testing.assert_allclose(compiled.run(feeds)["q"], session.run(None, feeds)[0], rtol=1e-5)


def test_a_fixed_size_decides_too():
    imported = import_onnx(two_rates(8, 2), {"x": (1, 1, 9)})
    assert imported.inputs[1].only == 16000


def test_first_states_share_the_batch():
    graph = """(float[steps,batch,4] x, float[1,other,8] h) => (float[1,batch,8] y) {
        _, y = GRU<hidden_size=8>(x, w, r, none, none, h)
    }""".replace("none, none", ", ")
    imported = import_onnx(build(graph, w=normal(1, 24, 4), r=normal(1, 24, 8)))
    assert [spec.shape for spec in imported.inputs] == [("steps", "batch", 4), (1, "batch", 8)]
