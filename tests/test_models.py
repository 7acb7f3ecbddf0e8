"""Whole small models through the compiler, each against ONNX Runtime: every operator is right."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper, parser

import sparse_tvm
from sparse_tvm.spec import TensorSpec


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> np.ndarray:
    return np.abs(normal(*shape)) + np.float32(0.5)


def ints(*values) -> np.ndarray:
    return np.array(values, np.int64)


def build(graph: str, opset: int = 17, **tensors: np.ndarray) -> onnx.ModelProto:
    """A model from ONNX's text form; tensors become initializers, output shapes are inferred."""
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> g {graph}')
    for name, array in tensors.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    inputs = {value.name for value in model.graph.input}
    for output in model.graph.output:
        if output.name not in inputs:
            output.type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def feed(spec: TensorSpec, rng: np.random.Generator) -> np.ndarray:
    dtype = np.dtype(spec.dtype)
    if dtype == np.float32:
        return rng.standard_normal(spec.shape).astype(dtype)
    if dtype == np.bool_:
        return rng.random(spec.shape) < 0.5
    return rng.integers(-2, 3, spec.shape).astype(dtype)


def check(model: onnx.ModelProto, tmp_path, tolerance: float = 2e-5, **options):
    """Compile, run, and compare every output with ONNX Runtime's: names, types, values."""
    path = tmp_path / "model.so"
    result = sparse_tvm.compile(model, path, verify=False, **options)
    artifact = sparse_tvm.load(path)
    rng = np.random.default_rng(0)
    inputs = {spec.name: feed(spec, rng) for spec in artifact.inputs}
    session = onnxruntime.InferenceSession(model.SerializeToString())
    expected = session.run(None, inputs)
    outputs = artifact.run(inputs)
    assert list(outputs) == [output.name for output in model.graph.output]
    for (name, output), wanted in zip(outputs.items(), expected, strict=True):
        assert (output.shape, output.dtype) == (wanted.shape, wanted.dtype), name
        np.testing.assert_allclose(output, wanted, rtol=tolerance, atol=tolerance, err_msg=name)
    return result


def cases(graphs: dict[str, object]):
    return pytest.mark.parametrize("model", graphs.values(), ids=graphs.keys())


ACTIVATIONS = {
    "relu": "y = Relu(a)",
    "sigmoid": "y = Sigmoid(a)",
    "tanh": "y = Tanh(a)",
    "leaky": "y = LeakyRelu<alpha = 0.1>(a)",
    "elu": "y = Elu<alpha = 0.7>(a)",
    "selu": "y = Selu(a)",
    "hard sigmoid": "y = HardSigmoid(a)",
    "hard swish": "y = HardSwish(a)",
    "softplus": "y = Softplus(a)",
    "softsign": "y = Softsign(a)",
    "silu": "s = Sigmoid(a) y = Mul(a, s)",
    "gelu": "s = Div(a, r) e = Erf(s) o = Add(e, one) p = Mul(a, o) y = Mul(p, half)",
    "clip": "y = Clip(a, low, high)",
    "prelu": "y = PRelu(a, slope)",
    "mish": "s = Softplus(a) t = Tanh(s) y = Mul(a, t)",
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_behind_a_layer(activation, tmp_path):
    graph = f"""(float[3, 19] x) => (float[3, 23] y) {{
        m = MatMul(x, w) a = Add(m, b) {ACTIVATIONS[activation]} }}"""
    scalars = {"r": np.sqrt(2), "one": 1, "half": 0.5, "low": -0.3, "high": 0.6}
    tensors = {name: np.float32(value) for name, value in scalars.items() if name in graph}
    if activation == "prelu":
        tensors["slope"] = positive(23)
    check(build(graph, w=normal(19, 23), b=normal(23), **tensors), tmp_path)


@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 7, 5), (1, 64, 64), (3, 33, 17), (17, 19, 101), (100, 5, 1), (2, 1, 3)]
)
def test_mlp_of_odd_sizes(m, k, n, tmp_path):
    graph = f"""(float[{m}, {k}] x) => (float[{m}, {n}] y) {{
        h = Gemm<transB = 1>(x, w1, b1) a = Relu(h) y = Gemm(a, w2, b2) }}"""
    tensors = {"w1": normal(13, k), "b1": normal(13), "w2": normal(13, n), "b2": normal(n)}
    check(build(graph, **tensors), tmp_path)


