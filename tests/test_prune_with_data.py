"""One-shot pruning with calibration data: the solver, the ways into it, and what it refuses."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from scipy.optimize import lsq_linear

from sparse_tvm.cli import main
from sparse_tvm.errors import InputError, OptionError
from sparse_tvm.sparsity import reconstruction
from sparse_tvm.sparsity.analysis import analyse
from sparse_tvm.sparsity.layer_inputs import Window
from sparse_tvm.sparsity.masks import magnitude_mask, masked, wanda_mask
from sparse_tvm.sparsity.moments import Moments
from sparse_tvm.sparsity.obs import Problem, prune_by_obs, refit
from sparse_tvm.sparsity.pattern import Goal
from sparse_tvm.sparsity.pruning import prune


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def correlated(rows: int, columns: int) -> np.ndarray:
    """Inputs of which some are nearly combinations of others, as activations are."""
    draw = rng()
    few = draw.standard_normal((rows, columns // 3))
    x = few @ draw.standard_normal((columns // 3, columns))
    return (x + 0.3 * draw.standard_normal((rows, columns))).astype(np.float32)


def problem_of(w: np.ndarray, x: np.ndarray) -> Problem:
    hessian = (x.T @ x / len(x)).astype(np.float32)
    hessian += 1e-4 * np.eye(len(hessian), dtype=np.float32)
    return Problem(hessian, w @ hessian)


def loss(w: np.ndarray, after: np.ndarray, x: np.ndarray) -> float:
    return float(np.square(x @ (w - after).T).sum())


@pytest.mark.parametrize("structure", ["unstructured", "4x1", "1x4", "3x2", "2:4", "1:4", "4:16"])
def test_obs_beats_magnitude_and_keeps_the_structure(structure: str) -> None:
    x = correlated(2000, 50)
    w = rng().standard_normal((30, 50)).astype(np.float32)
    goal = Goal.parse(structure, None if ":" in structure else 0.7)
    after = prune_by_obs(w, problem_of(w, x), goal)
    by_magnitude = masked(w, magnitude_mask(w, goal))
    assert np.mean(after == 0) == pytest.approx(np.mean(by_magnitude == 0), abs=0.02)
    assert loss(w, after, x) < 0.5 * loss(w, by_magnitude, x)
    if goal.pattern.n_m:
        n, m = goal.pattern.n_m
        padded = np.pad(after != 0, ((0, 0), (0, -50 % m)))
        assert padded.reshape(-1, m).sum(axis=1).max() <= n
    else:
        r, c = goal.pattern.block
        padded = np.pad(after != 0, ((0, -30 % r), (0, -50 % c)))
        blocks = padded.reshape(padded.shape[0] // r, r, padded.shape[1] // c, c).any(axis=(1, 3))
        assert np.mean(~blocks) == pytest.approx(0.7, abs=0.5 / blocks.size)


def test_obs_finds_nearly_the_best_subset() -> None:
    x = correlated(500, 10)
    w = rng().standard_normal((1, 10)).astype(np.float32)
    problem = problem_of(w, x)
    found = loss(w, prune_by_obs(w, problem, Goal.parse("unstructured", 0.6)), x)
    best = np.inf
    for kept in combinations(range(10), 4):
        mask = np.zeros((1, 10), bool)
        mask[0, list(kept)] = True
        best = min(best, loss(w, refit(problem, mask), x))
    assert found <= 1.1 * best


def test_refit_is_least_squares() -> None:
    x = correlated(500, 12).astype(np.float64)
    w = rng().standard_normal((3, 12)).astype(np.float32)
    keep = rng().random((3, 12)) < 0.5
    problem = Problem((x.T @ x).astype(np.float32), (w @ (x.T @ x)).astype(np.float32))
    after = refit(problem, keep)
    for row in range(3):
        expected = lsq_linear(x[:, keep[row]], x @ w[row]).x
        np.testing.assert_allclose(after[row, keep[row]], expected, rtol=2e-2, atol=2e-3)


def test_zeros_stay_zero() -> None:
    x, w = correlated(500, 20), rng().standard_normal((8, 20)).astype(np.float32)
    w[:, :5] = 0
    after = prune_by_obs(w, problem_of(w, x), Goal.parse("unstructured", 0.1))
    assert not after[:, :5].any()
    assert np.mean(after == 0) == 0.25


def test_wanda_weighs_inputs_within_each_output() -> None:
    w = np.array([[3, 1, 2], [30, 10, 20]], np.float32)
    mask = wanda_mask(w, np.array([1.0, 10.0, 0.1]), Goal.parse("unstructured", 0.34))
    np.testing.assert_array_equal(mask, [[True, True, False]] * 2)


def test_moments_make_up_for_earlier_errors() -> None:
    dense = correlated(3000, 12)
    pruned = (dense @ rng().standard_normal((12, 12)) + 1).astype(np.float32)
    w = rng().standard_normal((4, 12)).astype(np.float32)
    moments = Moments(12)
    for start in range(0, 3000, 700):
        moments.add(dense[start : start + 700], pruned[start : start + 700])
    after = prune_by_obs(w, moments.problem(w, centred=True), Goal.parse("unstructured", 0.0))
    bias = moments.bias_change(w, after)
    wanted = dense @ w.T
    error = (
        np.square(wanted - pruned @ after.T - bias).sum()
        / np.square(wanted - wanted.mean(axis=0)).sum()
    )
    assert error < 0.05 < moments.error(w, w, centred=True)
    assert moments.error(w, after, centred=True) == pytest.approx(error, rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("mean", [0.0, 1e-12, 1e-8])
def test_rounding_does_not_outweigh_the_damping(mean: float) -> None:
    """A Hessian of small variances, with rounding of either sign."""
    noise = 1e-6 * rng().standard_normal((24, 24))
    moments = Moments(24)
    moments.count = 1
    moments._pruned = mean * np.eye(24) + noise + noise.T
    hessian = moments.problem(np.ones((4, 24), np.float32), centred=True).hessian
    assert np.linalg.eigvalsh(hessian.astype(np.float64)).min() > 0


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"strides": [2, 1], "pads": [1, 0, 2, 1]},
        {"dilations": [2, 2], "pads": [2, 2, 2, 2]},
        {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
        {"auto_pad": "SAME_LOWER", "strides": [2, 2]},
    ],
)
def test_unfolded_images_times_weights_are_the_convolution(attributes: dict[str, object]) -> None:
    x = rng().standard_normal((3, 4, 9, 8)).astype(np.float32)
    w = rng().standard_normal((5, 4, 3, 2)).astype(np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], **attributes)
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in "xwy"]
    graph = helper.make_graph([node], "conv", values[:2], values[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (expected,) = session.run(None, {"x": x, "w": w})
    read = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    rows = np.concatenate(list(Window.of(read, (3, 2)).unfold(x)))
    ours = (rows @ w.reshape(5, -1).T).reshape(3, *expected.shape[2:], 5)
    np.testing.assert_allclose(ours.transpose(0, 3, 1, 2), expected, rtol=1e-4, atol=1e-5)


def make_model() -> onnx.ModelProto:
    """Two convolutions, one of them depthwise, and two dense layers, one without a bias."""
    draw = rng()

    def normal(*shape: int) -> np.ndarray:
        return draw.standard_normal(shape).astype(np.float32) / np.float32(
            np.prod(shape[1:]) ** 0.5
        )

    tensors = {
        "conv.weight": normal(8, 3, 3, 3), "conv.bias": normal(8),
        "depthwise.weight": normal(8, 1, 3, 3),
        "first.weight": normal(8, 24), "first.bias": normal(24), "second.weight": normal(6, 24),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight", "conv.bias"], ["a"], pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "depthwise.weight"], ["c"], group=8),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("GlobalAveragePool", ["d"], ["e"]),
        helper.make_node("Flatten", ["e"], ["f"]),
        helper.make_node("MatMul", ["f", "first.weight"], ["g"]),
        helper.make_node("Add", ["g", "first.bias"], ["h"]),
        helper.make_node("Relu", ["h"], ["i"]),
        helper.make_node("Gemm", ["i", "second.weight"], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 6])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def images(count: int) -> np.ndarray:
    draw = rng()
    few = draw.standard_normal((count, 10))
    x = few @ draw.standard_normal((10, 192)) + 0.2 * draw.standard_normal((count, 192))
    return x.reshape(count, 3, 8, 8).astype(np.float32)


def outputs(model: onnx.ModelProto | Path, x: np.ndarray) -> np.ndarray:
    model = model if isinstance(model, onnx.ModelProto) else onnx.load(model)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, {"x": x})[0]


def test_model_error_is_half_of_magnitudes(tmp_path: Path) -> None:
    model, x = make_model(), images(400)
    wanted = outputs(model, x[300:])
    errors = {}
    for method in ("magnitude", "wanda", "obs"):
        data = None if method == "magnitude" else {"x": x[:300]}
        path = tmp_path / f"{method}.onnx"
        report = prune(
            model, path, sparsity=0.6, exclude="depthwise", method=method, calibrate=data
        )
        assert [layer.name for layer in report.layers] == ["conv", "first", "second"]
        assert all(layer.after == pytest.approx(0.6, abs=0.03) for layer in report.layers)
        errors[method] = float(np.square(outputs(path, x[300:]) - wanted).mean())
        assert not (tmp_path / f"{method}.onnx.pruning").exists()
    assert errors["obs"] < 0.5 * errors["magnitude"]
    assert all(layer.error is not None and 0 < layer.error < 1 for layer in report.layers)


def test_grouped_convolutions_are_left_alone(tmp_path: Path) -> None:
    report = prune(
        make_model(), tmp_path / "m.onnx", sparsity=0.5, method="obs", calibrate={"x": images(64)}
    )
    assert report.skipped == {"depthwise": "a convolution in 8 groups"}


def test_goals_by_layer(tmp_path: Path) -> None:
    goals = {"first": Goal.parse("4x1", 0.5), "second": Goal.parse("2:4", None)}
    for method, data in (("magnitude", None), ("obs", {"x": images(64)})):
        report = prune(
            make_model(), tmp_path / "m.onnx", goals=goals, method=method, calibrate=data
        )
        assert [(layer.name, round(layer.after, 2)) for layer in report.layers] == [
            ("first", 0.5),
            ("second", 0.5),
        ]
    with pytest.raises(OptionError, match="there is no layer third to prune"):
        prune(make_model(), tmp_path / "m.onnx", goals={"third": goals["first"]})


def test_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = {"sparsity": 0.5, "method": "obs", "calibrate": {"x": images(64)}}
    prune(make_model(), tmp_path / "whole.onnx", **call)
    path, solved = tmp_path / "m.onnx", []
    original = reconstruction.prune_by_obs

    def interrupted(*arguments: object) -> np.ndarray:
        if len(solved) == 2:
            raise KeyboardInterrupt
        solved.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(reconstruction, "prune_by_obs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune(make_model(), path, **call)
    assert not path.exists()
    solved.clear()  # two more may be solved: one is left
    prune(make_model(), path, **call)
    assert len(solved) == 1
    assert path.read_bytes() == (tmp_path / "whole.onnx").read_bytes()

    # What an interrupted run of other options left is of no use.
    monkeypatch.setattr(reconstruction, "prune_by_obs", original)
    store = tmp_path / "m.onnx.pruning"
    store.mkdir()
    (store / "identity").write_text("another")
    (store / "00000.npz").write_bytes(b"rubbish")
    prune(make_model(), path, **call)
    assert path.read_bytes() == (tmp_path / "whole.onnx").read_bytes()


def test_padding_does_not_count(tmp_path: Path) -> None:
    """Masked tokens of any content leave the pruned weights as they are."""
    draw = rng()
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("MatMul", ["x", "layer.weight"], ["y"]),
        helper.make_node("Cast", ["attention_mask"], ["m"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["m"], ["z"]),
    ]
    tensors = {
        "table": draw.standard_normal((30, 16)).astype(np.float32),
        "layer.weight": draw.standard_normal((16, 8)).astype(np.float32),
    }
    ints = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"])
        for name in ("input_ids", "attention_mask")
    ]
    floats = [
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "sequence", 8]),
        helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 1]),
    ]
    graph = helper.make_graph(
        nodes, "text", ints, floats, [numpy_helper.from_array(a, n) for n, a in tensors.items()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    ids = draw.integers(1, 30, (40, 6))
    mask = (np.arange(6) < draw.integers(2, 7, (40, 1))).astype(np.int64)
    weights = []
    for padding in (0, 7):
        path = tmp_path / f"{padding}.onnx"
        data = {"input_ids": np.where(mask, ids, padding), "attention_mask": mask}
        prune(model, path, sparsity=0.5, method="obs", calibrate=data)
        weights.append(numpy_helper.to_array(onnx.load(path).graph.initializer[1]))
    np.testing.assert_array_equal(*weights)
    assert analyse(weights[0]).sparsity == 0.5


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "has no x"),
        ({"x": images(64), "z": images(1)}, "has z"),
        ({"x": images(64).astype(np.float64)}, "x is float64"),
        ({"x": images(64)[:, :2]}, r"x has shape \[64, 2, 8, 8\]"),
        ({"x": images(64)[0]}, r"x has shape \[3, 8, 8\]"),
        ({"x": np.full((64, 3, 8, 8), np.nan, np.float32)}, "holds 12288 NaN"),
        ({"x": images(1)[:0]}, "has 0 samples"),
        ({"x": images(2)}, "2 calibration samples are too few: layer second sees 2 rows"),
        ({"x": np.full((64, 3, 8, 8), 1e38, np.float32)}, "not finite"),
    ],
)
def test_refuses_data(data: dict[str, np.ndarray], words: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    with pytest.raises(InputError, match=words), np.errstate(all="ignore"):
        prune(make_model(), path, sparsity=0.5, method="obs", calibrate=data)
    assert not path.exists()


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(make_model(), tmp_path / "m.onnx")
    np.savez(tmp_path / "data.npz", x=images(64))
    call = ["prune", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "p.onnx"), "--sparsity", "0.5"]
    assert main([*call, "--method", "obs", "--calibrate", str(tmp_path / "data.npz")]) == 0
    told = capsys.readouterr()
    assert "1/3 conv: error" in told.err
    assert "error" in told.out
    for options, words in (
        (["--method", "obs"], "needs calibration data"),
        (["--calibrate", str(tmp_path / "data.npz")], "magnitude uses no calibration data"),
        (["--method", "best"], "unknown method"),
        (["--method", "obs", "--calibrate", "nosuch.npz"], "no such file"),
        (["--method", "obs", "--calibrate", str(tmp_path / "m.onnx")], "is no calibration data"),
        (["--method", "obs", "--calibrate", str(tmp_path)], "has no images"),
    ):
        assert main([*call, *options]) != 0
        assert words in capsys.readouterr().err


def test_images_and_sentences(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(40):
        pixels = rng().integers(0, 255, (12, 20, 3)).astype(np.uint8) // (index + 1)
        image.fromarray(pixels).save(folder / f"{index}.png")
    report = prune(make_model(), tmp_path / "m.onnx", sparsity=0.5, method="obs", calibrate=folder)
    assert len(report.layers) == 3
    (folder / "0.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="no readable image"):
        prune(make_model(), tmp_path / "m.onnx", sparsity=0.5, method="obs", calibrate=folder)
    text = tmp_path / "sentences.txt"
    text.write_text("A sentence.\n")
    with pytest.raises(OptionError, match="has sentences, and the model takes x"):
        prune(make_model(), tmp_path / "m.onnx", sparsity=0.5, method="obs", calibrate=text)
