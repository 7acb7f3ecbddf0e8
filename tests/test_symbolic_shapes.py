"""Dimensions that are symbolic in the model stay so; shape arithmetic leaves no operators."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx_models import assert_same_as_onnxruntime, build, calls, normal
from tvm import relax, tirx

import sparse_tvm
from sparse_tvm.errors import InputError, ModelError, OptionError
from sparse_tvm.frontends.importer.model import import_onnx
from sparse_tvm.frontends.importer.sizes import Sizes
from sparse_tvm.frontends.input_shapes import choose_shapes, parse_input_shapes
from sparse_tvm.spec import TensorSpec

SIZES = ({"batch": 1, "sequence": 7}, {"batch": 3, "sequence": 16})


def shapes_are_known(imported) -> bool:
    bindings = [b for block in imported.module["main"].body.blocks for b in block.bindings]
    types = [b.var.ty for b in bindings if isinstance(b.var.ty, relax.TensorType)]
    return all(isinstance(type_.shape, relax.ShapeExpr) for type_ in types)


def check(graph: str, expected: list[str], sizes=SIZES, opset: int = 17, **tensors):
    imported = assert_same_as_onnxruntime(build(graph, opset=opset, **tensors), sizes=sizes)
    assert shapes_are_known(imported)
    assert calls(imported) == expected
    return imported


HEADS = {"zero": 0, "one": 1, "first": [0], "rest": [-1], "heads": [4], "width": [8]}
HEADS = {name: np.array(value) for name, value in HEADS.items()}


def test_heads_as_the_torchscript_exporter_splits_them():
    graph = """(float[batch,sequence,32] x) => (float[batch,4,sequence,8] y) {
        shape = Shape(x)
        b = Gather<axis=0>(shape, zero)
        s = Gather<axis=0>(shape, one)
        b1 = Unsqueeze(b, first)
        s1 = Unsqueeze(s, first)
        target = Concat<axis=0>(b1, s1, heads, rest)
        split = Reshape(x, target)
        y = Transpose<perm=[0,2,1,3]>(split)
    }"""
    check(graph, ["reshape", "permute_dims"], **HEADS)


def test_flat_rows_and_back():
    graph = """(float[batch,sequence,32] x) => (float[batch,sequence,8] y) {
        flat = Reshape(x, rows)
        z = MatMul(flat, w)
        shape = Shape<start=0, end=2>(x)
        target = Concat<axis=0>(shape, rest)
        y = Reshape(z, target)
    }"""
    tensors = {"rows": np.array([-1, 32]), "w": normal(32, 8), "rest": np.array([-1])}
    check(graph, ["reshape", "matmul", "reshape"], **tensors)


def test_reshape_keeps_sizes_at_zeros():
    graph = """(float[batch,sequence,32] x) => (float[batch,sequence,4,8] y) {
        y = Reshape(x, target)
    }"""
    check(graph, ["reshape"], target=np.array([0, 0, 4, -1]))


def test_positions_are_a_slice_of_a_table_and_bound_the_sequence():
    graph = """(float[batch,sequence,8] x) => (float[batch,sequence,8] y) {
        shape = Shape(x)
        length = Slice(shape, one, two)
        part = Slice(table, zero, length, one)
        y = Add(x, part)
    }"""
    tensors = {name: np.array([value]) for value, name in enumerate(["zero", "one", "two"])}
    imported = check(graph, ["strided_slice", "add"], **tensors, table=normal(1, 20, 8))
    assert imported.bounds == {"sequence": (1, 20)}
    assert int(imported.module["main"].attrs["tir_var_upper_bound"]["sequence"]) == 20


def test_class_token_is_expanded_by_the_batch():
    graph = """(float[batch,16,8] x) => (float[batch,s,8] y) {
        shape = Shape(x)
        b = Gather<axis=0>(shape, zero)
        b1 = Unsqueeze(b, first)
        wanted = Concat<axis=0>(b1, rest, rest)
        unset = Equal(wanted, minus)
        target = Where(unset, ones, wanted)
        token = Expand(class, target)
        y = Concat<axis=1>(token, x)
    }"""
    tensors = {"zero": 0, "first": [0], "rest": [-1], "minus": [-1] * 3, "ones": [1] * 3}
    arrays = {name: np.array(value) for name, value in tensors.items()}
    sizes = [{"batch": 1}, {"batch": 3}]
    imported = check(
        graph, ["broadcast_to", "concat"], sizes, **arrays, **{"class": normal(1, 1, 8)}
    )
    assert imported.outputs[0].shape == ("batch", 17, 8)


def test_causal_mask_from_ranges():
    graph = """(float[batch,sequence] x) => (float[sequence,sequence] y) {
        shape = Shape(x)
        s = Gather<axis=0>(shape, one)
        i = Range(zero, s, one)
        row = Unsqueeze(i, last)
        allowed = LessOrEqual(i, row)
        y = Where(allowed, none, lowest)
    }"""
    check(
        graph,
        ["arange", "reshape", "reshape", "less_equal", "where"],
        zero=np.array(0),
        one=np.array(1),
        last=np.array([-1]),
        none=np.float32(0),
        lowest=np.float32(-1e9),
    )


def test_expanding_what_may_be_neither_one_nor_the_target_is_refused():
    graph = """(float[1,n,4] x) => (float[1,m,4] y) {
        shape = Shape(x)
        part = Slice(x, start, end, axis, step)
        y = Expand(part, shape)
    }"""
    numbers = {"start": [-3], "end": [-1], "axis": [1], "step": [2]}
    model = build(graph, **{name: np.array(value) for name, value in numbers.items()})
    with pytest.raises(ModelError, match="fit each other for some sizes only"):
        import_onnx(model)


def test_sizes_that_are_computed_from_symbols():
    graph = """(float[batch,sequence] x) => (float[batch,longer] y, int64 count, int64[2] half) {
        y = Concat<axis=1>(x, x)
        count = Size(x)
        shape = Shape(x)
        twice = Mul(shape, two)
        half = Add(twice, two)
    }"""
    imported = assert_same_as_onnxruntime(build(graph, two=np.array([2])), sizes=SIZES)
    assert imported.outputs[0].shape == ("batch", "sequence * 2")


def test_constant_of_shape_tile_and_last_element():
    graph = """(float[batch,sequence] x)
        => (float[batch,sequence] o, float[b2,s2] t, float[batch] l) {
        shape = Shape(x)
        o = ConstantOfShape<value=float[1]{1.5}>(shape)
        b = Gather<axis=0>(shape, zeros)
        repeats = Concat<axis=0>(b, twos)
        t = Tile(x, repeats)
        l = Gather<axis=1>(x, minus)
    }"""
    tensors = {"zeros": np.array([0]), "twos": np.array([2]), "minus": np.array(-1)}
    imported = assert_same_as_onnxruntime(build(graph, **tensors), sizes=SIZES)
    assert shapes_are_known(imported)


def test_slices_of_symbolic_axes():
    graph = """(float[batch,sequence] x) => (float[batch,a] y, float[batch,b] z) {
        y = Slice(x, zero, end, one)
        z = Slice(x, one, all, one)
    }"""
    bounds = {"zero": 0, "one": 1, "end": -1, "all": 2**63 - 1}
    tensors = {name: np.array([value]) for name, value in bounds.items()}
    imported = check(graph, ["strided_slice", "strided_slice"], **tensors)
    assert [spec.shape[1] for spec in imported.outputs] == ["sequence - 1"] * 2


def test_different_names_for_the_same_size_become_one():
    graph = """(float[a,b] x, float[c,d] m, float[d,7] w) => (float[a,7] y) {
        z = Mul(x, m)
        y = MatMul(z, w)
    }"""
    imported = assert_same_as_onnxruntime(build(graph), sizes=[{"a": 2, "b": 3}])
    assert [spec.shape for spec in imported.inputs] == [("a", "b"), ("a", "b"), ("b", 7)]


def test_dimensions_without_a_name():
    model = build("(float[batch,8] x) => (float[batch,8] y) { y = Relu(x) }")
    model.graph.input[0].type.tensor_type.shape.dim[0].ClearField("dim_param")
    imported = assert_same_as_onnxruntime(model, sizes=[{"x_0": 2}])
    assert imported.inputs[0].shape == ("x_0", 8)


def test_a_shape_that_depends_on_data_is_refused():
    graph = """(float[batch,8] x, int64[2] shape) => (float[a,b] y) {
        ["/view"] y = Reshape(x, shape)
    }"""
    reason = r"node /view \(Reshape\) cannot be imported: a shape depends on the values"
    with pytest.raises(ModelError, match=reason):
        import_onnx(build(graph))


SYMBOLIC = "(float[batch,16] x, float[batch,n] z) => (float[batch,16] y, float[batch,n] t) {" + (
    "y = Relu(x)  t = Relu(z) }"
)


@pytest.mark.parametrize(
    ("options", "inputs", "bounds"),
    [
        ([], [("batch", 16), ("batch", "n")], {}),
        (["x:1,16"], [(1, 16), (1, "n")], {}),
        (["x:rows,16"], [("rows", 16), ("rows", "n")], {}),
        (["z:?,128"], [("batch", 16), ("batch", 128)], {}),
        (["z:1..64,2..512"], [("batch", 16), ("batch", "n")], {"batch": (1, 64), "n": (2, 512)}),
    ],
)
def test_input_shapes(options, inputs, bounds):
    imported = import_onnx(build(SYMBOLIC), parse_input_shapes(options))
    assert [spec.shape for spec in imported.inputs] == inputs
    assert imported.bounds == bounds


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["w:1,16"], "no input 'w' (its inputs are x float32[batch, 16], z float32[batch, n]"),
        (["x:1,2,16"], "has 3 dimensions, but the model has 2: x float32[batch, 16]"),
        (["x:1,17"], "--input-shape x:1,17 contradicts the model: x float32[batch, 16]"),
        (["x:1,1..8"], "--input-shape x:1,1..8 contradicts the model"),
        (["x:1,16", "z:2,3"], "--input-shape z:2,3 makes batch 2, but it is 1 already"),
        (["x:1..4,16", "z:1..8,3"], "z:1..8,3 makes batch 1..8, but it is 1..4 already"),
    ],
)
def test_input_shapes_that_do_not_fit(options, expected):
    with pytest.raises(OptionError) as caught:
        import_onnx(build(SYMBOLIC), parse_input_shapes(options))
    assert expected in str(caught.value)


def test_more_than_the_model_allows_is_refused():
    graph = """(float[batch,sequence,8] x) => (float[batch,sequence,8] y) {
        shape = Shape<start=1, end=2>(x)
        part = Slice(table, zero, shape, one)
        y = Add(x, part)
    }"""
    model = build(graph, table=normal(1, 20, 8), zero=np.array([0]), one=np.array([1]))
    with pytest.raises(OptionError, match=r"sequence up to 64, but the model allows at most 20"):
        import_onnx(model, {"x": ("batch", range(1, 65), 8)})


def test_expressions_of_symbols():
    specs = [TensorSpec("x", "float32", ("past", "new")), TensorSpec("m", "int64", ("past + new",))]
    shapes = choose_shapes(specs, {"x": (128, "?")})
    assert [spec.shape for spec in shapes.specs] == [(128, "new"), ("128 + new",)]
    model = build("(float[a,8] x, float[b,8] z) => (float[c,8] y) { y = Concat<axis=0>(x, z) }")
    model.graph.input[1].type.tensor_type.shape.dim[0].dim_param = "a + 2"
    assert import_onnx(model).outputs[0].shape == ("a * 2 + 2", 8)


def test_a_size_that_no_operand_has(tmp_path):
    """TVM's fusion fails at such a size where the operator beside it takes another one."""
    graph = """(int64[rows,1] x, float[other,columns] z) => (int64[rows,columns] y) {
        other = Shape<start=0, end=1>(z)
        sizes = Shape(z)
        columns = Gather<axis=0>(sizes, one)
        columns1 = Unsqueeze(columns, first)
        rows = Shape<start=0, end=1>(x)
        target = Concat<axis=0>(rows, columns1)
        wide = Expand(x, target)
        sum = Add(wide, other)
        y = Mul(sum, x)
    }"""
    model = build(graph, one=np.array(1), first=np.array([0]))
    compiled = sparse_tvm.compile(model, tmp_path / "model.so", threads=1)
    x = np.arange(3).reshape(3, 1)
    (y,) = sparse_tvm.load(compiled.path).run(x, np.zeros((5, 4), np.float32)).values()
    np.testing.assert_array_equal(y, np.broadcast_to((x + 5) * x, (3, 4)))


