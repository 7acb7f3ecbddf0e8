"""The seam: a backend, and a kernel family, from outside the package and without changing it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from row_backend import RowBackend

import sparse_tvm
from sparse_tvm import backends
from sparse_tvm.backends import get_backend, register, resolve_target, unregister
from sparse_tvm.errors import TargetError
from sparse_tvm.families import Extents, Kernel, WeightedFamily, Wish, Work
from sparse_tvm.operators import Bias, Dense, Layout
from sparse_tvm.sparsity.statistics import WeightStatistics


def two_layers(first: np.ndarray, second: np.ndarray) -> onnx.ModelProto:
    """``relu(x @ first + b) @ second`` over any number of rows."""
    bias = np.linspace(-1, 1, first.shape[1], dtype=np.float32)
    arrays = {"first": first, "second": second, "b": bias}
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "first"], ["product"]),
            helper.make_node("Add", ["product", "b"], ["sum"]),
            helper.make_node("Relu", ["sum"], ["hidden"]),
            helper.make_node("MatMul", ["hidden", "second"], ["y"]),
        ],
        "two_layers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", first.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", second.shape[1]])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def weights(sparsity: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((32, 32)) * (rng.random((32, 32)) >= sparsity)
    return w.astype(np.float32)


@pytest.fixture
def row_backend() -> Iterator[RowBackend]:
    backend = RowBackend()
    register(backend)
    yield backend
    unregister(backend.name)


def test_a_backend_of_another_package(row_backend, tmp_path):
    model = two_layers(weights(0.9), weights(0.0))
    result = sparse_tvm.compile(model, tmp_path / "model.so", target="plain-rows")
    layers = {layer["name"]: layer for layer in result.manifest["layers"]}
    assert result.manifest["backend"] == "rows"
    assert (layers["first"]["format"], layers["second"]["format"]) == ("csr", "dense")
    assert result.manifest["verification"]["max_abs_diff"]["y"] < 1e-4
    x = np.random.default_rng(1).standard_normal((5, 32)).astype(np.float32)
    y = sparse_tvm.load(tmp_path / "model.so").run({"x": x})["y"]
    bias = np.linspace(-1, 1, 32, dtype=np.float32)
    expected = np.maximum(x @ weights(0.9) + bias, 0) @ weights(0.0)
    np.testing.assert_allclose(y, expected, atol=1e-4)


def test_what_it_refuses_stays_with_tvm_and_says_why(row_backend, tmp_path):
    result = sparse_tvm.compile(
        two_layers(weights(0.9), weights(0.9)), tmp_path / "model.so", target="plain-rows"
    )
    # The activation is no step of its layer, whose kernel knows only a bias.
    epilogues = [layer["epilogue"] for layer in result.manifest["layers"]]
    assert epilogues == [["bias"], []]


def test_names_are_taken_once(row_backend):
    with pytest.raises(ValueError, match="there is a backend 'rows' already"):
        register(RowBackend())
    with pytest.raises(TargetError, match="unknown backend 'tpu'"):
        get_backend("tpu")
    with pytest.raises(TargetError, match="unknown target 'tpu'") as error:
        resolve_target("tpu")
    assert "plain-rows" in (error.value.hint or "")


class AllZero(WeightedFamily[Dense]):
    """A layer whose weight is zero everywhere: its bias, for every token."""

    name: ClassVar[str] = "all_zero"
    operator: ClassVar[type[Dense]] = Dense

    def refuses(self, op: Dense, target: Any) -> str | None:
        return None if op.epilogue == (Bias(),) else "only a bias may follow"

    def candidates(
        self, op: Dense, weight: WeightStatistics, target: Any, wish: Wish | None = None
    ) -> Sequence[Layout]:
        return [] if wish is not None or weight.nonzeros else [Layout(self.name, "zero")]

    def cost(
        self, op: Dense, layout: Layout, weight: WeightStatistics, tokens: int, target: Any
    ) -> float:
        return tokens * op.matrix[0] * 1e-11

    def pack(self, op: Dense, w: np.ndarray, layout: Layout, target: Any) -> dict[str, np.ndarray]:
        return {}

    def build(self, op: Dense, operands: Sequence[Extents], output: Extents, target: Any) -> Kernel:
        from tvm.script.ir_builder import tirx as T

        from sparse_tvm.schedules.cpu.families.extents import known_or_symbols
        from sparse_tvm.schedules.cpu.lane_tiles import argument, prim_func

        n, k = op.matrix
        lead, tiles, _, lanes = known_or_symbols(output, ("lead", "tiles", "n", "lanes"))
        with prim_func() as result:
            argument("x", (lead, tiles, k, lanes))
            bias = argument("bias", (n,))
            y = argument("y", (lead, tiles, n, lanes))
            with (
                T.serial(0, lead) as i,
                T.serial(0, tiles) as j,
                T.serial(0, n) as f,
                T.vectorized(0, lanes) as lane,
            ):
                T.buffer_store(y, bias[f], [i, j, f, lane])
        return Kernel(f"zero_{n}x{k}", result["func"])

    def work(
        self, op: Dense, operands: Sequence[Extents], output: Extents, nonzeros: int | None = None
    ) -> Work:
        return Work()


def test_a_kernel_family_of_another_package(tmp_path, monkeypatch):
    cpu = get_backend("cpu")
    monkeypatch.setattr(cpu, "families", list(cpu.families))
    cpu.add(AllZero())
    first = np.zeros((32, 32), np.float32)
    model = two_layers(first, weights(0.9))
    # The activation would be part of the layer, which the family does not take.
    del model.graph.node[2]
    model.graph.node[2].input[0] = "sum"
    result = sparse_tvm.compile(model, tmp_path / "model.so")
    layer = result.manifest["layers"][0]
    assert (layer["format"], layer["kernel"]) == ("zero", "zero_32x32")
    assert "dense" in layer["reason"]
    with pytest.raises(ValueError, match="has a family 'all_zero' already"):
        cpu.add(AllZero())


def test_entry_points_bring_backends(monkeypatch):
    class Entry:
        @staticmethod
        def load() -> type[RowBackend]:
            return RowBackend

    backends._built_in.cache_clear()
    monkeypatch.setattr(backends, "entry_points", lambda group: [Entry()])
    try:
        assert list(backends.backends()) == ["cpu", "cuda", "rows"]
    finally:
        monkeypatch.undo()
        backends._built_in.cache_clear()
