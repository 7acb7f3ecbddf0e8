from __future__ import annotations

import json
from pathlib import Path

import artifacts
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from sparse_tvm import bench, compile, interleave, prune
from sparse_tvm.cli import main
from sparse_tvm.errors import ModelError, OptionError
from sparse_tvm.machine import MachineLimits, measured_limits
from sparse_tvm.models.bert import BertConfig, build_bert
from sparse_tvm.npz import read_npz, write_npz
from sparse_tvm.profiling import profile_model
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


def test_bench_against_onnx_runtime(path: Path, tmp_path: Path) -> None:
    model = save(tmp_path / "small.onnx", onnx_model())
    result = bench(path, model, threads=1, **QUICK)
    assert result.reference is not None
    assert result.speedup == pytest.approx(result.reference.p50 / result.model.p50)
    assert result.max_abs_diff is not None
    assert list(result.max_abs_diff) == ["y", "same_ids", "weight"]
    assert max(result.max_abs_diff.values()) < 1e-4


def test_bench_shows_that_the_weights_differ(path: Path, tmp_path: Path) -> None:
    result = bench(path, save(tmp_path / "other.onnx", onnx_model(seed=1)), **QUICK)
    assert result.max_abs_diff is not None
    assert result.max_abs_diff["weight"] > 1
    assert result.max_abs_diff["same_ids"] == 0


def test_bench_refuses_another_model(path: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "other.onnx", onnx_model(output="logits"))
    with pytest.raises(ModelError, match=r"outputs are logits, same_ids, weight, not y, "):
        bench(path, other, **QUICK)
    with pytest.raises(ModelError, match=r"ONNX Runtime cannot load .*small\.so"):
        bench(path, path, **QUICK)
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


def test_profile_counts_flops_in_groups(tmp_path: Path) -> None:
    config = BertConfig(layers=1, hidden=32, heads=2, intermediate=48, vocabulary=40)
    dense, pruned, path = (tmp_path / name for name in ("dense.onnx", "pruned.onnx", "model.so"))
    onnx.save(build_bert(config, sequence=16), dense)
    prune(dense, pruned, sparsity=0.75, layers="query|intermediate")
    rules = ["query=csr", "intermediate=bsr:2x1"]
    compile(pruned, path, layer_rules=rules, verify=False)
    model = load(path)
    limits = MachineLimits(flops=1e3, near=1e3, far=1e12)
    profile = profile_model(model, random_inputs(model.inputs), limits=limits)
    groups = {group.group: group for group in profile.groups}
    assert list(groups) == ["sparse layers", "dense layers", "attention", "the rest"]
    assert groups["sparse layers"].flops == 2 * 16 * (32 * 32 + 48 * 32) / 4
    assert groups["dense layers"].flops == 2 * 16 * (3 * 32 * 32 + 48 * 32)
    assert groups["attention"].flops == 4 * 16 * 16 * 32
    assert groups["the rest"].flops == 0
    loads = 16 * (4 * 32 * 32 + 2 * 48 * 32) / 4  # a 2x1 block loads once for two rows
    assert groups["sparse layers"].bound == pytest.approx(loads / 1e3)
    assert groups["attention"].bound == pytest.approx(groups["attention"].flops / 1e3)
    assert 0 < groups["the rest"].bound < 1e-6
    assert sum(group.share for group in groups.values()) == pytest.approx(1)


def test_limits_are_measured_in_another_process() -> None:
    limits = measured_limits("native", 1)
    assert limits is not None
    assert limits.near > limits.far > 1e9
    assert limits.flops > 1e9
    assert measured_limits("no such target", 1) is None


def test_engines_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interleave, "BLOCK_S", 1e-9)
    order = []
    engines = {name: lambda name=name: order.append(name) for name in "ab"}
    times = interleave.interleave(engines, duration=3e-9)
    assert "".join(order) == "aabb" * 3  # of each pair, the first run is not counted
    assert [len(seconds) for seconds in times.values()] == [3, 3]


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
    arguments = ["--against", str(model), "--profile", "--json", str(figures)]
    assert main(["bench", str(path), *arguments, *quick]) == 0
    printed = capsys.readouterr().out
    for words in ("ONNX Runtime", "p99", "x the speed of", "difference of y", "encoder.bias"):
        assert words in printed
    result = json.loads(figures.read_text())
    assert result["max_abs_diff"]["y"] < 1e-4
    assert result["profile"]["kernels"][0]["seconds"] > 0
