from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import sparse_tvm
from sparse_tvm.cli import main
from sparse_tvm.errors import ModelError, OptionError, OutputError
from sparse_tvm.frontends.onnx import write
from sparse_tvm.frontends.onnx.detach import as_array
from sparse_tvm.frontends.onnx.weights import canonical, find_weights
from sparse_tvm.frontends.onnx.write import write_onnx
from sparse_tvm.sparsity.formats import BSR
from sparse_tvm.sparsity.masks import prune_array
from sparse_tvm.sparsity.pattern import Pattern
from sparse_tvm.sparsity.pruning import prune

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape, dtype=np.float32)


def make_model(scale_of_second: float = 1.0) -> onnx.ModelProto:
    """An embedding, two dense layers in different layouts, and a Conv beside them."""
    tensors = {
        "embedding": normal(50, 32),
        "first.weight": normal(32, 64),
        "second.weight": normal(16, 64) * np.float32(scale_of_second),
        "conv.weight": normal(8, 4, 3, 3),
    }
    nodes = [
        helper.make_node("Gather", ["embedding", "ids"], ["h0"], name="gather"),
        helper.make_node("MatMul", ["h0", "first.weight"], ["h1"], name="first"),
        helper.make_node("Gemm", ["h1", "second.weight"], ["y"], name="second", transB=1),
        helper.make_node("Conv", ["image", "conv.weight"], ["z"], name="conv"),
    ]
    graph = helper.make_graph(
        nodes,
        "test",
        [
            helper.make_tensor_value_info("ids", TensorProto.INT64, [5]),
            helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 4, 8, 8]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, 16]),
            helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 8, 6, 6]),
        ],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def matrices(model: onnx.ModelProto | Path) -> dict[str, np.ndarray]:
    model = model if isinstance(model, onnx.ModelProto) else onnx.load(model)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    return {
        ref.layer: canonical(ref, as_array(tensors[ref.initializer])) for ref in find_weights(model)
    }


def sparsity_of(w: np.ndarray) -> float:
    return float(np.mean(w == 0))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "pruned.onnx"