def test_odd_names():
    model = build("(float[a,8] x) => (float[a,8] y) { y = Relu(x) }")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch-size"
    assert import_onnx(model).inputs[0].shape == ("batch_size", 8)


def test_parse_input_shapes():
    assert parse_input_shapes(["a:1,128", "scope/b:0:2"]) == {"a": (1, 128), "scope/b:0": (2,)}
    assert parse_input_shapes(["a:n,?,1..8"]) == {"a": ("n", "?", range(1, 9))}
    assert parse_input_shapes(["a:[1x128]"]) == {"a": (1, 128)}
    assert parse_input_shapes([]) == {}


@pytest.mark.parametrize(
    "option", ["a", "a:", ":1,2", "a:1,-x", "a:0,2", "a:-1,2", "a:1,,2", "a:8..1", "a:0..4"]
)
def test_parse_input_shapes_refuses(option):
    with pytest.raises(OptionError, match="NAME:DIM,DIM"):
        parse_input_shapes([option])


def test_two_shapes_for_one_input():
    with pytest.raises(OptionError, match="two shapes"):
        parse_input_shapes(["a:1", "a:2"])


def test_the_largest_number_may_stand_beside_sizes():
    graph = """(float[batch,sequence,8] x) => (int64[4] y) {
        shape = Shape(x)
        y = Concat<axis=0>(shape, largest)
    }"""
    check(graph, ["arange", "arange", "concat", "reshape"], largest=np.array([2**63 - 1]))


