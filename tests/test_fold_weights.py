"""What is computed of weights alone is computed when the model is compiled."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx_models import assert_same_as_onnxruntime, build, normal

from sparse_tvm.frontends.onnx.simplify import input_specs, simplify


def operators(model: onnx.ModelProto) -> list[str]:
    """Of the simplified model."""
    program, _ = simplify(model, input_specs(model))
    return [node.op_type for node in program.graph.node]


def relative_positions() -> onnx.ModelProto:
    """Scores of x and of positions that have a layer norm and a projection, as in DeBERTa."""
    graph = """(float[batch, 16] x) => (float[batch, 24] y) {
        normal = LayerNormalization(positions, gain)
        projected = MatMul(normal, weight)
        keys = Transpose<perm=[1, 0]>(projected)
        queries = MatMul(x, weight)
        y = MatMul(queries, keys)
    }"""
    return build(graph, positions=normal(24, 16), gain=normal(16), weight=normal(16, 16))


def standardised() -> onnx.ModelProto:
    """A weight without its rows' mean and variance, by a batch norm in training, as in NFNet."""
    graph = """(float[batch, 16] x) => (float[batch, 32] y) {
        other_shape = Identity(shape)
        standard, mean, variance = BatchNormalization<training_mode=1>(
            weight, gain, zeros, zeros, zeros)
        matrix = Reshape(standard, other_shape)
        y = Gemm<transB=1>(x, matrix)
    }"""
    zeros = np.zeros(32, np.float32)
    shape = np.array([32, 16])
    return build(graph, weight=normal(1, 32, 16), gain=normal(32), zeros=zeros, shape=shape)


@pytest.mark.parametrize("make", [relative_positions, standardised])
def test_result_is_a_weight_like_others(make):
    model = make()
    assert set(operators(model)) <= {"MatMul", "Gemm", "Transpose"}
    assert_same_as_onnxruntime(model, sizes=({"batch": 3},))


def test_form_alone_stays():
    graph = """(float[batch, 16] x) => (float[batch, 8] y) {
        transposed = Transpose<perm=[1, 0]>(weight)
        y = MatMul(x, transposed)
    }"""
    model = build(graph, weight=normal(8, 16))
    _, weights = simplify(model, input_specs(model))
    assert list(weights) == ["weight"]


def test_much_larger_result_stays():
    graph = """(float[batch, 16] x) => (float[batch, 16] y) {
        matrix = MatMul(column, row)
        some = Gather(matrix, rows)
        y = Add(x, some)
    }"""
    model = build(graph, column=normal(1 << 18, 1), row=normal(1, 16), rows=np.array([3]))
    assert operators(model)[0] == "MatMul"


def test_chance_and_outputs_stay():
    graph = """(float[batch, 16] x) => (float[batch, 16] y, float[16, 16] z) {
        noise = RandomNormalLike(weight)
        noisy = Mul(noise, weight)
        y = MatMul(x, noisy)
        z = Exp(weight)
    }"""
    assert {"RandomNormalLike", "Mul", "Exp"} <= set(operators(build(graph, weight=normal(16, 16))))


def test_quantised_weight_stays():
    graph = """(float[batch, 16] x) => (float[batch, 64] y) {
        weight = DequantizeLinear<axis=1>(stored, scale)
        y = MatMul(x, weight)
    }"""
    stored = (100 * normal(16, 64)).clip(-127, 127).astype(np.int8)
    model = build(graph, stored=stored, scale=np.abs(normal(64)))
    assert "DequantizeLinear" in operators(model)


def test_what_onnxruntime_cannot_compute_stays():
    graph = """(bfloat16[batch, 16] x) => (bfloat16[batch, 16] y) {
        computed = Mul(weight, weight)
        y = MatMul(x, computed)
    }"""
    model = build(graph, weight=normal(16, 16).astype(ml_dtypes.bfloat16))
    assert operators(model) == ["Mul", "MatMul"]
