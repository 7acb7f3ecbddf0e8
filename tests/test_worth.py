"""Which precisions ``auto`` may choose for a layer: those that are predicted to make it faster."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import sparse_tvm
from sparse_tvm.backends import resolve_target
from sparse_tvm.frontends.importer.model import import_onnx
from sparse_tvm.passes.formats import FormatOptions
from sparse_tvm.passes.infrastructure import Context
from sparse_tvm.quantising.choice import ladder_of
from sparse_tvm.quantising.worth import Worth, worthwhile
from sparse_tvm.sparsity.masks import prune_array

SIZE = 1024
LAYERS = 12
"""Of 4 MB each: together no cache holds them."""


def stack(tokens: int | str, structure: str | None = None) -> onnx.ModelProto:
    """Dense layers one after another, all with the same numbers."""
    w = np.random.default_rng(0).standard_normal((SIZE, SIZE), np.float32) / 32
    if structure is not None:
        w = prune_array(w, 0.9, structure)
    names = [f"layer{i}.weight" for i in range(LAYERS)]
    nodes = [
        node
        for i, name in enumerate(names)
        for node in (
            helper.make_node("MatMul", ["x" if i == 0 else f"t{i - 1}", name], [f"y{i}"], f"m{i}"),
            helper.make_node("Tanh", [f"y{i}"], [f"t{i}"], f"a{i}"),
        )
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [tokens, SIZE])
        for name in ("x", f"t{LAYERS - 1}")
    ]
    weights = [numpy_helper.from_array(np.ascontiguousarray(w.T), name) for name in names]
    graph = helper.make_graph(nodes, "stack", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def worth(target: str, *of_stack: int | str | None) -> Worth:
    """What a stack's layers may be in, and how fast."""
    context = Context(*resolve_target(target), FormatOptions())
    return worthwhile(import_onnx(stack(*of_stack)), context, ladder_of(context))


def rungs(target: str, *of_stack: int | str | None) -> list[str]:
    """What all layers of a stack may be in."""
    found = worth(target, *of_stack)
    assert len(found.rungs) == LAYERS
    [same] = {tuple(each) for each in found.rungs.values()}
    return list(same)


@pytest.mark.parametrize(
    ("target", "ladder"),
    [
        ("avx512-bf16", ["int8", "bf16", "fp16", "fp32"]),
        ("x86-64-v3", ["int8", "fp16", "fp32"]),
        ("x86-64-v2", ["int8", "fp32"]),
        ("cortex-a72", ["fp16", "fp32"]),
        ("neoverse-v1", ["int8", "bf16", "fp16", "fp32"]),
    ],
)
def test_a_ladder_holds_what_the_target_has(target, ladder):
    assert ladder_of(Context(*resolve_target(target), FormatOptions())) == ladder


@pytest.mark.parametrize(
    ("target", "of_stack", "expected"),
    [
        # One token reads the weight from memory: half the bytes, half the time.
        ("avx512-bf16", (1,), ["fp16", "fp32"]),
        ("x86-64-v3", (1,), ["fp16", "fp32"]),
        ("cortex-a72", (1,), ["fp16", "fp32"]),
        # Many multiply: arithmetic counts, and float32 is no slower than what it is stored in.
        ("avx512-bf16", (128,), ["int8", "bf16", "fp32"]),
        ("x86-64-v3", (128,), ["int8", "fp32"]),
        ("avx512-bf16", ("tokens",), ["int8", "bf16", "fp32"]),
        # Few single weights are left: whole words of int8 are mostly zeros.
        ("x86-64-v3", (128, "unstructured"), ["fp32"]),
        ("avx512-bf16", (128, "4x4"), ["int8", "bf16", "fp32"]),
    ],
)
def test_a_precision_is_worth_its_rounding_where_it_is_faster(target, of_stack, expected):
    assert rungs(target, *of_stack) == expected


@pytest.mark.parametrize(
    ("of_stack", "expected"),
    [(("tokens", "4x1"), [1, 4, 16]), (("tokens",), []), ((1, "4x1"), [])],
)
def test_sizes_are_told_of_which_float32_would_be_faster(of_stack, expected):
    found = worth("avx512-bf16", *of_stack)
    assert found.slower(dict.fromkeys(found.rungs, "int8")) == expected
    assert found.slower(dict.fromkeys(found.rungs, "fp32")) == []
    assert found.slower({}) == []


@pytest.mark.parametrize("target", ["avx512-bf16", "x86-64-v3"])
def test_auto_stores_in_float16_what_few_tokens_read(tmp_path, target, on_target):
    on_target(target)
    path = tmp_path / "stack.onnx"
    onnx.save(stack(1), path)
    artifact = tmp_path / "stack.so"
    manifest = sparse_tvm.compile(path, artifact, precision="auto", target=target).manifest
    assert {layer["precision"] for layer in manifest["layers"]} == {"float16"}
    assert manifest["verification"]["similarity"][f"t{LAYERS - 1}"]["cosine"] > 0.9999
    assert any("12 layers in fp16, for a cosine of 0.99" in note for note in manifest["notes"])
