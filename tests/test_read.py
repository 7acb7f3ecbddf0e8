"""What read_onnx refuses, and how it says so."""

from __future__ import annotations

import pickle
import zipfile

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from sparse_tvm.errors import ModelError
from sparse_tvm.frontends.detect import open_source
from sparse_tvm.frontends.kinds import file_kind
from sparse_tvm.frontends.onnx.read import NEWEST_OPSET, read_onnx

DENSE = "(float[2,16] x) => (float[2,8] y) { y = MatMul(x, w) }"


def build(graph: str = DENSE, *, opset: int = 17, imports: str = "", **tensors):
    tensors = tensors or {"w": np.ones((16, 8), np.float32)}
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}{imports}]> g {graph}')
    for name, array in tensors.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def refusal(model) -> str:
    with pytest.raises(ModelError) as caught:
        read_onnx(model)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(build(), path)
    return path


def test_reads_a_file_and_a_model(saved):
    model = read_onnx(saved)
    assert model == read_onnx(str(saved))
    assert read_onnx(model) is model


def test_missing_file(tmp_path):
    path = tmp_path / "absent.onnx"
    assert refusal(path) == f"{path}: no such file"


def test_directory(tmp_path):
    assert "is a directory" in refusal(tmp_path)


def test_truncated_file(saved):
    data = saved.read_bytes()
    for length in range(len(data)):
        saved.write_bytes(data[:length])
        try:
            read_onnx(saved)
        except ModelError as error:
            assert str(saved) in str(error)  # noqa: PT017
        else:
            raise AssertionError(f"{length} of {len(data)} bytes were accepted")


def test_truncated_file_says_so(saved):
    saved.write_bytes(saved.read_bytes()[:200])
    assert refusal(saved) == f"{saved}: truncated or damaged"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"import onnx\nprint('hello')\n", "a text file"),
        ("größe = 1\n".encode() * 100, "a text file"),
        (b"\x7fELF\x02\x01\x01", "a shared library"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00" + b'{"weight":{}}', "weights without a graph"),
        (b"\x93NUMPY\x01\x00", "a NumPy array"),
    ],
)
def test_files_that_are_no_models(tmp_path, content, expected):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        open_source(path)
    assert str(caught.value).startswith(f"{path}: not a model: it is {expected}")


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", "the file is empty"), (bytes(range(128, 256)), "not an ONNX file")],
)
def test_what_is_no_known_file(tmp_path, content, expected):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert refusal(path) == f"{path}: {expected}"


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (pickle.dumps({"weights": [1, 2]}), "pickle"),
        (b"\x1c\x00\x00\x00TFL3\x14\x00", "tflite"),
        (b'{"sparse_tvm_ir": 2}', "ir"),
        (build().SerializeToString(), "onnx"),
    ],
)
def test_models_are_told_by_their_content(tmp_path, content, kind):
    path = tmp_path / "model.txt"
    path.write_bytes(content)
    assert file_kind(path) == kind


@pytest.mark.parametrize(
    ("member", "kind"),
    [
        ("archive/data.pkl", "pickle"),
        ("archive/models/model.json", "program"),
        ("archive/code/model.py", "torchscript"),
        ("arr_0.npy", "numpy"),
        ("readme", "zip"),
    ],
)
def test_archives_are_told_by_their_members(tmp_path, member, kind):
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, b"")
    assert file_kind(path) == kind


