"""ONNX Runtime as the reference, also for models of newer opsets than it takes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx_models import build, normal

from sparse_tvm.errors import ModelError
from sparse_tvm.frontends.onnx import write
from sparse_tvm.frontends.onnx.read import NEWEST_OPSET
from sparse_tvm.reference import Reference

DENSE = """(float[2,16] x) => (float[2,80] y) {
    z = MatMul(x, w)
    t = Add(z, table)
    y = Relu(t)
}"""


def dense(opset: int) -> onnx.ModelProto:
    model = build(DENSE, opset=opset, w=normal(16, 80), table=normal(80))
    model.ir_version = onnx.IR_VERSION if opset == NEWEST_OPSET else model.ir_version
    return model


@pytest.mark.parametrize("opset", [26, 27, 28])
def test_any_opset_runs(opset: int) -> None:
    model = dense(opset)
    x = normal(2, 16)
    found = Reference(model.SerializeToString(), threads=1).run({"x": x})["y"]
    expected = np.maximum(x @ normal(16, 80) + normal(80), 0)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_operators_that_are_too_new_are_expanded() -> None:
    graph = "(float[4] x, float[4] z) => (float[4] y) { y = SwiGLU(x, z) }"
    x, z = normal(4), normal(4) + 1
    model = Reference(build(graph, opset=28).SerializeToString(), threads=1)
    np.testing.assert_allclose(
        model.run({"x": x, "z": z})["y"], x / (1 + np.exp(-x)) * z, atol=1e-6
    )


def test_external_data_stays_external(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(write, "MAX_INLINE_BYTES", write._MARGIN)  # as if it were over 2 GiB
    path = tmp_path / "model.onnx"
    onnx.save(dense(28), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    x = normal(2, 16)
    found = Reference(path, threads=1).run({"x": x})["y"]
    expected = np.maximum(x @ normal(16, 80) + normal(80), 0)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "w.bin"]


def test_what_cannot_be_converted_is_refused() -> None:
    graph = '(float[1,2,4,8] q) => (float[1,2,4,8] y) { y = Einsum<equation="bhsd->bhsd">(q) }'
    model = build(graph, opset=28)
    model.graph.node[0].op_type = "Unheard"
    with pytest.raises(ModelError, match="Unheard"):
        Reference(model.SerializeToString(), threads=1)