NORMALISATIONS = {
    "layer norm": build(
        "(float[3, 5, 24] x) => (float[3, 5, 24] y) { y = LayerNormalization(x, g, b) }",
        g=normal(24),
        b=normal(24),
    ),
    "layer norm of two axes": build(
        "(float[3, 5, 7] x) => (float[3, 5, 7] y) { y = LayerNormalization<axis = 1>(x, g, b) }",
        g=normal(5, 7),
        b=normal(5, 7),
    ),
    "layer norm without bias": build(
        "(float[3, 7] x) => (float[3, 7] y) { y = LayerNormalization(x, g) }", g=normal(7)
    ),
    "rms norm": build(
        """(float[3, 5, 24] x) => (float[3, 5, 24] y) {
            s = Pow(x, two) m = ReduceMean<axes = [-1]>(s) e = Add(m, eps) r = Sqrt(e)
            n = Div(x, r) y = Mul(n, g) }""",
        two=np.float32(2),
        eps=np.float32(1e-6),
        g=normal(24),
    ),
    "instance norm": build(
        "(float[2, 6, 5, 7] x) => (float[2, 6, 5, 7] y) { y = InstanceNormalization(x, g, b) }",
        g=normal(6),
        b=normal(6),
    ),
    "group norm": build(
        """(float[2, 6, 5, 7] x) => (float[2, 6, 5, 7] y) {
            r = Reshape(x, groups) n = InstanceNormalization(r, g, b) s = Reshape(n, whole)
            m = Mul(s, scale) y = Add(m, shift) }""",
        groups=ints(2, 3, -1),
        whole=ints(2, 6, 5, 7),
        g=np.ones(3, np.float32),
        b=np.zeros(3, np.float32),
        scale=normal(6, 1, 1),
        shift=normal(6, 1, 1),
    ),
    "batch norm": build(
        """(float[2, 6, 5, 7] x) => (float[2, 6, 5, 7] y) {
            y = BatchNormalization(x, g, b, m, v) }""",
        g=normal(6),
        b=normal(6),
        m=normal(6),
        v=positive(6),
    ),
    "lrn": build("(float[1, 7, 5, 3] x) => (float[1, 7, 5, 3] y) { y = LRN<size = 3>(x) }"),
}


@cases(NORMALISATIONS)
def test_normalisation(model, tmp_path):
    check(model, tmp_path)


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_softmax(op, axis, tmp_path):
    graph = f"(float[5, 7, 34] x) => (float[5, 7, 34] y) {{ y = {op}<axis = {axis}>(x) }}"
    check(build(graph), tmp_path)


@pytest.mark.parametrize("axes", [[0], [1], [2], [0, 2], [1, 2], [0, 1, 2]])
def test_reductions(axes, tmp_path):
    ops = ("Mean", "Max", "Min", "L2", "SumSquare", "LogSumExp", "Prod")
    nodes = " ".join(f"{op} = Reduce{op}<axes = {axes}, keepdims = 0>(x)" for op in ops)
    outputs = ", ".join(f"float[N] {op}" for op in ops)
    graph = f"(float[3, 4, 19] x) => ({outputs}, float[N] Sum) {{ {nodes} Sum = ReduceSum(x, a) }}"
    model = build(graph, a=ints(*axes))
    check(model, tmp_path, tolerance=1e-4)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_arg_reductions(axis, tmp_path):
    graph = f"""(float[3, 5, 37] x) => (int64[A] a, int64[B] b, float[C] v, int64[D] i) {{
        a = ArgMax<axis = {axis}>(x) b = ArgMin<axis = {axis}, keepdims = 0>(x)
        v, i = TopK<axis = {axis}>(x, k) }}"""
    model = build(graph, k=ints(2))
    check(model, tmp_path)


MATMULS = {
    "batched": ((3, 5, 7), (3, 7, 9)),
    "heads": ((2, 3, 17, 8), (2, 3, 8, 17)),
    "broadcast over the batch": ((2, 3, 17, 8), (8, 17)),
    "broadcast over both": ((2, 1, 4, 8), (3, 8, 17)),
    "vector": ((5, 7), (7,)),
    "vector on the left": ((7,), (2, 7, 5)),
    "two vectors": ((7,), (7,)),
    "one row": ((1, 33), (33, 65)),
    "long": ((40, 67), (67, 48)),
}


