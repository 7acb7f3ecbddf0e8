"""The layers of q, k and v as one, on the emulated GPU against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest

import sparse_tvm
from sparse_tvm.models.bert import BertConfig, build_bert, random_weights
from sparse_tvm.operators import Layout
from sparse_tvm.schedules.cuda.warpgroup_weights import warpgroup_arrays
from sparse_tvm.schedules.cuda.weights import stacked, weight_arrays
from sparse_tvm.sparsity.masks import prune_array

pytestmark = pytest.mark.usefixtures("gpu")

SIZES = {"hidden": 128, "heads": 2, "intermediate": 128, "vocabulary": 100, "max_positions": 32}


def compiled(tmp_path, structure: str, rules: list[str], parts=("query", "key", "value")):
    config = BertConfig(layers=1, **SIZES)
    weights = random_weights(config)
    for name, w in weights.items():
        if structure and any(f"{part}.weight" in name for part in parts):
            weights[name] = prune_array(w, 0.5, structure)
    model = build_bert(config, weights, batch=1, sequence=16)
    result = sparse_tvm.compile(
        model, tmp_path / "bert.so", target="cuda-sm90", layer_rules=rules, verify=True
    )
    difference = result.manifest["verification"]["max_abs_diff"]["last_hidden_state"]
    assert difference < 0.01
    layers = {layer["name"].rpartition(".")[2]: layer for layer in result.manifest["layers"]}
    return layers


@pytest.mark.parametrize(
    ("structure", "rules", "kernel"),
    [
        ("", [], "dense_384x128"),
        ("64x64", ["query|key|value=bsr:64x64"], "bsr_64x64_384x128"),
        ("32x32", ["query|key|value=bsr:32x32"], "bsr_32x32_384x128"),
    ],
)
def test_one_kernel_for_three_layers(tmp_path, structure, rules, kernel):
    layers = compiled(tmp_path, structure, rules)
    for name in ("query", "key", "value"):
        assert layers[name]["kernel"].startswith(kernel)


def test_layers_of_other_layouts_stay_apart(tmp_path):
    layers = compiled(tmp_path, "64x64", ["query=bsr:64x64"], ("query",))
    assert layers["query"]["kernel"].startswith("bsr_64x64_128x128")
    assert layers["key"]["kernel"].startswith("dense_128x128")


@pytest.mark.parametrize("arrays_of", [weight_arrays, warpgroup_arrays])
@pytest.mark.parametrize("layout", [Layout("", "dense"), Layout("", "bsr", (64, 64))])
def test_stacked_weights_are_those_of_the_stacked_matrix(arrays_of, layout):
    rng = np.random.default_rng(0)
    parts = [prune_array(rng.standard_normal((128, 192)), 0.5, "64x64") for _ in range(3)]
    found = stacked([list(arrays_of(w, layout).values()) for w in parts], layout)
    expected = arrays_of(np.concatenate(parts), layout).values()
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)
