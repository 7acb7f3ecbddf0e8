"""Random dense networks through the whole compiler, against NumPy."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import sparse_tvm
from sparse_tvm.sparsity.masks import prune_array

sizes = st.one_of(st.sampled_from([1, 7, 16, 33]), st.integers(1, 80))
layer_specs = st.fixed_dictionaries(
    {
        "outputs": sizes,
        "spelling": st.sampled_from(["matmul", "gemm", "gemm transposed", "transpose"]),
        "structure": st.sampled_from(["unstructured", "4x1", "2x4", "16x1"]),
        "sparsity": st.sampled_from([0.0, 0.5, 0.9, 0.97]),
        "bias": st.booleans(),
        "relu": st.booleans(),
        "residual": st.booleans(),
        "rule": st.sampled_from([None, "dense", "csr", "bsr", "bsr:4x1", "bsr:3x2"]),
    }
)


def network(rows: int, inputs: int, layers: list[dict], seed: int):
    """A chain of layers as ONNX, its layer rules, and the same as a function of NumPy."""
    rng = np.random.default_rng(seed)
    nodes, initializers, rules, steps = [], [], [], []
    value, width = "x", inputs

    def add(op: str, *operands: str, **attributes) -> str:
        output = f"value_{len(nodes)}"
        nodes.append(helper.make_node(op, list(operands), [output], **attributes))
        return output

    def store(name: str, array: np.ndarray) -> str:
        initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    for index, layer in enumerate(layers):
        w = rng.standard_normal((layer["outputs"], width)).astype("float32")
        w = prune_array(w, layer["sparsity"], layer["structure"]) if layer["sparsity"] else w
        b = rng.standard_normal(layer["outputs"]).astype("float32") * layer["bias"]
        name, source = f"layer_{index}.weight", value
        if layer["spelling"] == "gemm":
            value = add("Gemm", value, store(name, w.T), store(f"bias_{index}", b))
        elif layer["spelling"] == "gemm transposed":
            value = add("Gemm", value, store(name, w), store(f"bias_{index}", b), transB=1)
        elif layer["spelling"] == "transpose":
            turned = add("Transpose", store(name, w), perm=[1, 0])
            value = add("Add", store(f"bias_{index}", b), add("MatMul", value, turned))
        else:
            value = add("Add", add("MatMul", value, store(name, w.T)), store(f"bias_{index}", b))
        residual = layer["residual"] and layer["outputs"] == width
        if residual:
            value = add("Add", source, value)
        if layer["relu"]:
            value = add("Relu", value)
        if layer["rule"] and w.size >= 64:  # smaller weights are constants of the program
            rules.append(f"^layer_{index}$={layer['rule']}")
        steps.append((w.astype("float64"), b, residual, layer["relu"]))
        width = layer["outputs"]

    def reference(x: np.ndarray) -> np.ndarray:
        y = x.astype("float64")
        for w, b, residual, relu in steps:
            z = y @ w.T + b + (y if residual else 0)
            y = np.maximum(z, 0) if relu else z
        return y

    nodes.append(helper.make_node("Identity", [value], ["y"]))
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, width])],
        initializers,
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8), rules, reference


@given(
    rows=sizes,
    inputs=sizes,
    layers=st.lists(layer_specs, min_size=1, max_size=4),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, max_examples=12)
def test_random_chain_of_layers(rows, inputs, layers, threads, seed):
    model, rules, reference = network(rows, inputs, layers, seed)
    onnx.checker.check_model(model)
    x = np.random.default_rng(seed + 1).standard_normal((rows, inputs)).astype("float32")
    expected = reference(x)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.so"
        result = sparse_tvm.compile(model, path, layer_rules=rules, verify=False)
        output = sparse_tvm.load(path, threads=threads).run({"x": x})["y"]
    forms = {layer["name"]: layer["format"] for layer in result.manifest["layers"]}
    for rule in rules:
        name, wanted = rule.strip("^").split("$=")
        assert forms[name] == wanted.partition(":")[0]
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(output, expected, rtol=0, atol=2e-5 * scale)
