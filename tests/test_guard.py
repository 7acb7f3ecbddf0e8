"""Models that would take more than a machine has, and files that lead elsewhere."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from sparse_tvm import inspection
from sparse_tvm.errors import ModelError
from sparse_tvm.frontends.detect import open_source, read_json
from sparse_tvm.frontends.importer.model import import_onnx
from sparse_tvm.frontends.onnx.read import read_onnx
from sparse_tvm.frontends.safetensors_file import TensorFile

HUGE = 10**10


def build(body: str, functions: str = "", **constants: object) -> onnx.ModelProto:
    """Return a model of one input ``x`` and one output ``y``, with these constants."""
    text = (
        '<ir_version: 8, opset_import: ["" : 17, "own" : 1]> '
        f"g (float[1] x) => (float[1] y) {{ {body} }} {functions}"
    )
    model = parser.parse_model(text)
    for name, value in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return model


LARGEST = "m = ReduceMax <keepdims = 0> (r) y = Add(x, m)"
ZERO, ONE = np.float32(0), np.float32(1)
BOMBS = {
    "Range": build(f"r = Range(a, b, c) {LARGEST}", a=ZERO, b=np.float32(HUGE), c=ONE),
    "ConstantOfShape": build(f"r = ConstantOfShape(s) {LARGEST}", s=[HUGE]),
    "Expand": build(f"r = Expand(x, s) {LARGEST}", s=[HUGE]),
    "Pad": build(f"r = Pad(x, s) {LARGEST}", s=[0, HUGE]),
    "Tile": build(f"r = Tile(x, s) {LARGEST}", s=[HUGE]),
    "OneHot": build(
        f"r = OneHot(i, d, v) {LARGEST}", i=[1, 2], d=HUGE, v=np.array([0, 1], np.float32)
    ),
    # Only folding the first node tells the size.
    "computed size": build(
        f"e = Exp(a) r = Range(b, e, c) {LARGEST}", a=np.float32(23), b=ZERO, c=ONE
    ),
    "doubling": build(
        "r0 = Expand(x, s)"
        + "".join(f"r{i + 1} = Concat <axis = 0> ({', '.join([f'r{i}'] * 16)})" for i in range(9))
        + LARGEST.replace("(r)", "(r9)"),
        s=[16],
    ),
    "many constants": build(
        "".join(f"r{i} = ConstantOfShape(s)" for i in range(9))
        + f"r = Max({', '.join(f'r{i}' for i in range(9))}) {LARGEST}",
        s=[1 << 27],
    ),
}


@pytest.mark.parametrize("case", BOMBS)
def test_large_tensors_are_refused_before_they_are_made(case: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match=r"1073741824"):
        import_onnx(BOMBS[case])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


def test_memory_is_bounded_where_sizes_are_not_known() -> None:
    limits = resource.getrlimit(resource.RLIMIT_AS)
    bomb = build(
        f"e = Exp(a) n = Cast <to = 7> (e) r = ConstantOfShape(n) {LARGEST}",
        a=np.array([23], np.float32),
    )
    with pytest.raises(ModelError, match="constants take more memory"):
        import_onnx(bomb)
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


def calls(count: int, callee: str) -> str:
    return "".join(f"t{i} = own.{callee}({f't{i - 1}' if i else 'a'})" for i in range(count))


def function(name: str, body: str, result: str) -> str:
    return (
        f'<domain: "own", opset_import: ["" : 17, "own" : 1]> {name} (a) => ({result}) {{ {body} }}'
    )


def test_functions_that_unfold_without_end() -> None:
    nested = [function(f"f{i}", calls(2, f"f{i + 1}"), "t1") for i in range(25)]
    nested.append(function("f25", "b = Abs(a)", "b"))
    with pytest.raises(ModelError, match=r"unfold into 33554432 nodes"):
        read_onnx(build("y = own.f0(x)", " ".join(nested)))


def test_functions_that_call_themselves() -> None:
    pair = [function("f", calls(1, "g"), "t0"), function("g", calls(1, "f"), "t0")]
    with pytest.raises(ModelError, match=r"function . -> . -> . calls itself"):
        read_onnx(build("y = own.f(x)", " ".join(pair)))


def test_functions_that_do_not_unfold_much_are_inlined() -> None:
    model = read_onnx(build("y = own.f(x)", function("f", "b = Abs(a) c = Neg(b)", "c")))
    assert [node.op_type for node in model.graph.node] == ["Abs", "Neg"]


@pytest.mark.parametrize("name", [b"first_name", b"input_name"])
def test_names_that_are_not_utf8(tmp_path: Path, name: bytes) -> None:
    model = build("y = Abs(input_name)")
    model.graph.node[0].name = "first_name"
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString().replace(name, b"\xff" * len(name)))
    with pytest.raises(ModelError, match=r"model\.onnx: damaged: a name in it is not UTF-8"):
        read_onnx(path)


def test_initializer_that_does_not_fill_its_shape() -> None:
    model = build("i = Gather(x, w) y = Abs(i)", w=np.zeros(4, np.int64))
    model.graph.initializer[0].dims[0] = 5
    with pytest.raises(ModelError, match=r"initializer w|tensor name: w"):
        read_onnx(model)


def test_elements_of_less_than_a_byte() -> None:
    model = build("y = Abs(x)")
    tensor = helper.make_tensor("w", TensorProto.INT4, [4], [1, 2, 3, 4])
    model.graph.initializer.append(tensor)
    with pytest.raises(ModelError, match=r"float32 or of 16 bits.*w \(int4\)"):
        read_onnx(model)


def test_node_without_outputs() -> None:
    model = build("y = Abs(x)")
    del model.graph.node[0].output[:]
    with pytest.raises(ModelError, match="'Abs' has no output"):
        read_onnx(model)


@pytest.mark.parametrize(
    ("dims", "message"),
    [([-1, 4], "negative dimension -1"), ([1 << 40, 1 << 40], "1099511627776 x 1099511627776")],
)
@pytest.mark.parametrize("sparse", [False, True])
def test_impossible_shapes(dims: list[int], message: str, sparse: bool, tmp_path: Path) -> None:
    model = build("x1 = Unsqueeze(x, s) p = MatMul(x1, w) y = ReduceMax(p)", s=[0])
    values = numpy_helper.from_array(np.ones(1, np.float32), "w")
    if sparse:
        indices = numpy_helper.from_array(np.zeros(1, np.int64), "i")
        model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, dims))
    else:
        values.dims[:] = dims
        model.graph.initializer.append(values)
    for source in (model, tmp_path / "model.onnx"):
        if isinstance(source, Path):
            source.write_bytes(model.SerializeToString())
        with pytest.raises(ModelError, match=f"'w' has .*{message}"):
            inspection.inspect(source)


def test_sparse_indices_outside_of_the_shape() -> None:
    model = build("x1 = Unsqueeze(x, s) p = MatMul(x1, w) y = ReduceMax(p)", s=[0])
    values = numpy_helper.from_array(np.ones(1, np.float32), "w")
    for index in (-1, 4):
        indices = numpy_helper.from_array(np.array([index]), "i")
        del model.graph.sparse_initializer[:]
        model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [1, 4]))
        with pytest.raises(ModelError, match="sparse initializer w does not fit its shape"):
            inspection.inspect(model)


def with_external_data(folder: Path, location: str) -> Path:
    model = build("y = Add(x, w)", w=np.ones(1, np.float32))
    tensor = model.graph.initializer[0]
    onnx.external_data_helper.set_external_data(tensor, location)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_external_data_through_a_link_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(4))
    folder = tmp_path / "model"
    folder.mkdir()
    path = with_external_data(folder, "data.bin")
    (folder / "data.bin").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match=r"lies outside of the model's folder: data\.bin"):
        read_onnx(path)
    (folder / "data.bin").unlink()
    (folder / "data.bin").write_bytes(bytes(4))
    assert len(read_onnx(path).graph.initializer) == 1


def test_a_download_cache_may_link_to_its_blobs(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    model = with_external_data(snapshot, "data.bin").rename(blobs / "1")
    (blobs / "2").write_bytes(bytes(4))
    (snapshot / "model.onnx").symlink_to(model)
    (snapshot / "data.bin").symlink_to(blobs / "2")
    assert len(read_onnx(snapshot / "model.onnx").graph.initializer) == 1


def test_model_directory_with_a_link_out_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(ModelError, match=r"tokenizer\.json: is a link to /etc/hostname, outside"):
        open_source(folder)


@pytest.mark.parametrize("name", ["a" * 300, "a/" * 3000, "zero\0byte", "a" * 300 + "/b"])
def test_impossible_names(name: str) -> None:
    with pytest.raises(ModelError):
        open_source(name)


def test_deep_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a":' + "[" * 100_000)
    with pytest.raises(ModelError, match="not a readable JSON file"):
        read_json(path)


SOUND = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        '{"w":' + "[" * 100_000,
        "[]",
        '{"w": 1}',
        '{"w": {}}',
        *(
            json.dumps({"w": SOUND | change})
            for change in (
                {"shape": [-2]},
                {"shape": None},
                {"shape": [3]},
                {"data_offsets": [-8, 0]},
                {"data_offsets": [0]},
                {"data_offsets": ["a", "b"]},
            )
        ),
    ],
)
def test_safetensors_headers(header: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        TensorFile(path)