@pytest.mark.parametrize("shapes", MATMULS.values(), ids=MATMULS.keys())
def test_matmul_of_activations(shapes, tmp_path):
    a, b = shapes
    graph = f"(float{list(a)} a, float{list(b)} b) => (float[N] y) {{ y = MatMul(a, b) }}"
    model = build(graph)
    check(model, tmp_path)


@pytest.mark.parametrize("perm_a", [None, [0, 1, 3, 2], [0, 2, 1, 3]])
@pytest.mark.parametrize("perm_b", [None, [0, 1, 3, 2], [0, 2, 1, 3]])
def test_matmul_of_transposed_activations(perm_a, perm_b, tmp_path):
    a, b = (2, 3, 17, 8), (2, 3, 8, 19)

    def before(perm, shape):
        """The shape that this transposition turns into ``shape``."""
        return shape if perm is None else tuple(shape[perm.index(i)] for i in range(4))

    node_a = "" if perm_a is None else f"ta = Transpose<perm = {perm_a}>(a)"
    node_b = "" if perm_b is None else f"tb = Transpose<perm = {perm_b}>(b)"
    graph = f"""(float{list(before(perm_a, a))} a, float{list(before(perm_b, b))} b)
        => (float[2, 3, 17, 19] y) {{
        {node_a} {node_b} y = MatMul({"ta" if node_a else "a"}, {"tb" if node_b else "b"}) }}"""
    check(build(graph), tmp_path)


DATA_MOVES = {
    "transpose": "(float[3, 7, 5, 6] x) => (float[5, 3, 6, 7] y) {"
    " y = Transpose<perm = [2, 0, 3, 1]>(x) }",
    "gather": (
        "(float[9, 33] x) => (float[2, 3, 33] y, float[9, 2, 3] z) {"
        " y = Gather(x, i) z = Gather<axis = 1>(x, i) }",
        {"i": np.array([[0, 8, -1], [3, 3, -9]])},
    ),
    "gather by an input": "(float[3, 33] x, int64[4] i) => (float[4, 33] y) { y = Gather(x, i) }",
    "gather elements": (
        "(float[4, 5] x) => (float[2, 5] y) { y = GatherElements(x, i) }",
        {"i": np.array([[0, 1, 2, 3, 0], [3, 2, 1, 0, 3]])},
    ),
    "gather nd": (
        "(float[4, 5, 6] x) => (float[2, 6] y) { y = GatherND(x, i) }",
        {"i": np.array([[0, 4], [3, 1]])},
    ),
    "scatter elements": (
        "(float[4, 5] x, float[2, 5] u) => (float[4, 5] y) { y = ScatterElements(x, i, u) }",
        {"i": np.array([[0, 1, 2, 3, 0], [3, 2, 1, 0, 3]])},
    ),
    "scatter nd": (
        "(float[4, 5] x, float[2, 5] u) => (float[4, 5] y) { y = ScatterND(x, i, u) }",
        {"i": np.array([[3], [1]])},
    ),
    "slice": (
        "(float[9, 33, 4] x) => (float[N] y) { y = Slice(x, starts, ends, axes, steps) }",
        {
            "starts": ints(-1, 1),
            "ends": ints(-10, 30),
            "axes": ints(0, 1),
            "steps": ints(-2, 3),
        },
    ),
    "concat": "(float[2, 3, 17] a, float[2, 5, 17] b, float[2, 1, 17] c) => (float[2, 9, 17] y) {"
    " y = Concat<axis = 1>(a, b, c) }",
    "concat of the last axis": "(float[3, 16] a, float[3, 5] b) => (float[3, 21] y) {"
    " y = Concat<axis = -1>(a, b) }",
    "split": (
        "(float[3, 21] x) => (float[3, 16] a, float[3, 5] b) { a, b = Split<axis = 1>(x, s) }",
        {"s": ints(16, 5)},
    ),
    "pad": (
        "(float[3, 21] x) => (float[5, 25] y, float[5, 25] z, float[5, 25] w) {"
        ' y = Pad(x, p, v) z = Pad<mode = "reflect">(x, p) w = Pad<mode = "edge">(x, p) }',
        {"p": ints(1, 3, 1, 1), "v": np.float32(0.5)},
    ),
    "tile and expand": (
        "(float[3, 1, 5] x) => (float[6, 1, 15] y, float[2, 3, 4, 5] z) {"
        " y = Tile(x, r) z = Expand(x, s) }",
        {"r": ints(2, 1, 3), "s": ints(2, 1, 4, 1)},
    ),
    "reshapes": (
        "(float[2, 3, 4] x) => (float[6, 4] y, float[2, 12] f, float[2, 3, 1, 4] u) {"
        " y = Reshape(x, s) f = Flatten(x) u = Unsqueeze(x, a) }",
        {"s": ints(-1, 4), "a": ints(2)},
    ),
    "depth to space": "(float[1, 8, 3, 5] x) => (float[1, 2, 6, 10] y, float[1, 8, 3, 5] z) {"
    " y = DepthToSpace<blocksize = 2>(x) z = SpaceToDepth<blocksize = 2>(y) }",
    "cumsum": (
        "(float[3, 21] x) => (float[3, 21] y) { y = CumSum(x, a) }",
        {"a": np.array(1)},
    ),
    "trilu": "(float[7, 9] x) => (float[7, 9] y) { y = Trilu<upper = 0>(x) }",
    "one hot": (
        "(int64[4] i) => (float[4, 5] y) { y = OneHot(i, d, v) }",
        {"d": np.array(5), "v": np.float32([0, 1])},
    ),
    "reverse by a negative step": (
        "(float[33] x) => (float[33] y) { y = Slice(x, s, e, a, t) }",
        {"s": ints(-1), "e": ints(-100), "a": ints(0), "t": ints(-1)},
    ),
    "padded rows repeated": (  # short loops, which LLVM unrolls, in one whose index wraps around
        "(float[2, 8, 8] x) => (float[6, 16, 30] y) {"
        ' w = Pad<mode = "edge">(x, p) y = Tile(w, r) }',
        {"p": ints(0, 0, 1, 0, 0, 1), "r": ints(3, 2, 3)},
    ),
}


