"""Loops that run a known number of times are imported that often."""

from __future__ import annotations

import numpy as np
import pytest
from onnx_models import assert_same_as_onnxruntime, build, calls, normal

from sparse_tvm.errors import ModelError
from sparse_tvm.frontends.importer.model import import_onnx

BODY = """body = b (int64 i, bool go, float[n,4] s) => (bool on, float[n,4] t, float[n,2] u) {
    k = Constant<value = int64 {%s}>()
    on = Less(i, k)
    p = MatMul(s, w)
    t = Relu(p)
    u = Slice(t, starts, ends, axes)
}"""
TENSORS = {
    "w": normal(4, 4),
    "times": np.array(3),
    "yes": np.array(True),
    "starts": np.array([1]),
    "ends": np.array([3]),
    "axes": np.array([1]),
}


def loop(inputs: str, last: int, given: str = ""):
    graph = f"""(float[n,4] x{given}) => (float[n,4] y, float[runs,n,2] all) {{
        ["/again"] y, all = Loop ({inputs}) < {BODY % last} >
    }}"""
    return build(graph, **{k: v for k, v in TENSORS.items() if k not in given})


@pytest.mark.parametrize(
    ("inputs", "last", "runs"), [("times, yes, x", 9, 3), ("times, , x", 0, 1), (", yes, x", 3, 4)]
)
def test_a_loop(inputs, last, runs):
    imported = assert_same_as_onnxruntime(loop(inputs, last), sizes=({"n": 1}, {"n": 5}))
    assert calls(imported).count("matmul") == runs
    assert imported.outputs[1].shape == (runs, "n", 2)


@pytest.mark.parametrize(
    ("inputs", "given", "reason"),
    [
        ("times, yes, x", ", int64 times", "how often it runs depends on"),
        ("times, yes, x", ", bool yes", "whether it runs at all depends on"),
    ],
)
def test_a_loop_that_depends_on_data_is_refused(inputs, given, reason):
    with pytest.raises(ModelError, match=rf"/again \(Loop\) cannot be imported: {reason}"):
        import_onnx(loop(inputs, 9, given))


def test_a_loop_that_ends_by_data_is_refused():
    graph = """(float[4] x) => (float[4] y) {
        y = Loop (times, yes, x) < body = b (int64 i, bool go, float[4] s)
            => (bool on, float[4] t) {
            t = Relu(s)
            most = ReduceMax<keepdims=0>(t)
            half = Constant<value = float {0.5}>()
            on = Greater(most, half)
        } >
    }"""
    with pytest.raises(ModelError, match="when it ends depends on data"):
        import_onnx(build(graph, times=np.array(3), yes=np.array(True)))


def test_too_long_a_loop_is_refused():
    model = loop("times, yes, x", 9)
    model.graph.initializer[1].CopyFrom(
        build("() => () {}", t=np.array(10**6)).graph.initializer[0]
    )
    model.graph.initializer[1].name = "times"
    with pytest.raises(ModelError, match=r"it becomes 1000000 times \d nodes: too many"):
        import_onnx(model)


@pytest.mark.parametrize(
    "directions", ["", ", scan_input_directions=[1], scan_output_directions=[1]"]
)
@pytest.mark.parametrize("axis", [0, 1])
def test_a_scan(axis, directions):
    shape, result = ("n,5,4", "n,5,4") if axis else ("5,n,4", "5,n,4")
    axes = f", scan_input_axes=[{axis}], scan_output_axes=[{axis - 3}]"
    graph = f"""(float[n,4] h, float[{shape}] x) => (float[n,4] last, float[{result}] y) {{
        last, y = Scan <num_scan_inputs=1{axes}{directions},
            body = b (float[n,4] s, float[n,4] e) => (float[n,4] t, float[n,4] o) {{
                p = MatMul(s, w)
                t = Add(p, e)
                o = Tanh(t)
            }}
        > (h, x)
    }}"""
    assert_same_as_onnxruntime(build(graph, w=normal(4, 4)), sizes=({"n": 1}, {"n": 3}))


def test_a_scan_over_a_symbolic_length_is_refused():
    graph = """(float[4] h, float[n,4] x) => (float[4] y) {
        y = Scan <num_scan_inputs=1, body = b (float[4] s, float[4] e) => (float[4] t) {
            t = Add(s, e)
        }> (h, x)
    }"""
    with pytest.raises(ModelError, match="--input-shape fixes them"):
        import_onnx(build(graph))
    assert_same_as_onnxruntime(build(graph), {"x": (3, 4)})
