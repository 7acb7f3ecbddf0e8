"""Runs like the last one: small models call their whole program as one function."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import numpy_helper, parser

import sparse_tvm
from sparse_tvm import repeat


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers for any number of rows; the second's result, and half of the first's."""
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[n, 64] x) =>
        (float[n, 64] y, float[n, 64] h)
        { a = MatMul(x, w) b = Relu(a) h = Mul(b, half) y = MatMul(b, w) }"""
    model = parser.parse_model(text)
    arrays = {"w": weight(), "half": np.float32(0.5)}
    for name, array in arrays.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    path = tmp_path_factory.mktemp("repeat") / "model.so"
    sparse_tvm.compile(model, path, format="dense")
    return path


def weight() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)


def check(model: sparse_tvm.Model, rows: int, seed: int) -> dict[str, np.ndarray]:
    x = np.random.default_rng(seed).standard_normal((rows, 64)).astype(np.float32)
    outputs = model.run({"x": x})
    hidden = np.maximum(x @ weight(), 0)
    np.testing.assert_allclose(outputs["h"], hidden / 2, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(outputs["y"], hidden @ weight(), rtol=1e-4, atol=1e-3)
    return outputs


def is_straight(model: sparse_tvm.Model) -> bool:
    return model._repeat is not None and model._repeat.outputs is not None


@pytest.mark.parametrize("threads", [1, 2])
def test_sizes_may_change_between_repeats(path: Path, threads: int) -> None:
    model = sparse_tvm.load(path, threads=threads)
    for seed, rows in enumerate((1, 1, 1, 1, 5, 5, 5, 1, 5, 1, 1, 33, 33, 33, 33)):
        check(model, rows, seed)
    assert is_straight(model)


def test_nothing_is_no_case_for_it(path: Path) -> None:
    """Sizes start at 1 where the model does not say otherwise; a slice may leave none."""
    graph = "g (float[n, 8] x) => (float[m, 8] y) { y = Slice(x, start, end, axis) }"
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {graph}')
    for name, value in {"start": 2, "end": 100, "axis": 0}.items():
        model.graph.initializer.append(numpy_helper.from_array(np.array([value]), name))
    sparse_tvm.compile(model, path.with_name("slice.so"))
    sliced = sparse_tvm.load(path.with_name("slice.so"))
    for rows in (2, 2, 2, 2, 3, 3, 3, 1, 1, 1, 1):
        x = np.random.default_rng(rows).standard_normal((rows, 8)).astype(np.float32)
        np.testing.assert_array_equal(sliced.run({"x": x})["y"], x[2:])


def test_outputs_belong_to_the_caller(path: Path) -> None:
    model = sparse_tvm.load(path)
    kept = [check(model, 2, seed) for seed in range(5)]
    assert is_straight(model)
    arrays = [array for outputs in kept for array in outputs.values()]
    assert not any(np.may_share_memory(a, b) for i, a in enumerate(arrays) for b in arrays[i + 1 :])


def test_large_inputs_are_read_where_they_are(path: Path) -> None:
    """If they are aligned and contiguous; the others are copied."""
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[n, 512] x, float[512] b) =>
        (float[n, 4] y) { a = Add(x, b) y = MatMul(a, w) }"""
    model, rng = parser.parse_model(text), np.random.default_rng(0)
    w = rng.standard_normal((512, 4)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(w, "w"))
    sparse_tvm.compile(model, path.with_name("wide.so"))
    wide = sparse_tvm.load(path.with_name("wide.so"))
    cases = [(64, 0), (64, 0), (64, 1), (64, 0), (80, 3), (80, 0)]
    for seed, (rows, shift) in enumerate(cases * 2):
        memory = np.empty(rows * 512 + 32, np.float32)
        first = -memory.ctypes.data % 64 // 4 + shift
        x = memory[first : first + rows * 512].reshape(rows, 512)
        x[...] = np.random.default_rng(seed).standard_normal(x.shape)
        if seed % 3 == 1:
            x = np.asfortranarray(x)
        b = np.full(512, seed, np.float32)
        for _ in range(2):
            np.testing.assert_allclose(wide.run(x, b)["y"], (x + b) @ w, rtol=1e-4, atol=1e-2)
        assert is_straight(wide)
        np.testing.assert_allclose(wide.run(-x, b)["y"], (b - x) @ w, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(("limit", "rows"), [("_MOST_WORKSPACE", 3), ("COPIED_BYTES", 3)])
def test_the_machine_runs_what_is_large(
    path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, rows: int
) -> None:
    monkeypatch.setattr(repeat, limit, 1)
    model = sparse_tvm.load(path)
    for seed in range(4):
        check(model, rows, seed)
    assert model._repeat is not None
    assert not is_straight(model)