def from_case(case) -> onnx.ModelProto:
    graph, tensors = (case, {}) if isinstance(case, str) else case
    return build(graph, **tensors)


@cases(DATA_MOVES)
def test_data_movement(model, tmp_path):
    check(from_case(model), tmp_path)


POINTWISE = {
    "arithmetic": "(float[3, 33] a, float[33] b) => (float[3, 33] y) {"
    " s = Sub(a, b) m = Mul(s, a) d = Add(m, b) n = Neg(d) q = Abs(n) y = Max(q, b) }",
    "transcendental": "(float[3, 33] x) => (float[3, 33] y) {"
    " a = Abs(x) l = Log(a) s = Sqrt(a) e = Exp(x) i = Sin(x) c = Cos(x) f = Floor(x)"
    " r = Reciprocal(e) o = Round(x) g = Sign(x) t = Ceil(x) h = Erf(x)"
    " y = Sum(l, s, i, c, f, r, o, g, t, h) }",
    "where and compare": "(float[3, 33] a, float[3, 33] b) => (float[3, 33] y, bool[3, 33] z) {"
    " l = Less(a, b) g = GreaterOrEqual(a, b) n = Not(l) o = And(n, g) p = Xor(l, o)"
    " y = Where(l, a, b) z = Or(p, l) }",
    "casts": "(float[3, 33] x, int64[3, 33] i, bool[3, 33] b) =>"
    " (int32[3, 33] y, float[3, 33] z, bool[3, 33] w, int64[3, 33] v) {"
    " y = Cast<to = 6>(x) z = Cast<to = 1>(i) w = Cast<to = 9>(i) v = Cast<to = 7>(b) }",
    "int64": (
        "(int64[4, 5] a, int64[5] b) => (int64[4, 5] y, bool[4, 5] e) {"
        " s = Add(a, b) m = Mul(s, a) d = Sub(m, b) q = Div(d, two) r = Mod(q, two)"
        " y = Max(r, b) e = Equal(a, b) }",
        {"two": ints(3)},
    ),
    "clip": (
        "(float[3, 33] x) => (float[3, 33] y, float[3, 33] z) {"
        " y = Clip(x, low, high) z = Clip(x, low) }",
        {"low": np.float32(-0.4), "high": np.float32(0.7)},
    ),
    "powers": (
        "(float[3, 33] x) => (float[3, 33] y, float[3, 33] z) {"
        " a = Abs(x) y = Pow(a, third) z = Pow(x, three) }",
        {"third": np.float32(1 / 3), "three": np.float32(3)},
    ),
    "comparison of not a number": "(float[3, 33] x) => (bool[3, 33] y, bool[3, 33] z) {"
    " l = Log(x) y = IsNaN(l) r = Abs(x) d = Div(x, r) z = IsInf(d) }",
    "large": "(float[3, 5, 1000] x) => (float[3, 5, 1000] y) { a = Exp(x) y = Tanh(a) }",
}