@given(
    st.tuples(st.integers(1, 30), st.integers(1, 30)),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.floats(0, 1, exclude_max=True),
    st.booleans(),
)
@settings(deadline=None)
def test_blocks_are_pruned_to_the_exact_count_by_magnitude(
    shape: tuple[int, int], block: tuple[int, int], sparsity: float, ties: bool
) -> None:
    w = normal(*shape)
    if ties:
        w = np.sign(w)
    pruned = prune_array(w, sparsity, f"{block[0]}x{block[1]}")
    blocks = -(-shape[0] // block[0]) * -(-shape[1] // block[1])
    kept = len(BSR.from_dense(pruned, block).indices)
    assert kept == blocks - round(sparsity * blocks)
    assert np.all((pruned == w) | (pruned == 0))
    if block == (1, 1) and 0 < kept < blocks:
        assert np.abs(w[pruned == 0]).max() <= np.abs(pruned[pruned != 0]).min()


def test_blocks_of_least_norm_go() -> None:
    w = np.array([[3, 0, 2, 2], [0, 0, 2, 2]], np.float32)
    np.testing.assert_array_equal(prune_array(w, 0.5, "2x2"), w * [0, 0, 1, 1])


def test_small_edge_blocks_compare_by_their_own_size() -> None:
    w = np.array([[1, 1, 1.1]], np.float32)
    np.testing.assert_array_equal(prune_array(w, 0.5, "1x2"), np.float32([[0, 0, 1.1]]))


def test_ties_go_in_row_major_order() -> None:
    np.testing.assert_array_equal(
        prune_array(np.ones((2, 4), np.float32), 0.75, "unstructured"),
        [[0, 0, 0, 0], [0, 0, 1, 1]],
    )


def test_zeros_stay_and_count() -> None:
    w = prune_array(normal(16, 16), 0.9, "unstructured")
    np.testing.assert_array_equal(prune_array(w, 0.5, "unstructured"), w)


@pytest.mark.parametrize(("n", "m", "columns"), [(2, 4, 32), (1, 4, 30), (4, 8, 33), (2, 3, 4)])
def test_n_of_m(n: int, m: int, columns: int) -> None:
    w = normal(7, columns)
    pruned = prune_array(w, 0.0, f"{n}:{m}")
    for start in range(0, columns, m):
        group, kept = np.abs(w[:, start : start + m]), pruned[:, start : start + m]
        for row, survivors in zip(group, kept, strict=True):
            expected = np.sort(row)[::-1][:n]
            np.testing.assert_array_equal(
                np.sort(np.abs(survivors[survivors != 0])), expected[::-1]
            )
    equals = prune_array(np.ones((1, m), np.float32), 0.0, f"{n}:{m}")
    assert equals.ravel().tolist() == [1.0] * n + [0.0] * (m - n)


@pytest.mark.parametrize("text", ["", "4", "dense", "4:2", "0:4", "4:4", "2:4:8", "x4", "random"])
def test_unknown_structure(text: str) -> None:
    with pytest.raises(OptionError, match="structure"):
        Pattern.parse(text)


@pytest.mark.parametrize(
    ("structure", "sparsity"),
    [("unstructured", 0.9), ("4x1", 0.75), ("2x2", 0.5), ("2:4", None), ("2:4", 0.5)],
)
def test_prune_uniform(structure: str, sparsity: float | None, output: Path) -> None:
    model = make_model()
    untouched = model.SerializeToString()
    report = prune(model, output, sparsity=sparsity, structure=structure)
    assert model.SerializeToString() == untouched
    before, after = matrices(model), matrices(output)
    expected = 0.5 if sparsity is None else sparsity
    for layer in report.layers:
        w = after[layer.name]
        assert sparsity_of(w) == pytest.approx(expected, abs=0.5 / min(w.size // 4, 288))
        assert (layer.before, layer.after, layer.shape) == (0.0, sparsity_of(w), w.shape)
        np.testing.assert_array_equal(w, prune_array(before[layer.name], expected, structure))
    assert [layer.name for layer in report.layers] == ["first", "second", "conv"]
    assert report.nonzeros == sum(np.count_nonzero(w) for w in after.values())
    np.testing.assert_array_equal(
        as_array(onnx.load(output).graph.initializer[0]), as_array(model.graph.initializer[0])
    )
    onnx.checker.check_model(str(output), full_check=True)


@pytest.mark.parametrize("structure", ["unstructured", "4x1"])
def test_prune_global_takes_from_the_smaller_layer(structure: str, output: Path) -> None:
    report = prune(
        make_model(scale_of_second=0.1), output, sparsity=0.8, structure=structure, scope="global"
    )
    by_name = {layer.name: layer.after for layer in report.layers}
    assert by_name["second"] > 0.95 > 0.8 > by_name["first"]
    assert report.nonzeros / report.parameters == pytest.approx(0.2, abs=2e-3)


def test_global_ties_are_counted_over_layers(output: Path) -> None:
    model = make_model()
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(np.ones(tensor.dims, np.float32), tensor.name))
    report = prune(model, output, sparsity=0.8, scope="global")
    assert [layer.after for layer in report.layers] == [1.0, 0.625, 0.0]
    assert report.nonzeros == report.parameters - round(0.8 * report.parameters)


def test_layers_and_exclude(output: Path) -> None:
    model = make_model()
    report = prune(model, output, sparsity=0.5, layers="first|second", exclude="^sec")
    assert [layer.name for layer in report.layers] == ["first"]
    before, after = matrices(model), matrices(output)
    assert sparsity_of(after.pop("first")) == 0.5
    for name, w in after.items():
        np.testing.assert_array_equal(w, before[name])


def test_random_weights(output: Path, tmp_path: Path) -> None:
    model = make_model()
    options = {"sparsity": 0.75, "structure": "4x1", "layers": "first", "random_weights": True}
    report = prune(model, output, seed=1, **options)
    w = matrices(output)["first"]
    assert (report.layers[0].structure, sparsity_of(w)) == ("4x1 blocks (fill 1.00)", 0.75)
    assert not np.any((w == matrices(model)["first"]) & (w != 0))
    for seed, same in ((1, True), (2, False)):
        other = tmp_path / "other.onnx"
        prune(model, other, seed=seed, **options)
        assert np.array_equal(matrices(other)["first"], w) == same


def test_tied_weights_are_pruned_once_and_embeddings_never(output: Path) -> None:
    model = make_model()
    model.graph.node.extend(
        [
            helper.make_node("MatMul", ["h0", "first.weight"], ["h2"], name="first_again"),
            helper.make_node("Transpose", ["embedding"], ["t"], perm=[1, 0]),
            helper.make_node("MatMul", ["h0", "t"], ["logits"], name="head"),
        ]
    )
    report = prune(model, output, sparsity=0.5, exclude="conv")
    assert [layer.name for layer in report.layers] == ["first", "second"]
    assert report.skipped == {"embedding": "its values are shared with Gather gather"}
    after = matrices(output)
    assert sparsity_of(after["embedding"]) == 0
    assert sparsity_of(after["first"]) == 0.5
    with pytest.raises(OptionError, match=r"no layer is left.*shared with Gather gather"):
        prune(model, output, sparsity=0.5, layers="embedding")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "unstructured needs a sparsity"),
        ({"sparsity": 1.0}, r"sparsity 1.0 is not in \[0, 1\)"),
        ({"sparsity": -0.1}, "sparsity -0.1 is not in"),
        ({"sparsity": float("nan")}, "sparsity nan is not in"),
        ({"sparsity": 0.9, "structure": "2:4"}, "0.9 contradicts structure 2:4, .* implies 0.5"),
        ({"structure": "2:4", "scope": "global"}, "scope global does not fit structure 2:4"),
        ({"sparsity": 0.9, "structure": "4by1"}, "unknown structure '4by1'"),
        ({"sparsity": 0.9, "scope": "local"}, "unknown scope 'local'"),
        ({"sparsity": 0.9, "layers": "("}, r"layers '\(' is not a valid regular expression"),
        ({"sparsity": 0.9, "layers": "third"}, "layers 'third' matches no layer.*first, second"),
        ({"sparsity": 0.9, "exclude": "third"}, "exclude 'third' matches no layer"),
        ({"sparsity": 0.9, "exclude": "."}, "no layer is left to prune"),
    ],
)
def test_bad_options(options: dict[str, object], message: str, output: Path) -> None:
    with pytest.raises(OptionError, match=message):
        prune(make_model(), output, **options)  # type: ignore[arg-type]
    assert not output.exists()