def test_external_data(tmp_path):
    weight = np.random.default_rng(0).random((16, 8), np.float32)
    path = tmp_path / "model.onnx"
    onnx.save(build(w=weight), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    model = read_onnx(path)
    np.testing.assert_array_equal(numpy_helper.to_array(model.graph.initializer[0]), weight)

    (tmp_path / "w.bin").write_bytes(b"short")
    assert "external data of initializer w: w.bin is too short" in refusal(path)
    (tmp_path / "w.bin").unlink()
    message = refusal(path)
    assert "external data file w.bin is missing" in message
    assert "initializer w" in message
    assert "give the model's path" in refusal(onnx.load(path, load_external_data=False))


def test_external_data_outside_of_the_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    path = folder / "model.onnx"
    onnx.save(build(), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    (folder / "w.bin").rename(tmp_path / "w.bin")
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].external_data[0].value = "../w.bin"
    path.write_bytes(model.SerializeToString())
    assert "lies outside of the model's folder" in refusal(path)


@pytest.mark.parametrize(("opset", "word"), [(5, "too old"), (NEWEST_OPSET + 1, "unknown")])
def test_opset(opset, word):
    message = refusal(build(opset=opset))
    assert f"opset {opset} is {word}" in message
    assert f"6 to {NEWEST_OPSET}" in message


def test_no_opset():
    model = build()
    del model.opset_import[:]
    assert "opset" in refusal(model)


def test_newer_ir_version():
    model = build()
    model.ir_version = onnx.IR_VERSION + 1
    assert f"supports up to {onnx.IR_VERSION}" in refusal(model)


def test_unknown_domain():
    message = refusal(
        build(
            '(float[2] x) => (float[2] y) { ["/act"] y = acme.Wobble(x) }',
            imports=', "acme" : 1, "unused" : 1',
        )
    )
    assert "/act (acme.Wobble)" in message
    assert "unused" not in message
    assert str(NEWEST_OPSET) in message


def test_double_precision():
    message = refusal(build(w=np.ones((16, 8), np.float64)))
    assert "weights are float32 or of 16 bits, but not 1 of them: w (double)" in message


def test_double_precision_names_the_first_few():
    names = {f"w{i}": np.ones((16, 8), np.float64) for i in range(9)}
    message = refusal(build(**names))
    assert "w0 (double)" in message
    assert "and 4 more" in message


def test_infinity_in_a_weight_of_16_bits():
    message = refusal(build(w=np.full((16, 8), np.inf, np.float16)))
    assert "w (initializer w: 0 NaN, 128 Inf of 128 values)" in message


def test_checker_failure_is_one_line():
    message = refusal(build("(float[2,16] x) => (float[2,8] y) { y = MatMul(x) }"))
    assert "invalid ONNX model" in message
    assert "MatMul" in message


def test_data_shorter_than_its_shape():
    model = build()
    model.graph.initializer[0].raw_data = b"\0" * 12
    assert "initializer w holds 3 values, but its shape [16, 8] needs 128" in refusal(model)


def test_nan_and_infinity_in_weights():
    weight = np.ones((16, 8), np.float32)
    weight[0, :3] = np.nan
    weight[1, 0] = np.inf
    model = build(w=weight)
    model.graph.initializer[0].name = model.graph.node[0].input[1] = "encoder.0.weight"
    message = refusal(model)
    assert "NaN or Inf" in message
    assert "encoder.0 (initializer encoder.0.weight: 3 NaN, 1 Inf of 128 values)" in message


def test_infinity_in_a_weight_behind_a_transpose():
    graph = "(float[2,16] x) => (float[2,8] y) { t = Transpose(w)  y = MatMul(x, t) }"
    weight = np.ones((8, 16), np.float32)
    weight[1, 0] = np.inf
    assert "w (initializer w: 0 NaN, 1 Inf of 128 values)" in refusal(build(graph, w=weight))


def test_nan_in_a_bias():
    graph = "(float[2,16] x) => (float[2,8] y) { z = MatMul(x, w)  y = Add(z, b) }"
    bias = np.full(8, np.nan, np.float32)
    assert "8 NaN" in refusal(build(graph, w=np.ones((16, 8), np.float32), b=bias))


def test_infinity_in_a_mask_is_fine():
    graph = "(float[2,16] x) => (float[2,8] y) { z = MatMul(x, w)  y = Add(z, mask) }"
    mask = np.full((2, 8), -np.inf, np.float32)
    read_onnx(build(graph, w=np.ones((16, 8), np.float32), mask=mask))


def test_large_finite_weights_are_fine():
    read_onnx(build(w=np.full((16, 8), 3e38, np.float32)))


def test_local_functions_are_inlined():
    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        g (float[2,16] x) => (float[2,8] y) { y = local.Linear(x, w) }
        <domain: "local", opset_import: ["" : 17]>
        Linear (x, w) => (y) { y = MatMul(x, w) }
    """)
    model.graph.initializer.append(numpy_helper.from_array(np.ones((16, 8), np.float32), "w"))
    inlined = read_onnx(model)
    assert [node.op_type for node in inlined.graph.node] == ["MatMul"]
    assert [tensor.name for tensor in inlined.graph.initializer] == ["w"]
    assert [value.name for value in inlined.graph.input] == ["x"]
    assert model.functions