@cases(POINTWISE)
def test_pointwise(model, tmp_path):
    check(from_case(model), tmp_path)


IMAGES = {
    "max pool": "(float[2, 5, 13, 15] x) => (float[N] y) {"
    " y = MaxPool<kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]>(x) }",
    "max pool, ceil": "(float[1, 3, 8, 8] x) => (float[N] y) {"
    " y = MaxPool<kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1>(x) }",
    "average pool": "(float[2, 5, 12, 16] x) => (float[N] y, float[N] z) {"
    " y = AveragePool<kernel_shape = [2, 2], strides = [2, 2]>(x)"
    " z = AveragePool<kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1>(x) }",
    "average pool without padding": "(float[1, 5, 12, 16] x) => (float[N] y) {"
    " y = AveragePool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x) }",
    "pool of signals": "(float[2, 5, 19] x) => (float[N] y, float[N] z) {"
    " y = MaxPool<kernel_shape = [3], strides = [2]>(x) z = AveragePool<kernel_shape = [2]>(x) }",
    "global pools": "(float[2, 5, 7, 9] x) => (float[N] y, float[N] z) {"
    " y = GlobalAveragePool(x) z = GlobalMaxPool(x) }",
    "nearest": (
        "(float[1, 3, 5, 7] x) => (float[N] y) {"
        ' y = Resize<mode = "nearest", coordinate_transformation_mode = "asymmetric",'
        ' nearest_mode = "floor">(x, , s) }',
        {"s": np.float32([1, 1, 2, 2])},
    ),
    "linear": (
        "(float[1, 3, 5, 7] x) => (float[N] y) {"
        ' y = Resize<mode = "linear", coordinate_transformation_mode = "half_pixel">(x, , s) }',
        {"s": np.float32([1, 1, 2, 2])},
    ),
    "linear, aligned corners": (
        "(float[1, 3, 5, 7] x) => (float[N] y) {"
        ' y = Resize<mode = "linear", coordinate_transformation_mode = "align_corners">'
        "(x, , , s) }",
        {"s": ints(1, 3, 9, 11)},
    ),
    "cubic": (
        "(float[1, 3, 8, 8] x) => (float[N] y) {"
        ' y = Resize<mode = "cubic", coordinate_transformation_mode = "half_pixel">(x, , s) }',
        {"s": np.float32([1, 1, 2, 2])},
    ),
}


@cases(IMAGES)
def test_image_operator(model, tmp_path):
    check(from_case(model), tmp_path)


