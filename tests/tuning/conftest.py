"""The model that the tests of tuning tune."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from pretended import sparse_weight


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two layers, one unstructured and one without zeros, for any number of rows."""
    path = tmp_path_factory.mktemp("tuned") / "model.onnx"
    graph = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[batch, 64] x) => (float[batch, 32] y)'
        " { a = Gemm<transB = 1>(x, w0, b0) b = Relu(a) y = Gemm<transB = 1>(b, w1, b1) }"
    )
    arrays = {"w0": sparse_weight(), "w1": sparse_weight(32, 96, 0.0)}
    arrays |= {"b0": np.ones(96, np.float32), "b1": np.ones(32, np.float32)}
    for name, array in arrays.items():
        graph.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.save(graph, path)
    return str(path)
