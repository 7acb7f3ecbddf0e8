"""Operators where TVM's importer leaves outputs or attributes out, or fails."""

from __future__ import annotations

import numpy as np
import pytest
from onnx_models import assert_same_as_onnxruntime, build, executor, normal

import sparse_tvm
from sparse_tvm.errors import InputError, ModelError, OptionError
from sparse_tvm.frontends.importer.model import import_onnx


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("transformation", ["half_pixel", "asymmetric", "pytorch_half_pixel"])
def test_resize_by_fractions(mode: str, transformation: str) -> None:
    graph = f"""(float[1,2,7,9] x) => (float[1,2,9,5] y) {{
        y = Resize<mode="{mode}", coordinate_transformation_mode="{transformation}">(x, , s)
    }}"""
    assert_same_as_onnxruntime(build(graph, s=np.array([1, 1, 1.3, 0.6], np.float32)))


def test_resize_to_what_was_before_pooling() -> None:
    graph = """(float[b,3,h,w] x) => (float[b,3,h,w] y) {
        half = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x)
        shape = Shape(x)
        y = Resize<mode="nearest", coordinate_transformation_mode="asymmetric",
                   nearest_mode="floor">(half, , , shape)
    }"""
    sizes = [{"b": 1, "h": 4, "w": 6}, {"b": 2, "h": 7, "w": 5}]
    assert_same_as_onnxruntime(build(graph), sizes=sizes)


def test_resize_to_sizes_keeps_the_batch_symbolic() -> None:
    graph = """(float[b,3,4,4] x) => (float[b,3,9,9] y) {
        kept = Shape<start=0, end=2>(x)
        sizes = Concat<axis=0>(kept, wanted)
        y = Resize<mode="linear">(x, , , sizes)
    }"""
    assert_same_as_onnxruntime(build(graph, wanted=np.array([9, 9])), sizes=[{"b": 1}, {"b": 3}])


def test_flatten_from_the_end() -> None:
    graph = "(float[2,3,4,5] x) => (float[6,20] y) { y = Flatten<axis=-2>(x) }"
    assert_same_as_onnxruntime(build(graph))


def test_layer_normalization_returns_mean_and_inverse_deviation() -> None:
    graph = """(float[2,3,8] x) => (float[2,3,8] y, float[2,3,1] m, float[2,3,1] d) {
        y, m, d = LayerNormalization(x, w, b)
    }"""
    assert_same_as_onnxruntime(build(graph, w=normal(8), b=normal(8)))


def test_transposed_convolution_of_a_wanted_shape() -> None:
    graph = """(float[1,2,3,3] x) => (float[1,4,10,8] y) {
        y = ConvTranspose<strides=[3,2], output_shape=[10,8]>(x, w)
    }"""
    assert_same_as_onnxruntime(build(graph, w=normal(2, 4, 3, 3)))


def test_dropout_returns_a_mask_of_booleans() -> None:
    graph = "(float[2,3] x) => (float[2,3] y, bool[2,3] m) { y, m = Dropout(x) }"
    assert_same_as_onnxruntime(build(graph))


def test_infinities_of_one_sign() -> None:
    graph = """(float[4] x) => (bool[4] up, bool[4] down) {
        y = Mul(x, large)
        z = Mul(y, large)
        up = IsInf<detect_negative=0>(z)
        down = IsInf<detect_positive=0>(z)
    }"""
    assert_same_as_onnxruntime(build(graph, opset=20, large=np.float32(1e30)))


@pytest.mark.parametrize(
    "body",
    [
        "y = Sinh(x)",
        "y = Cosh(x)",
        "y = PRelu(x, slope)",
        "i = Cast<to=7>(x) p = Pow(i, five) y = Cast<to=1>(p)",
        "y = Pow(x, two)",
        "a, b = Split<axis=1>(x, parts) y = Concat<axis=1>(b, a)",
        "none = Slice(x, four, four, one) y = Concat<axis=1>(none, x)",
    ],
)
def test_operators_that_ended_in_internal_errors(body: str) -> None:
    tensors = {"five": np.array(5), "two": np.array(2), "parts": np.array([0, 4])}
    tensors |= {"four": np.array([4]), "one": np.array([1]), "slope": normal(4)}
    graph = f"(float[3,4] x) => (float[3,4] y) {{ {body} }}"
    assert_same_as_onnxruntime(build(graph, opset=18, **tensors))


def test_largest_of_booleans() -> None:
    graph = """(float[3,4] x) => (bool[3] y) {
        b = Greater(x, zero)
        y = ReduceMax<keepdims=0>(b, one)
    }"""
    model = build(graph, opset=20, zero=np.float32(0), one=np.array([1]))
    assert_same_as_onnxruntime(model)


