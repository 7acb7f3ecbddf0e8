"""LSTM, GRU and RNN from model to result, against ONNX Runtime, which also verifies each."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

import sparse_tvm
from sparse_tvm.errors import ModelError
from sparse_tvm.frontends.onnx.weights import find_weights
from sparse_tvm.reference import Reference

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
OUTPUTS = ["y", "last", "cell"]
TOLERANCE = 1e-5


def network(
    kind: str,
    *,
    steps: int | str = "steps",
    batch: int | str = "batch",
    features: int = 12,
    hidden: int = 20,
    optional: tuple[str, ...] = (),
    sparsity: float = 0.0,
    constant: bool = True,
    **attributes: object,
) -> onnx.ModelProto:
    """A model of one network; weights are inputs if they are not to be constant."""
    rng = np.random.default_rng(0)
    directions = 2 if attributes.get("direction") == "bidirectional" else 1
    rows = GATES[kind] * hidden

    def array(*shape):
        values = rng.standard_normal(shape) * (rng.random(shape) >= sparsity)
        return (values / np.sqrt(shape[-1] * (1 - sparsity))).astype("float32")

    weights = {
        "w": array(directions, rows, features),
        "r": array(directions, rows, hidden),
        "b": array(directions, 2 * rows),
        "p": array(directions, 3 * hidden),
    }
    shapes = {
        "lengths": [batch],
        "h": [directions, batch, hidden],
        "c": [directions, batch, hidden],
    }
    names = ["x", "w", "r", "b", "lengths", "h", *(["c", "p"] if kind == "LSTM" else [])]
    names = [n if n in ("x", "w", "r") or n in optional else "" for n in names]
    outputs = OUTPUTS[: 3 if kind == "LSTM" else 2]
    node = helper.make_node(kind, names, outputs, "net", hidden_size=hidden, **attributes)
    stored = {name: value for name, value in weights.items() if name in names}
    inputs = [helper.make_tensor_value_info("x", 1, [steps, batch, features])]
    inputs += [
        helper.make_tensor_value_info(name, 6 if name == "lengths" else 1, shape)
        for name, shape in shapes.items()
        if name in names
    ]
    if not constant:
        inputs += [helper.make_tensor_value_info(n, 1, v.shape) for n, v in stored.items()]
    graph = helper.make_graph(
        [node],
        "recurrent",
        inputs,
        [helper.make_tensor_value_info(n, 1, [None] * (4 if n == "y" else 3)) for n in outputs],
        [numpy_helper.from_array(v, n) for n, v in stored.items()] if constant else [],
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def compare(model: onnx.ModelProto, artifact, sizes: dict[str, int]) -> None:
    """Run both on random inputs of these sizes."""
    rng = np.random.default_rng(1)
    feed = {}
    for value in model.graph.input:
        shape = [d.dim_value or sizes[d.dim_param] for d in value.type.tensor_type.shape.dim]
        lengths = rng.integers(1, sizes["steps"] + 1, shape).astype("int32")
        normal = (0.5 * rng.standard_normal(shape)).astype("float32")
        feed[value.name] = lengths if value.name == "lengths" else normal
    expected = Reference(model.SerializeToString(), threads=1).run(feed)
    found = sparse_tvm.load(artifact).run(feed)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=TOLERANCE)


@given(
    kind=st.sampled_from(list(GATES)),
    direction=st.sampled_from(["forward", "reverse", "bidirectional"]),
    optional=st.sets(st.sampled_from(["b", "lengths", "h", "c", "p"])),
    hidden=st.integers(2, 40),
    features=st.integers(1, 20),
    sparsity=st.sampled_from([0.0, 0.9]),
    constant=st.booleans(),
    reset_after=st.integers(0, 1),
)
@settings(deadline=None, max_examples=8, suppress_health_check=list(HealthCheck))
def test_networks(
    tmp_path, kind, direction, optional, hidden, features, sparsity, constant, reset_after
):
    after = {"linear_before_reset": reset_after} if kind == "GRU" else {}
    model = network(
        kind,
        optional=tuple(optional),
        hidden=hidden,
        features=features,
        sparsity=sparsity,
        constant=constant,
        direction=direction,
        **after,
    )
    artifact = tmp_path / "model.so"
    sparse_tvm.compile(model, artifact)
    for steps, batch in ((1, 1), (7, 1), (3, 5), (2, 19)):
        compare(model, artifact, {"steps": steps, "batch": batch})


def test_layers_are_sparse_and_say_why(tmp_path):
    model = network("LSTM", steps=32, batch=1, hidden=256, features=256, sparsity=0.95)
    model.graph.initializer[0].name = model.graph.node[0].input[1] = "onnx::LSTM_77"
    result = sparse_tvm.compile(model, tmp_path / "model.so")
    layers = {layer["name"]: layer for layer in result.manifest["layers"]}
    assert list(layers) == ["net.input", "r"]
    for layer, shape in (("net.input", [1024, 256]), ("r", [1024, 256])):
        assert layers[layer]["shape"] == shape
        assert layers[layer]["format"] in ("csr", "bsr", "sell")
        assert "faster than dense" in layers[layer]["reason"]


def test_both_directions_are_layers_and_rules_reach_them(tmp_path):
    model = network("GRU", sparsity=0.9, direction="bidirectional")
    rules = [r"r\.forward=csr", r"r\.backward=dense"]
    result = sparse_tvm.compile(model, tmp_path / "model.so", layer_rules=rules)
    formats = {layer["name"]: layer["format"] for layer in result.manifest["layers"]}
    assert list(formats) == ["w.forward", "r.forward", "w.backward", "r.backward"]
    assert (formats["r.forward"], formats["r.backward"]) == ("csr", "dense")


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", "float16"), ("bf16", "bfloat16")])
@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_steps_read_weights_of_16_bits(tmp_path, kind, precision, dtype, sparsity):
    model = network(
        kind, features=64, hidden=96, sparsity=sparsity, optional=("b",), direction="bidirectional"
    )
    manifests = {
        name: sparse_tvm.compile(model, tmp_path / f"{name}.so", precision=name).manifest
        for name in ("fp32", precision)
    }
    layers = {layer["name"]: layer["precision"] for layer in manifests[precision]["layers"]}
    assert set(layers.values()) == {dtype}
    wide, narrow = (manifest["totals"]["weight_bytes"] for manifest in manifests.values())
    assert narrow < 0.75 * wide
    wide, narrow = (sparse_tvm.load(tmp_path / f"{name}.so") for name in manifests)
    for steps, batch in ((1, 1), (5, 3), (2, 19)):
        x = np.random.default_rng(1).standard_normal((steps, batch, 64)).astype("float32")
        found, expected = (loaded.run({"x": x})["y"] for loaded in (narrow, wide))
        np.testing.assert_allclose(found, expected, atol=2e-2 if precision == "bf16" else 3e-3)


def test_weights_stay_float32_where_steps_of_many_sequences_would_take_longer(tmp_path):
    model = network("LSTM", steps=8, batch=8, features=64, hidden=256, sparsity=0.9)
    model.graph.initializer[1].CopyFrom(
        numpy_helper.from_array(
            np.repeat(numpy_helper.to_array(model.graph.initializer[1])[:, ::4], 4, axis=1), "r"
        )
    )
    manifest = sparse_tvm.compile(
        model, tmp_path / "m.so", precision="fp16", target="x86-64-v3"
    ).manifest
    precisions = {layer["name"]: layer["precision"] for layer in manifest["layers"]}
    assert precisions == {"w": "float16", "r": "float32"}
    assert any("r stays float32: its steps would take longer" in n for n in manifest["notes"])


def test_a_mixed_model_keeps_both_directions_in_float32(tmp_path):
    model = network("GRU", features=64, hidden=64, direction="bidirectional")
    narrow = np.ones(4, np.float16)
    model.graph.initializer.append(numpy_helper.from_array(narrow, "narrow"))
    model.graph.node.append(helper.make_node("Identity", ["narrow"], ["other"]))
    model.graph.output.append(helper.make_tensor_value_info("other", 10, [4]))
    manifest = sparse_tvm.compile(model, tmp_path / "m.so").manifest
    assert {layer["precision"] for layer in manifest["layers"]} == {"float32"}


def test_pruning_finds_both_weights():
    model = network("LSTM", direction="bidirectional")
    refs = {ref.layer: ref.shape for ref in find_weights(model)}
    assert refs == {"w": (160, 12), "r": (160, 20)}


def test_saved_module(tmp_path):
    model = network("LSTM", steps=3, batch=2, optional=("b", "lengths", "h", "c", "p"))
    sparse_tvm.compile(model, tmp_path / "model.so", save_ir=tmp_path / "module.json")
    result = sparse_tvm.compile(tmp_path / "module.json", tmp_path / "again.so")
    assert result.manifest["verification"]["reference"].startswith("TVM")
    compare(model, tmp_path / "again.so", {"steps": 3})


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"input_forget": 1}, "input_forget couples its gates"),
        ({"activations": ["Sigmoid", "Softsign", "Tanh"]}, "its activation Softsign is none of"),
    ],
)
def test_refusals(tmp_path, attributes, message):
    with pytest.raises(ModelError, match=rf"node net \(LSTM\) cannot be imported: {message}"):
        sparse_tvm.compile(network("LSTM", **attributes), tmp_path / "model.so")
    assert not list(tmp_path.iterdir())


def test_weights_made_of_parameters_are_layers(tmp_path):
    model = network("GRU", steps=4, batch=2)
    w, *_ = (numpy_helper.to_array(tensor)[0] for tensor in model.graph.initializer)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(w[::-1], "rnn.weight_ih"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([0]), "zero"))
    for name, value in (("minus", -1), ("end", -(10**9)), ("back", -1)):
        model.graph.initializer.append(numpy_helper.from_array(np.array([value]), name))
    turn = helper.make_node("Slice", ["rnn.weight_ih", "minus", "end", "zero", "back"], ["turned"])
    lift = helper.make_node("Unsqueeze", ["turned", "zero"], ["w"])
    (node,) = model.graph.node
    del model.graph.node[:]
    model.graph.node.extend([turn, lift, node])
    result = sparse_tvm.compile(model, tmp_path / "model.so")
    names = [layer["name"] for layer in result.manifest["layers"]]
    assert names == ["rnn.weight_ih", "r"]
    compare(model, tmp_path / "model.so", {"steps": 4})