CONVOLUTIONS = {
    # x, w, attributes
    "1x1": ((2, 9, 7, 5), (13, 9, 1, 1), ""),
    "1x1 strided": ((1, 8, 9, 7), (16, 8, 1, 1), "strides = [2, 2]"),
    "3x3": ((1, 5, 12, 17), (7, 5, 3, 3), ""),
    "3x3 padded": ((2, 5, 12, 33), (8, 5, 3, 3), "pads = [1, 1, 1, 1]"),
    "3x3 strided": ((1, 3, 17, 17), (8, 3, 3, 3), "pads = [1, 1, 1, 1], strides = [2, 2]"),
    "same upper": ((1, 3, 16, 16), (8, 3, 3, 3), 'auto_pad = "SAME_UPPER", strides = [2, 2]'),
    "uneven": ((1, 4, 11, 14), (6, 4, 3, 5), "pads = [2, 0, 1, 3], strides = [1, 2]"),
    "dilated": ((1, 4, 13, 20), (6, 4, 3, 3), "dilations = [2, 3], pads = [2, 2, 2, 2]"),
    "far": ((2, 5, 13, 20), (7, 5, 3, 3), "dilations = [9, 12], pads = [9, 12, 9, 12]"),
    "7x7": ((1, 3, 32, 32), (8, 3, 7, 7), "pads = [3, 3, 3, 3], strides = [2, 2]"),
    "grouped": ((1, 8, 9, 9), (12, 2, 3, 3), "group = 4, pads = [1, 1, 1, 1]"),
    "depthwise": ((2, 9, 14, 14), (9, 1, 3, 3), "group = 9, pads = [1, 1, 1, 1]"),
    "depthwise strided": ((1, 8, 14, 14), (8, 1, 5, 5), "group = 8, strides = [2, 2]"),
    "depthwise multiplied": ((1, 4, 9, 9), (8, 1, 3, 3), "group = 4"),
    "one pixel": ((1, 10, 1, 1), (6, 10, 1, 1), ""),
    "whole image": ((1, 3, 6, 6), (7, 3, 6, 6), ""),
    "signal": ((2, 5, 40), (7, 5, 3), "pads = [1, 1]"),
    "signal strided": ((1, 5, 41), (7, 5, 4), "strides = [3], dilations = [2]"),
    "volume": ((1, 3, 6, 7, 8), (4, 3, 3, 3, 3), "pads = [1, 1, 1, 1, 1, 1]"),
}


@pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_convolution(case, tmp_path):
    x, w, attributes = case
    conv = f"Conv<{attributes}>" if attributes else "Conv"
    graph = f"(float{list(x)} x) => (float[N] y, float[N] z) {{ y = {conv}(x, w, b) z = Relu(y) }}"
    model = build(graph, w=normal(*w), b=normal(w[0]))
    check(model, tmp_path, tolerance=1e-4)


@pytest.mark.parametrize("options", [{"format": "csr"}, {"format": "bsr", "block": "4x1"}])
@pytest.mark.parametrize(
    "name", ["1x1", "3x3 padded", "uneven", "far", "7x7", "grouped", "signal strided"]
)
def test_sparse_convolution(name, options, tmp_path):
    x, w, attributes = CONVOLUTIONS[name]
    weight = normal(*w) * (np.random.default_rng(0).random(w) < 0.2)
    conv = f"Conv<{attributes}>" if attributes else "Conv"
    graph = f"(float{list(x)} x) => (float[N] y) {{ y = {conv}(x, w) }}"
    result = check(build(graph, w=weight.astype(np.float32)), tmp_path, tolerance=1e-4, **options)
    (layer,) = result.manifest["layers"]
    assert (layer["op"], layer["format"]) == ("convolution", options["format"])


def test_what_follows_a_convolution_is_fused(tmp_path):
    graph = """(float[1, 8, 14, 14] x) => (float[N] y) {
        a = Conv<pads = [1, 1, 1, 1]>(x, v, b) c = Clip(a, low, high)
        d = Conv(c, w) e = Add(x, d) y = Relu(e) }"""
    tensors = {"v": normal(12, 8, 3, 3), "b": normal(12), "w": normal(8, 12, 1, 1)}
    model = build(graph, **tensors, low=np.float32(0), high=np.float32(6))
    layers = check(model, tmp_path, tolerance=1e-4).manifest["layers"]
    assert layers[0]["epilogue"] == ["bias", "clamp(0, 6)"]
    assert layers[1]["epilogue"] == ["residual", "relu"]


def test_layer_rules_choose_convolutions(tmp_path):
    graph = """(float[1, 8, 9, 9] x) => (float[N] y) {
        a = Conv(x, first) y = Conv<group = 16>(a, second) }"""
    model = build(graph, first=normal(16, 8, 1, 1), second=normal(16, 1, 3, 3))
    layers = check(model, tmp_path, tolerance=1e-4, layer_rules=["first=csr"]).manifest["layers"]
    assert [layer["format"] for layer in layers] == ["csr", "dense"]
    assert layers[1]["reason"] == "no zeros"