def test_shapes_that_fit_for_some_sizes_only():
    """PyTorch's legacy exporter writes the length that it saw into the middle of attention."""
    graph = """(float[n,4,m] x) => (float[n,4,m] y) {
        a = Reshape(x, shape)
        y = Add(x, a)
    }"""
    model = build(graph, shape=np.array([-1, 4, 8]))
    with pytest.raises(ModelError, match=r"\[n, 4, m\] and \[.*, 4, 8\] fit each other for some"):
        import_onnx(model)
    assert import_onnx(model, {"x": ("n", 4, 8)}).outputs[0].shape == ("n", 4, 8)


@pytest.mark.parametrize("end", [np.iinfo(np.int64).min, -(1 << 62), -(10**9)])
def test_reversed_axes_keep_their_size(end):
    """Else memory would be planned for the largest size that there may be."""
    graph = """(float[n,4] x) => (float[m,4] y) {
        reversed = Slice(x, last, end, axes, last)
        y = Relu(reversed)
    }"""
    tensors = {"last": np.array([-1]), "end": np.array([end]), "axes": np.array([0])}
    imported = assert_same_as_onnxruntime(build(graph, **tensors), sizes=[{"n": 5}])
    if end < -(10**9):
        assert imported.outputs[0].shape == ("n", 4)