def test_weights_that_are_not_finite(output: Path) -> None:
    model = make_model()
    w = np.array(as_array(model.graph.initializer[1]))
    w[0, :3] = np.nan
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(w, "first.weight"))
    with pytest.raises(ModelError, match=r"first .*3 NaN"):
        prune(model, output, sparsity=0.5)


def test_model_without_weights(output: Path) -> None:
    model = make_model()
    del model.graph.node[1:], model.graph.output[:], model.graph.initializer[1:]
    model.graph.output.append(helper.make_tensor_value_info("h0", TensorProto.FLOAT, [5, 32]))
    with pytest.raises(ModelError, match="no MatMul, Gemm or Conv"):
        prune(model, output, sparsity=0.5)


def test_unwritable_output(tmp_path: Path) -> None:
    for output in (tmp_path / "missing" / "a.onnx", tmp_path):
        with pytest.raises(OutputError, match="cannot write"):
            prune(make_model(), output, sparsity=0.5)
    assert list(tmp_path.iterdir()) == []


def test_external_data_stays_external(tmp_path: Path, output: Path) -> None:
    source = tmp_path / "model.onnx"
    model = make_model()
    onnx.save(model, source, save_as_external_data=True, location="weights.bin", size_threshold=0)
    prune(source, output, sparsity=0.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model.onnx",
        "pruned.onnx",
        "pruned.onnx.data",
        "weights.bin",
    ]
    onnx.checker.check_model(str(output), full_check=True)
    for name, w in matrices(onnx.load(source)).items():
        np.testing.assert_array_equal(matrices(output)[name], prune_array(w, 0.5, "unstructured"))
    # In place: what is read is in memory before anything is replaced.
    prune(output, output, sparsity=0.75)
    assert sparsity_of(matrices(output)["first"]) == 0.75


def test_large_models_get_external_data(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "MAX_INLINE_BYTES", 1000)
    monkeypatch.setattr(write, "_MARGIN", 0)
    model = make_model()
    expected = matrices(model)
    write_onnx(model, output)
    assert output.stat().st_size < 1000 < output.with_name("pruned.onnx.data").stat().st_size
    for name, w in matrices(output).items():
        np.testing.assert_array_equal(w, expected[name])


def test_failure_to_write_leaves_nothing(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "_move_out", full)
    with pytest.raises(OutputError, match="No space left on device"):
        write_onnx(make_model(), output, external=True)
    assert list(output.parent.iterdir()) == []


def test_command_line(output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "model.onnx"
    onnx.save(make_model(), source)
    command = ["prune", str(source), "-o", str(output), "--structure", "4x1"]
    assert main([*command, "--sparsity", "0.75", "--exclude", "conv"]) == 0
    printed = capsys.readouterr().out
    assert "first" in printed
    assert "4x1 blocks (fill 1.00)" in printed
    assert "conv" not in printed
    assert sparsity_of(matrices(output)["second"]) == 0.75
    output.unlink()

    assert main([*command, "--sparsity", "1.5"]) == 2
    assert "sparsity 1.5 is not in [0, 1)" in capsys.readouterr().err
    assert not output.exists()


def test_prune_is_exported() -> None:
    assert sparse_tvm.prune is prune
