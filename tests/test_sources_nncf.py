"""Models quantised by nncf."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from test_quantised_models import NETWORKS

import sparse_tvm

nncf = pytest.importorskip("nncf", reason="scripts/test_sources.sh installs it")


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_quantised_by_nncf(network: str, tmp_path: Path) -> None:
    make, inputs = NETWORKS[network]
    model = make()
    model.ir_version = 8
    examples = nncf.Dataset([inputs(np.random.default_rng(seed)) for seed in range(4)])
    kind = nncf.ModelType.TRANSFORMER if network == "bert" else None
    path = tmp_path / "quantised.onnx"
    onnx.save(nncf.quantize(model, examples, subset_size=4, model_type=kind), path)
    manifest = sparse_tvm.compile(path, tmp_path / "model.so").manifest
    for similar in manifest["verification"]["similarity"].values():
        assert similar["cosine"] > 0.99
    if network == "bert":
        assert {layer["precision"] for layer in manifest["layers"]} == {"int8"}
        assert any(layer["name"] == "encoder.layer.0.output.dense" for layer in manifest["layers"])