@pytest.mark.parametrize("name", ["depthwise", "depthwise strided", "depthwise multiplied"])
def test_sparse_depthwise_convolution(name, tmp_path):
    x, w, attributes = CONVOLUTIONS[name]
    weight = normal(*w) * (np.random.default_rng(0).random(w) < 0.2)
    graph = f"(float{list(x)} x) => (float[N] y) {{ a = Conv<{attributes}>(x, w) y = Relu(a) }}"
    result = check(build(graph, w=weight.astype(np.float32)), tmp_path, tolerance=1e-4)
    (layer,) = result.manifest["layers"]
    assert (layer["op"], layer["format"]) == ("convolution", "csr")


OTHERS = {
    "transposed convolution": (
        "(float[1, 4, 7, 9] x) => (float[N] y) {"
        " y = ConvTranspose<strides = [2, 2], pads = [1, 1, 1, 1]>(x, w, b) }",
        {"w": normal(4, 6, 4, 4), "b": normal(6)},
    ),
    "einsum": (
        "(float[2, 3, 17] a, float[2, 5, 17] b) => (float[N] y) {"
        ' y = Einsum<equation = "bik,bjk->bij">(a, b) }'
    ),
}


@cases(OTHERS)
def test_other_operator(model, tmp_path):
    check(from_case(model), tmp_path, tolerance=1e-4)


OUTPUTS = {
    "several": "(float[3, 4] x) => (float[3, 4] y, float[3, 4] z) { y = Relu(x) z = Neg(y) }",
    "an input": "(float[3, 4] x) => (float[3, 4] y, float[3, 4] x) { y = Relu(x) }",
    "a copy of an input": "(float[3, 4] x) => (float[3, 4] y) { y = Identity(x) }",
    "the same value twice": "(float[3, 4] x) => (float[3, 4] y, float[3, 4] z) {"
    " a = Relu(x) y = Identity(a) z = Identity(a) }",
    "a constant": (
        "(float[3] x) => (float[3] y, float[3] c) { y = Relu(x) c = Identity(k) }",
        {"k": normal(3)},
    ),
    "a large constant": (
        "(float[3] x) => (float[3] y, float[300] c) { y = Relu(x) c = Identity(k) }",
        {"k": normal(300)},
    ),
    "scalars": "(float x, int64 i) => (float y, int64 j) { y = Exp(x) j = Add(i, i) }",
    "a reduction to a scalar": "(float[3, 4] x) => (float y) { y = ReduceMax<keepdims = 0>(x) }",
    "an unused input": "(float[3, 4] x, float[2] unused) => (float[3, 4] y) { y = Relu(x) }",
    "views": (
        "(float[3, 4] x) => (float[N] y, float[N] z) {"
        " a = Reshape(x, s) y = Identity(a) r = Relu(x) z = Reshape(r, s) }",
        {"s": ints(2, 6)},
    ),
}


@cases(OUTPUTS)
def test_outputs(model, tmp_path):
    check(from_case(model), tmp_path)


def test_a_weight_used_twice(tmp_path):
    graph = """(float[5, 40] x) => (float[5, 40] y, float[5, 40] z) {
        a = MatMul(x, w) b = Relu(a) y = MatMul(b, w) t = Transpose<perm = [1, 0]>(w)
        z = MatMul(x, t) }"""
    check(build(graph, w=normal(40, 40) / 6), tmp_path)


def test_a_weight_that_is_also_an_embedding(tmp_path):
    graph = """(int64[1, 6] ids) => (float[1, 6, 50] y) {
        e = Gather(w, ids) h = MatMul(e, v) t = Transpose<perm = [1, 0]>(w) y = MatMul(h, t) }"""
    check(build(graph, w=normal(50, 32), v=normal(32, 32) / 6), tmp_path)


def test_float64_scalars_stay_inside(tmp_path):
    graph = """(float[3, 4] x) => (float[3, 4] y) {
        d = Cast<to = 11>(x) e = Mul(d, k) y = Cast<to = 1>(e) }"""
    model = build(graph, k=np.float64(1.5))
    assert model.graph.initializer[0].data_type == TensorProto.DOUBLE
    check(model, tmp_path)
