from __future__ import annotations

import json
from pathlib import Path

import artifacts
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper, parser

from sparse_tvm import bench, compile, prune
from sparse_tvm.benchmark import Timing
from sparse_tvm.cli import main
from sparse_tvm.cli.sweep import split_sweeps
from sparse_tvm.errors import ModelError, OptionError
from sparse_tvm.machine_limits import MachineLimits, measured_limits
from sparse_tvm.models.bert import BertConfig, build_bert
from sparse_tvm.npz import read_npz, write_npz
from sparse_tvm.profiling import GROUPS, Profile, profile_model
from sparse_tvm.random_inputs import random_inputs
from sparse_tvm.reference import Reference
from sparse_tvm.runtime import load

QUICK = {"warmup": 0.0, "duration": 0.02}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return artifacts.write(tmp_path_factory.mktemp("artifact") / "small.so")


def onnx_model(seed: int = 0, output: str = "y") -> onnx.ModelProto:
    """Return the ONNX model that computes what the small artifact computes."""
    shape = [artifacts.TOKENS, artifacts.FEATURES]
    float32, int64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Add", ["product", "b"], ["sum"]),
        helper.make_node("Relu", ["sum"], [output]),
        helper.make_node("Identity", ["ids"], ["same_ids"]),
        helper.make_node("Identity", ["w"], ["weight"]),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [info("x", float32, shape), info("ids", int64, shape[:1])],
        [
            info(output, float32, shape),
            info("same_ids", int64, shape[:1]),
            info("weight", float32, [artifacts.FEATURES] * 2),
        ],
        [numpy_helper.from_array(w, name) for name, w in artifacts.weights(seed).items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def save(path: Path, model: onnx.ModelProto) -> Path:
    onnx.save(model, path)
    return path


def test_bench_measures(path: Path) -> None:
    result = bench(path, threads=2, **QUICK)
    timing = result.model
    assert result.threads == 2
    assert timing.runs >= 1
    assert 0 < timing.p50 <= timing.p90 <= timing.p99
    assert timing.throughput == pytest.approx(1 / timing.mean)
    assert result.reference is None
    assert result.speedup is None


def test_noise_is_told_from_results() -> None:
    def timing(p90: float) -> Timing:
        return Timing("sparse-tvm", 100, 1e-3, p90, p90, 1e-3, 1e3, 0.1, 0)

    assert timing(p90=2e-3).is_noisy
    assert not timing(p90=1.2e-3).is_noisy


def test_bench_against_onnx_runtime(path: Path, tmp_path: Path) -> None:
    model = save(tmp_path / "small.onnx", onnx_model())
    result = bench(path, model, threads=1, **QUICK)
    assert result.reference is not None
    assert result.speedup == pytest.approx(result.reference.p50 / result.model.p50)
    assert result.max_abs_diff is not None
    assert list(result.max_abs_diff) == ["y", "same_ids", "weight"]
    assert max(result.max_abs_diff.values()) < 1e-4


def test_bench_against_another_artifact(path: Path, tmp_path: Path) -> None:
    other = compile(onnx_model(), tmp_path / "dense.so", format="dense", verify=False).path
    result = bench(path, other, threads=1, **QUICK)
    assert result.reference is not None
    assert (result.model.engine, result.reference.engine) == ("sparse-tvm", "dense.so")
    assert result.max_abs_diff is not None
    assert max(result.max_abs_diff.values()) < 1e-4
    another = compile(onnx_model(output="logits"), tmp_path / "other.so", verify=False).path
    with pytest.raises(ModelError, match=r"other\.so is another model than .*: its outputs are"):
        bench(path, another, **QUICK)


def test_bench_shows_that_the_weights_differ(path: Path, tmp_path: Path) -> None:
    result = bench(path, save(tmp_path / "other.onnx", onnx_model(seed=1)), **QUICK)
    assert result.max_abs_diff is not None
    assert result.max_abs_diff["weight"] > 1
    assert result.max_abs_diff["same_ids"] == 0


def test_bench_refuses_another_model(path: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "other.onnx", onnx_model(output="logits"))
    with pytest.raises(ModelError, match=r"outputs are logits, same_ids, weight, not y, "):
        bench(path, other, **QUICK)
    with pytest.raises(OptionError, match="warmup must not be negative, is -1 s"):
        bench(path, warmup=-1)


def test_profile_names_layers(path: Path) -> None:
    kernels = profile_model(load(path), artifacts.inputs(), runs=4).kernels
    assert sum(kernel.share for kernel in kernels) == pytest.approx(1)
    by_name = {kernel.function: kernel for kernel in kernels}
    assert set(by_name) == {"matmul", "epilogue", "vm.builtin"}
    assert by_name["epilogue"].layer == "encoder.bias"
    assert by_name["epilogue"].calls == 1
    assert by_name["matmul"].layer is None
    assert kernels == sorted(kernels, key=lambda kernel: -kernel.seconds)


TOKENS, COMPUTED = 20, 32
"""Tokens of an input, and those that its two tiles of sixteen hold."""

CONFIG = BertConfig(layers=1, hidden=32, heads=2, intermediate=48, vocabulary=40)
PREFIX = "encoder.layer.0."
LAYERS = {
    name: f"{PREFIX}{name}"
    for name in (
        *(f"attention.self.{part}" for part in ("query", "key", "value")),
        *("attention.output.dense", "intermediate.dense", "output.dense"),
    )
}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """A small BERT, compiled, and how many non-zeros each layer has in the model's own file."""
    directory = tmp_path_factory.mktemp("pruned")
    dense, sparse, path = (directory / name for name in ("a.onnx", "b.onnx", "model.so"))
    onnx.save(build_bert(CONFIG, sequence=TOKENS), dense)
    prune(dense, sparse, sparsity=0.75, structure="2x1", layers="query|intermediate")
    rules = ["query=csr", "intermediate=bsr:2x1"]
    compile(sparse, path, layer_rules=rules, verify=False)
    arrays = {t.name: numpy_helper.to_array(t) for t in onnx.load(sparse).graph.initializer}
    return path, {
        layer: int(np.count_nonzero(arrays[f"{layer}.weight"])) for layer in LAYERS.values()
    }


def profiled(path: Path, limits: MachineLimits | None = None) -> Profile:
    model = load(path)
    return profile_model(model, random_inputs(model.inputs), runs=2, limits=limits)


def test_profile_counts_flops_of_what_is_in_the_model(pruned: tuple[Path, dict[str, int]]) -> None:
    path, nonzeros = pruned
    kernels = profiled(path).kernels
    by_layer = {kernel.layer: kernel for kernel in kernels if kernel.kind == "dense"}
    assert set(by_layer) == set(nonzeros)
    assert nonzeros[LAYERS["attention.self.key"]] == 32 * 32
    assert nonzeros[LAYERS["attention.self.query"]] == 32 * 32 / 4
    for layer, count in nonzeros.items():
        assert by_layer[layer].flops == 2 * COMPUTED * count, layer
        assert by_layer[layer].calls == 1
    (attention,) = (kernel for kernel in kernels if kernel.kind == "attention")
    scores = weighted = 2 * (COMPUTED * COMPUTED * 16)  # for both heads of sixteen features
    assert attention.flops == 2 * (scores + weighted)
    others = [k for k in kernels if k.kind not in ("dense", "attention")]
    assert others
    assert all(kernel.flops == 0 for kernel in others)


def test_profile_groups_kernels(pruned: tuple[Path, dict[str, int]]) -> None:
    profile = profiled(pruned[0])
    assert [group.group for group in profile.groups] == list(GROUPS)
    members = {
        group: {kernel.layer for kernel in profile.kernels if kernel.group == group}
        for group in GROUPS
    }
    sparse = {LAYERS["attention.self.query"], LAYERS["intermediate.dense"]}
    assert members["sparse layers"] == sparse
    assert members["dense layers"] == set(LAYERS.values()) - sparse
    assert members["attention"] == {"attention"}
    for group in profile.groups:
        found = [kernel for kernel in profile.kernels if kernel.group == group.group]
        for key in ("seconds", "share", "flops"):
            total = sum(getattr(kernel, key) for kernel in found)
            assert getattr(group, key) == pytest.approx(total), key
        assert group.bound is None
    assert sum(group.share for group in profile.groups) == pytest.approx(1)


PLENTY = 1e30


def bounds(path: Path, **limits: float) -> dict[str | None, float]:
    """The roofline of each layer, and of attention, where only some resources are scarce."""
    scarce = MachineLimits(**{"flops": PLENTY, "near": PLENTY, "far": PLENTY, **limits})
    found = profiled(path, scarce).kernels
    return {k.layer: k.bound for k in found if k.kind in ("dense", "attention") and k.bound}


def test_roofline_of_scarce_arithmetic(pruned: tuple[Path, dict[str, int]]) -> None:
    path, nonzeros = pruned
    found = bounds(path, flops=1e3)
    for layer, count in nonzeros.items():
        assert found[layer] == pytest.approx(2 * COMPUTED * count / 1e3)
    assert found["attention"] == pytest.approx(4 * COMPUTED * COMPUTED * 32 / 1e3)


def test_roofline_of_scarce_loads(pruned: tuple[Path, dict[str, int]]) -> None:
    """A value of four bytes for each token and stored value; one for both rows of a 2x1 block."""
    path, nonzeros = pruned
    found = bounds(path, near=1e3)
    query, wide = LAYERS["attention.self.query"], LAYERS["intermediate.dense"]
    assert found[query] == pytest.approx(4 * COMPUTED * nonzeros[query] / 1e3)
    assert found[wide] == pytest.approx(4 * COMPUTED * nonzeros[wide] / 2 / 1e3)
    assert found[LAYERS["attention.self.key"]] < 1e-9  # a dense layer has none


def test_roofline_of_scarce_bandwidth(pruned: tuple[Path, dict[str, int]]) -> None:
    """Inputs, outputs, stored weights, biases and residuals, each once."""
    found = bounds(pruned[0], far=1e3)
    for layer in load(pruned[0]).manifest["layers"]:
        n, k = layer["shape"]
        activations = 4 * COMPUTED * (n + k + n * layer["epilogue"].count("residual"))
        weights = layer["bytes"] + 4 * n * layer["epilogue"].count("bias")
        assert found[layer["name"]] == pytest.approx((activations + weights) / 1e3)
    assert found["attention"] >= 4 * COMPUTED * 4 * 32 / 1e3  # q, k, v, and the output


def test_limits_are_measured_in_another_process() -> None:
    limits = measured_limits("native", 1)
    assert limits is not None
    assert limits.near > limits.far > 1e9
    assert limits.flops > 1e9
    assert measured_limits("no such target", 1) is None


def test_differences_of_special_values() -> None:
    with_identity = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "identity",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n"])],
    )
    model = helper.make_model(
        with_identity, opset_imports=[helper.make_opsetid("", 17)], ir_version=9
    )
    reference = Reference(model.SerializeToString(), threads=1)

    def difference(output: list[float], expected: list[float]) -> float:
        inputs = {"x": np.array(expected, np.float32)}
        outputs = {"y": np.array(output, np.float32)}
        return reference.max_abs_differences(inputs, outputs)["y"]

    nan, inf = float("nan"), float("inf")
    assert difference([1, nan, inf], [1.5, nan, inf]) == 0.5
    assert np.isnan(difference([nan], [1]))
    assert difference([inf], [1]) == inf
    assert difference([1, 2], [1]) == inf
    assert difference([], []) == 0