WINDOWS = """(float[1,1,length] x) => (float[1,4,n] y) {
    a = Conv<strides=[5]>(x, w)
    b = Relu(a)
    y = Conv<strides=[2]>(b, v)
}"""


def test_windows_demand_a_least_size(tmp_path) -> None:
    model = build(WINDOWS, w=normal(4, 1, 10), v=normal(4, 4, 3))
    result = sparse_tvm.compile(model, tmp_path / "model.so")
    assert result.manifest["bounds"]["length"][0] == 20
    loaded = sparse_tvm.load(tmp_path / "model.so")
    assert loaded.run({"x": np.zeros((1, 1, 20), np.float32)})["y"].shape == (1, 4, 1)
    with pytest.raises(InputError, match="length is 19, but must be 20 or more"):
        loaded.run({"x": np.zeros((1, 1, 19), np.float32)})


def test_windows_that_never_fit_are_refused() -> None:
    model = build(WINDOWS, w=normal(4, 1, 10), v=normal(4, 4, 3))
    with pytest.raises(ModelError, match="larger than what it moves over"):
        import_onnx(model, {"x": (1, 1, 5)})
    with pytest.raises(OptionError, match="needs at least 20"):
        import_onnx(model, {"x": (1, 1, range(1, 512))})


def test_slices_and_sizes_after_windows_fit_each_other() -> None:
    """What a window leaves is not negative: neither is what a slice of it ends with."""
    graph = """(float[batch,1,length] x) => (float[batch,4,n] y, float[batch,4,m] z) {
        a = Conv<strides=[5]>(x, w)
        b = MaxPool<kernel_shape=[3], strides=[2]>(a)
        padded = Conv<pads=[2, 2]>(b, v)
        size = Shape<start=2, end=3>(b)
        cut = Slice(padded, zero, minus, two)
        y = Add(b, cut)
        part = Slice(padded, zero, size, two)
        z = Add(y, part)
    }"""
    ends = {name: np.array([value]) for name, value in (("zero", 0), ("minus", -1), ("two", 2))}
    model = build(graph, w=normal(4, 1, 10), v=normal(4, 4, 4), **ends)
    sizes = [{"batch": batch, "length": n} for batch, n in ((1, 20), (2, 29), (3, 30), (2, 55))]
    imported = assert_same_as_onnxruntime(model, sizes=sizes)
    assert imported.bounds["length"][0] == 20
    assert imported.outputs[0].shape == ("batch", 4, "length // 10 - 1")


@pytest.mark.parametrize("opset", [7, 9])
def test_old_opsets_are_converted(opset: int) -> None:
    graph = """(float[n,8] x) => (float[n,4] y) {
        a = MatMul(x, w)
        b = Relu(a)
        y = Softmax<axis=1>(b)
    }"""
    assert_same_as_onnxruntime(build(graph, opset=opset, w=normal(8, 4)), sizes=[{"n": 3}])


def test_dimensions_that_are_sums_of_others(tmp_path) -> None:
    """As decoders have them that take what they computed before."""
    graph = """(float[b,2,past,8] before, float[b,2,new,8] k, float[b,1,1,total] mask)
            => (float[b,2,new,total] y) {
        all = Concat<axis=2>(before, k)
        turned = Transpose<perm=[0,1,3,2]>(all)
        scores = MatMul(k, turned)
        masked = Add(scores, mask)
        y = Softmax<axis=-1>(masked)
    }"""
    model = build(graph)
    model.graph.input[2].type.tensor_type.shape.dim[3].dim_param = "past + new"
    model.graph.output[0].type.tensor_type.shape.dim[3].dim_param = "past + new"
    sparse_tvm.compile(model, tmp_path / "model.so")
    loaded = sparse_tvm.load(tmp_path / "model.so")

    def run(total: int) -> np.ndarray:
        shapes = {"before": (1, 2, 5, 8), "k": (1, 2, 1, 8), "mask": (1, 1, 1, total)}
        return loaded.run({n: np.zeros(s, np.float32) for n, s in shapes.items()})["y"]

    assert run(6).shape == (1, 2, 1, 6)
    with pytest.raises(InputError, match="past \\+ new is 7, not 6"):
        run(7)


