"""Our operators in a Relax module: what is written is found again, and nothing else is."""

from __future__ import annotations

import pytest
import tvm
from helpers import build
from tvm import relax

from sparse_tvm.operators import (
    Activation,
    Attention,
    Bias,
    Dense,
    LayerNorm,
    Operator,
    Types,
    WeightedOperator,
)
from sparse_tvm.passes import dialect

LAYER = Dense(layer='a "quoted"\\name', matrix=(6, 8), epilogue=(Bias(), Activation("gelu")))
NORM = LayerNorm(epsilon=1e-12)


def body(emit, x, w, b, gamma, beta):
    y = emit(dialect.call(LAYER, [x, w, b], (5, 6)))
    y = emit(relax.op.nn.relu(y))
    return dialect.call(NORM, [y, gamma, beta], (5, 6))


def program():
    weights = {"w": (6, 8), "b": (6,), "gamma": (6,), "beta": (6,)}
    return build(body, {"x": (5, 8)}, weights)


def values(subject):
    return [b.value for block in subject.module["main"].body.blocks for b in block.bindings]


def test_calls_are_read_as_they_were_written():
    layer, norm = dialect.calls(program(), Operator)
    assert (layer.op, norm.op) == (LAYER, NORM)
    assert [arg.name for arg in layer.args] == ["x", "w", "b"]
    assert [arg.name for arg in norm.args[1:]] == ["gamma", "beta"]


def test_calls_of_a_kind():
    assert [found.op for found in dialect.calls(program(), WeightedOperator)] == [LAYER]
    assert [found.op for found in dialect.calls(program(), LayerNorm)] == [NORM]
    assert list(dialect.calls(program(), Attention)) == []


def test_other_calls_are_not_ours():
    of_others = relax.call_dps_packed(
        "other.dense", (relax.const(1.0),), relax.TensorType((5, 6), "float32")
    )
    found = values(build(lambda emit, x: relax.op.nn.relu(x), {"x": (5, 8)}))
    for value in (of_others, relax.const(1.0), *found):
        assert dialect.match(value, Operator) is None


def test_output_has_the_type_that_the_operator_says():
    op = LayerNorm(epsilon=1e-5, types=Types(output="bfloat16"))
    call = dialect.call(op, [relax.const(1.0)], (2, 3))
    assert str(call.ty_args[0].dtype) == "bfloat16"
    assert [int(n) for n in call.ty_args[0].shape] == [2, 3]


def test_operator_of_no_known_name_is_an_error():
    text = tvm.ir.StringImm("{}")
    call = relax.call_dps_packed(
        "sparse_tvm.unheard_of", relax.Tuple([text]), relax.TensorType((5,), "float32")
    )
    with pytest.raises(KeyError, match="unheard_of"):
        dialect.match(call, Operator)


def test_names_in_messages():
    assert list(dialect.described(dialect.calls(program(), Operator))) == [
        f"dense {LAYER.layer}",
        "layer_norm",
    ]