@pytest.mark.parametrize(
    ("start", "end", "step"),
    [
        *[(5, -3, 1), (-2, 3, 1), (-4, -2, 2), (2, 5, 1), (-2, 9, 1), (2, -2, 1)],
        *[(-1, 0, -1), (3, 0, -1), (6, 1, -2), (5, 2, -1), (-2, -5, -2), (2**63 - 1, -3, -1)],
        *[(1, -2, -1), (-3, 5, -1), (-4, -2, -1), (-3, -(2**63), -2)],
    ],
)
def test_slices_of_axes_that_are_shorter_than_their_bounds(start, end, step):
    graph = """(float[n,4] x) => (float[m,4] y) {
        part = Slice(x, start, end, axes, step)
        y = Relu(part)
    }"""
    tensors = {"start": start, "end": end, "axes": 0, "step": step}
    model = build(graph, **{name: np.array([value]) for name, value in tensors.items()})
    assert_same_as_onnxruntime(model, sizes=[{"n": n} for n in (1, 2, 4, 7, 9)])


def test_the_end_of_a_table_bounds_what_it_is_added_to():
    graph = """(float[batch,n] x) => (float[batch,n] y) {
        shape = Shape(x)
        n = Gather(shape, one)
        before = Sub(twelve, n)
        start = Max(before, zero)
        part = Slice(table, start, most, axes)
        y = Add(x, part)
    }"""
    tensors = {"one": [1], "twelve": [12], "zero": [0], "most": [2**63 - 1], "axes": [0]}
    arrays = {name: np.array(value) for name, value in tensors.items()}
    model = build(graph, table=np.arange(12, dtype=np.float32), **arrays)
    imported = assert_same_as_onnxruntime(model, sizes=[{"batch": 2, "n": n} for n in (1, 5, 12)])
    assert dict(imported.module["main"].attrs["tir_var_upper_bound"]) == {"n": 12}


def test_the_largest_integer_ends_a_slice_of_any_axis():
    sizes = Sizes({})
    n = tirx.Var("n", "int64")
    sizes.declare(n)
    extent = n // 20 + tirx.min(n // 20 + 4998, 9999) - 5000
    assert sizes.slice_bound(2**63 - 1, extent) is extent
    assert sizes.slice_bound(-(2**63), extent) == 0


@pytest.mark.parametrize("start", [-1, 5, 2**63 - 1])
def test_slices_back_to_the_last_element_are_empty(start):
    graph = """(float[n,4] x) => (float[m,4] y) {
        part = Slice(x, start, minus, axes, minus)
        y = Concat<axis=0>(part, x)
    }"""
    tensors = {"start": start, "axes": 0, "minus": -1}
    model = build(graph, **{name: np.array([value]) for name, value in tensors.items()})
    assert_same_as_onnxruntime(model, sizes=[{"n": 3}])