@pytest.mark.parametrize("node", ["Div", "Mod", "Mod<fmod=1>"])
@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8"])
def test_division_of_integers_never_ends_the_process(node, constant, dtype, tmp_path):
    lowest = np.iinfo(dtype).min
    x = np.array([7, lowest, 9, lowest, 100], dtype)
    divisors = np.array([2, 3, 0, -1 if lowest else 0, 7]).astype(dtype)
    inputs, stored = (
        (f"{dtype}[5] x", {"d": divisors}) if constant else (f"{dtype}[5] x, {dtype}[5] d", {})
    )
    model = build(f"({inputs}) => ({dtype}[5] y) {{ y = {node}(x, d) }}", **stored)
    sparse_tvm.compile(model, tmp_path / "model.so", verify=False)
    feeds = {"x": x} if constant else {"x": x, "d": divisors}
    found = sparse_tvm.load(tmp_path / "model.so").run(feeds)["y"]
    defined = [0, 1, 4]
    pairs = [(int(x[i]), int(divisors[i])) for i in defined]
    quotients = [abs(a) // abs(b) * (-1 if (a < 0) != (b < 0) else 1) for a, b in pairs]
    rest = [
        a - b * q if "fmod" in node else a % b for (a, b), q in zip(pairs, quotients, strict=True)
    ]
    assert found[defined].tolist() == (quotients if node == "Div" else rest)
    assert found[2] == 0


def test_padding_by_reflection_of_what_was_reshaped(tmp_path):
    """Many indices wrap around there: it took exponential time to compile."""
    graph = """(float[1,3,3,4] x) => (float[1,1,3,6,4] y) {
        z = Unsqueeze(x, axis)
        y = Pad<mode="reflect">(z, pads)
    }"""
    pads = np.array([0, 0, 0, 1, 0, 0, 0, 0, 2, 0])
    sparse_tvm.compile(build(graph, axis=np.array([1]), pads=pads), tmp_path / "model.so")
    x = normal(1, 3, 3, 4)
    y = sparse_tvm.load(tmp_path / "model.so").run({"x": x})["y"]
    expected = np.pad(x[:, None], [(0, 0)] * 3 + [(1, 2), (0, 0)], mode="reflect")
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("direction", ["LEFT", "RIGHT"])
@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint8", "uint32"])
def test_shifts_by_any_number_of_bits(direction, dtype, tmp_path):
    """Negative ones shift all out, as do too many: what processors make of those differs."""
    info, bits = np.iinfo(dtype), np.dtype(dtype).itemsize * 8
    x = np.array([5, info.min, info.max, info.max, info.min, 9], dtype)
    counts = np.array([1, 2, bits - 1, bits, bits + 3, -1 if info.min else bits]).astype(dtype)
    node = f'BitShift<direction="{direction}">'
    model = build(f"({dtype}[6] x, {dtype}[6] n) => ({dtype}[6] y) {{ y = {node}(x, n) }}")
    sparse_tvm.compile(model, tmp_path / "model.so", verify=False)
    found = sparse_tvm.load(tmp_path / "model.so").run({"x": x, "n": counts})["y"]
    many = [int(count) if 0 <= count < bits else bits for count in counts]
    pairs = zip(map(int, x), many, strict=True)
    exact = [a >> n if direction == "RIGHT" else a << n for a, n in pairs]
    assert found.tolist() == [(y - info.min) % (1 << bits) + info.min for y in exact]


def test_largest_along_an_axis_of_a_computed_size(tmp_path):
    graph = """(float[n,3] x) => (float[2,3] y) {
        z = Concat<axis=0>(x, x)
        y, i = TopK<axis=0>(z, k)
    }"""
    model = build(graph, k=np.array([2]))
    sparse_tvm.compile(model, tmp_path / "model.so", verify=False)
    x = normal(5, 3)
    y = sparse_tvm.load(tmp_path / "model.so").run({"x": x})["y"]
    np.testing.assert_array_equal(y, np.repeat(x.max(0)[None], 2, 0))


TWO = """then_branch = t () => (float[n,1,4] u) <float[1] k = {2.0}> {
    w = Constant<value = float[1] {3.0}>() v = Mul(x, w) u = Add(v, k)
}, else_branch = e () => (float[n,1,4] u) <float[1] k = {5.0}> { v = Sub(x, k) u = Identity(v) }"""


@pytest.mark.parametrize("chosen", [True, False])
@pytest.mark.parametrize("outer", [True, False])
def test_if_chooses_at_run_time(chosen, outer, tmp_path):
    """Both branches use the same names, and one holds a choice of its own."""
    graph = f"""(float[n,1,4] x, bool c, bool d) => (float[n,1,4] y) {{
        z = If<then_branch = s () => (float[n,1,4] u) {{ u = If<{TWO}>(c) }},
               else_branch = f () => (float[n,1,4] u) {{ u = Neg(x) }}>(d)
        y = Abs(z)
    }}"""
    sparse_tvm.compile(build(graph), tmp_path / "model.so", verify=False)
    x = normal(3, 1, 4)
    feeds = {"x": x, "c": np.array(chosen), "d": np.array(outer)}
    found = sparse_tvm.load(tmp_path / "model.so").run(feeds)["y"]
    expected = (x * 3 + 2 if chosen else x - 5) if outer else -x
    np.testing.assert_allclose(found, np.abs(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("operator", "shape"), [("Greater", ("n", 4)), ("Less", ("n", 1, 4))])
def test_if_by_a_size_takes_one_branch(operator, shape):
    graph = f"""(float[n,1,4] x) => (float[a] y) {{
        s = Shape(x)
        d = Gather<axis=0>(s, zero)
        c = {operator}(d, zero)
        z = If<then_branch = t () => (float[n,4] u) {{ u = Squeeze(x, one) }},
               else_branch = e () => (float[n,1,4] u) {{ u = Relu(x) }}>(c)
        y = Sin(z)
    }}"""
    model = build(graph, zero=np.array(0), one=np.array([1]))
    imported = import_onnx(model)
    assert imported.outputs[0].shape == shape


def test_if_of_two_ranks_is_refused():
    graph = """(float[n,1,4] x, bool c) => (float[n,k] y) {
        y = If<then_branch = t () => (float[n,4] u) { u = Squeeze(x, one) },
               else_branch = e () => (float[n,1,4] u) { u = Relu(x) }>(c)
    }"""
    with pytest.raises(ModelError, match="which of two ranks its output has depends on data"):
        import_onnx(build(graph, one=np.array([1])))


@pytest.mark.parametrize("chosen", [True, False])
def test_weights_that_branches_alone_read(chosen, tmp_path):
    graph = """(float[n,24] x, bool c) => (float[n,16] y) {
        y = If<then_branch = t () => (float[n,16] u) { u = MatMul(x, w) },
               else_branch = e () => (float[n,16] u) { u = MatMul(x, v) }>(c)
    }"""
    w, v, x = normal(24, 16), normal(24, 16), normal(3, 24)
    sparse_tvm.compile(build(graph, w=w, v=v), tmp_path / "model.so", verify=False)
    found = sparse_tvm.load(tmp_path / "model.so").run({"x": x, "c": np.array(chosen)})["y"]
    np.testing.assert_allclose(found, x @ (w if chosen else v), rtol=1e-4, atol=1e-4)


def test_a_slice_to_a_billion_is_one_to_the_end():
    """So TensorFlow's exporters write it."""
    graph = """(float[n,4] x) => (float[a,4] y) {
        z = Slice(x, one, billion, zero)
        y = Relu(z)
    }"""
    stored = {"zero": np.array([0]), "one": np.array([1]), "billion": np.array([10**9])}
    assert import_onnx(build(graph, **stored)).outputs[0].shape == ("n - 1", 4)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize(
    "window",
    [
        "kernel_shape=[3, 2], strides=[2, 1]",
        "kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2]",
        "kernel_shape=[2, 2], dilations=[2, 3]",
    ],
)
def test_max_pooling_with_indices(window, order):
    """Also of elements that are the same, of which the first counts."""
    graph = f"""(float[n,3,h,9] x) => (float[n,3,a,b] y, int64[n,3,a,b] i) {{
        f = Floor(x)
        y, i = MaxPool<storage_order={order}, {window}>(f)
    }}"""
    assert_same_as_onnxruntime(build(graph), sizes=({"n": 1, "h": 5}, {"n": 2, "h": 12}))


def test_one_hot_of_values_known_at_run_time():
    graph = """(int64[n,3] x, float[2] v) => (float[n,6,3] y) { y = OneHot<axis=1>(x, depth, v) }"""
    model = build(graph, depth=np.array(6))
    assert_same_as_onnxruntime(model, sizes=({"n": 1}, {"n": 4}))


@pytest.mark.parametrize("options", ["", "<k=1>", "<dtype=11, k=-2>"])
def test_eye_of_another_type(options):
    dtype = "double" if "11" in options else "float"
    graph = f"""(float[3,5] x) => ({dtype}[3,5] y) {{
        y = EyeLike{options}(x)
    }}"""
    imported = import_onnx(build(graph))
    offset = {"": 0, "<k=1>": 1}.get(options, -2)
    [value] = executor(imported)({"x": np.zeros((3, 5), np.float32)})
    np.testing.assert_array_equal(value, np.eye(3, 5, offset))
    assert value.dtype == np.dtype("float64" if "11" in options else "float32")