def test_npz_takes_any_name(tmp_path: Path) -> None:
    arrays = {"file": np.arange(3), "/encoder/out:0": np.ones((2, 0)), "self": np.array(1.5)}
    write_npz(tmp_path / "out.npz", arrays)
    loaded = read_npz(tmp_path / "out.npz")
    assert list(loaded) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)


def test_run_verb(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = artifacts.inputs()
    np.savez(tmp_path / "in.npz", **inputs)
    output = tmp_path / "out.npz"
    assert main(["run", str(path), "-i", str(tmp_path / "in.npz"), "-o", str(output)]) == 0
    assert "same_ids" in capsys.readouterr().out
    expected = artifacts.expected(inputs)
    np.testing.assert_allclose(np.load(output)["y"], expected, rtol=1e-5, atol=1e-5)


def test_run_verb_needs_inputs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(path)]) == 2
    assert "--random" in capsys.readouterr().err
    assert main(["run", str(path), "--random", "-i", "in.npz"]) == 2


def test_bench_verb(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(tmp_path / "small.onnx", onnx_model())
    figures = tmp_path / "figures.json"
    quick = ["--warmup", "0", "--duration", "0.02"]
    report = tmp_path / "report.html"
    arguments = ["--against", str(model), "--profile", "--json", str(figures)]
    arguments += ["--report", str(report)]
    assert main(["bench", str(path), *arguments, *quick]) == 0
    printed = capsys.readouterr().out
    for words in ("ONNX Runtime", "p99", "x the speed of", "difference of y", "encoder.bias"):
        assert words in printed
    assert "inputs: x 8x64, ids 8" in printed
    assert main(["bench", str(path), "--shape", "x:8,65", *quick]) == 2
    assert "no shape of x float32[8, 64]" in capsys.readouterr().err
    assert "the speed of ONNX Runtime" in report.read_text()
    result = json.loads(figures.read_text())
    assert result["max_abs_diff"]["y"] < 1e-4
    assert result["profile"]["kernels"][0]["seconds"] > 0


def test_sweeps_are_told_from_shapes() -> None:
    assert split_sweeps([]) == ([], [{}])
    assert split_sweeps(["x:1,64", "batch=1,8", "length=16,32"]) == (
        ["x:1,64"],
        [
            {"batch": 1, "length": 16},
            {"batch": 1, "length": 32},
            {"batch": 8, "length": 16},
            {"batch": 8, "length": 32},
        ],
    )
    with pytest.raises(OptionError, match="twice"):
        split_sweeps(["batch=1", "batch=2"])


def test_bench_sweeps_over_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        agraph (float[batch, 64] x) => (float[batch, 64] y) { y = Relu(x) }""")
    onnx.save(model, tmp_path / "relu.onnx")
    path = compile(tmp_path / "relu.onnx", tmp_path / "relu.so", verify=False).path
    figures = tmp_path / "figures.json"
    quick = ["--warmup", "0", "--duration", "0.02", "--json", str(figures)]
    arguments = ["bench", str(path), "--against", str(tmp_path / "relu.onnx"), *quick]
    assert main([*arguments, "--shape", "batch=1,40"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows if len(row) > 4 and row[0].isdigit()] == ["1", "40"]
    assert [result["shapes"]["x"] for result in json.loads(figures.read_text())] == [
        [1, 64],
        [40, 64],
    ]
    assert main([*arguments, "--shape", "length=1,40"]) == 2
    assert "it has batch" in capsys.readouterr().err
    assert main([*arguments, "--shape", "batch=1,40", "--report", f"{tmp_path}/r.md"]) == 2


def test_random_inputs_take_the_shape_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        agraph (float[batch, n, 4] x) => (float[batch, n, 4] y) { y = Relu(x) }""")
    onnx.save(model, tmp_path / "relu.onnx")
    path = str(compile(tmp_path / "relu.onnx", tmp_path / "relu.so", verify=False).path)
    for options, shape in (
        ((), (1, 128, 4)),
        (("--shape", "batch=3"), (3, 128, 4)),
        (("--shape", "x:5,6,4"), (5, 6, 4)),
    ):
        assert main(["run", path, "--random", *options, "-o", str(tmp_path / "y.npz")]) == 0
        assert np.load(tmp_path / "y.npz")["y"].shape == shape
    capsys.readouterr()
    for options, complaint in (
        (("--shape", "length=3"), "it has batch, n"),
        (("--shape", "x:5,6,7"), "x:5,6,7 is no shape"),
        (("--shape", "batch=1,2"), "several sizes"),
    ):
        assert main(["run", path, "--random", *options]) == 2
        assert complaint in capsys.readouterr().err
    assert main(["run", path, "-i", "x.npz", "--shape", "batch=3"]) == 2
    assert "--random" in capsys.readouterr().err
