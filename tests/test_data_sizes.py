"""Tensors whose sizes depend on data, from model to result, against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx_models import build, normal

import sparse_tvm
from sparse_tvm.errors import InputError, ModelError, SparseTvmError

SIZES = ({"n": 1}, {"n": 7}, {"n": 40})


def check(graph, tmp_path, feeds, *, opset=17, verify=True, **tensors):
    """Compile a graph, which verifies it, and compare it for more inputs; return the artifact."""
    model = build(graph, opset=opset, **tensors)
    onnx.save(model, tmp_path / "m.onnx")
    sparse_tvm.compile(tmp_path / "m.onnx", tmp_path / "m.so", verify=verify)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    artifact = sparse_tvm.load(tmp_path / "m.so", threads=2)
    for each in feeds:
        expected = session.run(None, each)
        for ours, theirs in zip(artifact.run(each).values(), expected, strict=True):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    return artifact


def rows(n, share, features=16):
    rng = np.random.default_rng(n)
    signs = np.where(rng.random(n) < share, 1, -1)
    return {"x": rng.standard_normal((n, features)).astype("float32"), "m": signs.astype("float32")}


def test_layers_over_chosen_rows(tmp_path):
    graph = """(float[n,16] x, float[n] m) => (float[k,8] y, float[8] sum, float[k,8] share) {
        chosen = Greater(m, zero)
        r = Compress<axis=0>(x, chosen)
        d = Gemm(r, w, b)
        e = Relu(d)
        y = LayerNormalization<axis=-1>(e, b, b)
        sum = ReduceSum<keepdims=0>(y, first)
        share = Softmax<axis=-1>(y)
    }"""
    weights = {"w": normal(16, 8), "b": normal(8), "zero": np.float32(0), "first": np.array([0])}
    feeds = [rows(n, share) for n in (1, 7, 300) for share in (0.0, 0.5, 1.0)]
    artifact = check(graph, tmp_path, feeds, **weights)
    assert str(artifact.outputs[0]) == "y float32[compress_0, 8]"


@pytest.mark.parametrize("cast", ["1", "6", "9"])  # float32, int32, bool
def test_positions_of_what_is_not_zero(tmp_path, cast):
    graph = f"""(float[n,3,4] x) => (int64[3,k] i, float[k] y) {{
        f = Floor(x)
        c = Cast<to={cast}>(f)
        i = NonZero(c)
        t = Transpose<perm=[1, 0]>(i)
        y = GatherND(x, t)
    }}"""
    feeds = [{"x": 2 * normal(s["n"], 3, 4) + shift} for s in SIZES for shift in (0, -9)]
    feeds += [{"x": np.zeros((2, 3, 4), np.float32)}]
    check(graph, tmp_path, feeds)


@pytest.mark.parametrize("centred", [0, 1])
@pytest.mark.parametrize("most", [0, 3, 2**62])
def test_detections(tmp_path, centred, most):
    graph = f"""(float[n,r,4] b, float[n,5,r] s) => (int64[k,3] i, float[k] best) {{
        i = NonMaxSuppression<center_point_box={centred}>(b, s, most, overlap, least)
        best = GatherND(s, i)
    }}"""
    rng = np.random.default_rng(most % 7)

    def detections(n, r, scale):
        corners = rng.random((n, r, 4)).astype("float32") * np.float32([50, 50, 30, 30])
        return {"b": corners, "s": scale * rng.random((n, 5, r), np.float32)}

    limits = {"most": np.array([most]), "overlap": np.float32([0.4]), "least": np.float32([0.3])}
    feeds = [detections(*given) for given in ((1, 1, 1), (2, 30, 1), (1, 200, 1), (3, 20, 0.2))]
    check(graph, tmp_path, feeds, verify=False, **limits)


@pytest.mark.parametrize("how", ["", "<sorted=0>", "<axis=1>", "<axis=-1, sorted=0>"])
def test_unique(tmp_path, how):
    graph = f"""(int64[n,6] x) => (int64[k,m] u, int64[k] f, int64[r] i, int64[k] c) {{
        u, f, i, c = Unique{how}(x)
    }}"""
    if not how or how == "<sorted=0>":
        graph = graph.replace("[k,m]", "[k]")
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.integers(0, 2, (s["n"], 6))} for s in SIZES]
    check(graph, tmp_path, feeds, verify=False)


def test_sizes_out_of_values(tmp_path):
    graph = """(int64[n] x, float[2,40] z)
        => (float[2,k] t, int64[2,k] at, int64[k] r, float[s] f, int64[u,1] c) {
        u, first, inverse, counts = Unique(x)
        most = ReduceMax<keepdims=1>(counts)
        t, at = TopK<largest=0>(z, most)
        limit = Squeeze(most)
        r = Range(zero, limit, one)
        up = Cast<to=1>(limit)
        f = Range(half, up, half)
        size = Shape(u)
        shape = Concat<axis=0>(size, ones)
        c = ConstantOfShape<value=int64[1]{3}>(shape)
    }"""
    numbers = {"zero": np.array(0), "one": np.array(1), "half": np.float32(0.5)}
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.integers(0, 5, s["n"]), "z": normal(2, 40) + s["n"]} for s in SIZES]
    check(graph, tmp_path, feeds, ones=np.array([1]), **numbers)


def test_going_down_and_the_wrong_way(tmp_path):
    graph = """(int64 from, int64 to, int64 by) => (int64[k] r) { r = Range(from, to, by) }"""
    numbers = [(5, 0, -2), (0, 7, 3), (0, -4, 1), (3, 3, 1), (-2, 9, 5)]
    names = ("from", "to", "by")
    feeds = [dict(zip(names, map(np.array, each), strict=True)) for each in numbers]
    check(graph, tmp_path, feeds, verify=False)


def test_a_window_over_what_may_be_empty_is_refused(tmp_path):
    graph = """(float[n] x, float[n] y) => (float[1,1,k] z) {
        keep = Greater(x, y)
        r = Compress(x, keep)
        line = Unsqueeze(r, axes)
        z = MaxPool<kernel_shape=[3]>(line)
    }"""
    onnx.save(build(graph, axes=np.array([0, 1])), tmp_path / "m.onnx")
    with pytest.raises(SparseTvmError, match="MaxPool"):
        sparse_tvm.compile(tmp_path / "m.onnx", tmp_path / "m.so")
    assert not (tmp_path / "m.so").exists()


def test_two_counts_do_not_fit_each_other(tmp_path):
    graph = """(float[n] x, float[n] y) => (float[k] z) {
        a = Greater(x, y)
        b = Less(x, y)
        one = Compress(x, a)
        other = Compress(x, b)
        z = Add(one, other)
    }"""
    onnx.save(build(graph), tmp_path / "m.onnx")
    with pytest.raises(SparseTvmError, match="Add"):
        sparse_tvm.compile(tmp_path / "m.onnx", tmp_path / "m.so")


def test_branches_of_different_sizes(tmp_path):
    graph = """(float[n,4] x, float[n] m) => (float[k,4] y, float[4] s) {
        chosen = Greater(m, zero)
        r = Compress<axis=0>(x, chosen)
        size = Size(r)
        none = Equal(size, nothing)
        y = If (none) <
            then_branch = a () => (float[1,4] u) { u = Slice(x, nothings, ones) },
            else_branch = b () => (float[k,4] v) { v = Relu(r) }
        >
        s = ReduceSum<keepdims=0>(y, nothings)
    }"""
    numbers = {"nothing": np.array(0), "nothings": np.array([0]), "ones": np.array([1])}
    feeds = [
        {"x": each["x"][:, :4], "m": each["m"]}
        for each in (rows(n, share) for n in (1, 7) for share in (0.0, 0.5, 1.0))
    ]
    check(graph, tmp_path, feeds, zero=np.float32(0), **numbers)


@pytest.mark.parametrize(("index", "least"), [("0", 1), ("2", 3), ("-2", 2)])
def test_reading_behind_the_end_of_what_was_chosen_is_an_error(tmp_path, index, least):
    graph = f"""(float[n,16] x, float[n] m) => (float[16] y) {{
        chosen = Greater(m, zero)
        r = Compress<axis=0>(x, chosen)
        i = Constant<value_int={index}>()
        g = Gather<axis=0>(r, i)
        y = Add(g, g)
    }}"""
    few = {"x": normal(4, 16), "m": np.array([1.0] * least + [-1.0] * (4 - least), "float32")}
    artifact = check(graph, tmp_path, [few], verify=False, zero=np.float32(0))
    few["m"][0] = -1
    with pytest.raises(InputError, match=f"Gather g: .* has fewer than {least} elements"):
        artifact.run(few)
    few["m"][0] = 1
    artifact.run(few)


def test_reading_at_indices_of_what_may_be_empty(tmp_path):
    graph = """(float[n,16] x, float[n] m, int64[k] i) => (float[k,16] y) {
        chosen = Greater(m, zero)
        r = Compress<axis=0>(x, chosen)
        y = Gather<axis=0>(r, i)
    }"""
    some = {**rows(7, 1.0), "i": np.array([6, 0, -1])}
    artifact = check(graph, tmp_path, [some], verify=False, zero=np.float32(0))
    with pytest.raises(InputError, match=r"Gather y: .* fewer than 1 elements"):
        artifact.run({**rows(7, 0.0), "i": np.array([0])})


def test_random_inputs_that_leave_nothing_to_read_say_what_to_do(tmp_path):
    graph = """(float[n,16] x, float[n] m) => (float[16] y) {
        chosen = Greater(m, large)
        r = Compress<axis=0>(x, chosen)
        g = Gather<axis=0>(r, first)
        y = Add(g, g)
    }"""
    with pytest.raises(ModelError, match=r"has fewer than 1 elements.*--verify-inputs"):
        check(graph, tmp_path, [], large=np.float32(1e9), first=np.array(0))