def test_a_slice_back_of_an_axis_within(tmp_path):
    """With a size that is 0 for some inputs, by which nothing may be divided."""
    graph = """(float[b,n,12] x) => (float[b,m,12] y) { y = Slice(x, start, end, axes, step) }"""
    tensors = {"start": 100, "end": 1, "axes": 1, "step": -1}
    model = build(graph, **{name: np.array([value]) for name, value in tensors.items()})
    sparse_tvm.compile(model, tmp_path / "m.so", verify=False)
    artifact = sparse_tvm.load(tmp_path / "m.so")
    for rows in (1, 2, 3, 120):
        x = np.arange(2 * rows * 12, dtype=np.float32).reshape(2, rows, 12)
        np.testing.assert_array_equal(artifact.run({"x": x})["y"], x[:, 100:1:-1])


HALVED = """(float[n,4,h,w] x) => (float[n,8,a,b] y) {
    small = Conv<strides=[4,4], kernel_shape=[3,3], pads=[1,1,1,1]>(x, k)
    half = Resize<mode="nearest">(small, none, scales)
    other = MaxPool<strides=[2,2], kernel_shape=[2,2], ceil_mode=1>(x)
    sum = Add(half, other)
    whole = Resize<mode="nearest">(sum, none, scales)
    y = Concat<axis=1>(whole, x)
}"""


def test_images_that_are_halved_and_doubled_are_multiples(tmp_path):
    model = build(
        HALVED,
        k=normal(4, 4, 3, 3),
        none=np.zeros(0, np.float32),
        scales=np.array([1, 1, 2, 2], np.float32),
    )
    onnx.save(model, tmp_path / "m.onnx")
    sparse_tvm.compile(tmp_path / "m.onnx", tmp_path / "m.so", verify=True)
    compiled = sparse_tvm.load(tmp_path / "m.so")
    assert compiled.inputs[0].multiples == (1, 1, 4, 4)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for shape in ((1, 4, 4, 4), (2, 4, 8, 20), (1, 4, 64, 36)):
        x = normal(*shape)
        [expected] = session.run(None, {"x": x})
        np.testing.assert_allclose(compiled.run({"x": x})["y"], expected, rtol=1e-4, atol=1e-4)
    for size in (1, 6, 30):
        with pytest.raises(InputError, match=f"w is {size}, but must be a multiple of 4|4 or more"):
            compiled.run({"x": normal(1, 4, 8, size)})


def test_two_dimensions_that_become_one_keep_their_multiples():
    shapes = choose_shapes([TensorSpec("x", "float32", ("a", "b"))], {})
    shapes.multiples.update(a=4, b=6)
    shapes.merge("a", "b")
    assert shapes.multiples_of(shapes.specs[0]) == (12, 12)


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize("auto", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("step", [1, 2])
def test_pools_pad_by_themselves(op, auto, step):
    shape = "n,2,h,w" if step == 1 or auto == "VALID" else "n,2,7,9"
    graph = f"""(float[{shape}] x) => (float[n,2,a,b] y) {{
        y = {op}<auto_pad="{auto}", kernel_shape=[2,3], strides=[{step},{step}]>(x)
    }}"""
    sizes = ({"n": 1, "h": 5, "w": 8}, {"n": 2, "h": 6, "w": 7})
    assert_same_as_onnxruntime(build(graph), sizes=sizes)


def test_pools_that_pad_by_symbolic_sizes_are_refused():
    graph = """(float[n,2,h,w] x) => (float[n,2,a,b] y) {
        y = MaxPool<auto_pad="SAME_UPPER", kernel_shape=[3,3], strides=[2,2]>(x)
    }"""
    with pytest.raises(ModelError, match="how much auto_pad pads depends on sizes"):
        import_onnx(build(graph))


def test_a_size_that_bounds_make_a_number():
    graph = """(float[n,4,h,w] x) => (float[n,8,1,v] y) {
        small = AveragePool<kernel_shape=[3,2], strides=[3,2]>(x)
        row = ReduceMean<axes=[2]>(small)
        y = Concat<axis=1>(small, row)
    }"""
    imported = assert_same_as_onnxruntime(
        build(graph), sizes=({"n": 1, "h": 3, "w": 2}, {"n": 2, "h": 5, "w": 7})
    )
    assert imported.bounds["h"] == (3, 5)
