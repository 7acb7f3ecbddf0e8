"""Integer inputs are known to index tables of so many rows, whatever lies between."""

from __future__ import annotations

import numpy as np
import pytest
from onnx_models import build, normal

from sparse_tvm.frontends.importer.model import import_onnx
from sparse_tvm.models.bert import BertConfig, build_bert
from sparse_tvm.random_inputs import random_inputs
from sparse_tvm.spec import TensorSpec


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("i = Identity(ids)", (0, 40)),
        ("j = Cast<to=6>(ids)  i = Cast<to=7>(j)", (0, 40)),
        ("i = Add(ids, two)", (-2, 38)),
        ("i = Sub(ids, two)", (2, 42)),
        ("i = Mul(ids, two)", (0, 20)),
        ("n = Less(ids, zero)  w = Add(ids, rows)  i = Where(n, w, ids)", (0, 40)),
        ("m = Min(ids, rows)  i = Max(m, zero)", (0, 40)),
        ("f = Flatten(ids)  i = Unsqueeze(f, axes)", (0, 40)),
        ("other = Gather(small, ids)  i = Identity(ids)", (0, 8)),
        ("i = Mod(ids, rows)", None),
        ("s = ReduceSum(ids)  i = Add(s, zero)", None),
    ],
)
def test_indices_of_a_table(nodes, expected):
    graph = (
        f"(int64[2,n] ids) => (float[a,b,c,64] y, float[d,e,64] z) {{ {nodes}"
        + (
            "  y = Gather(table, i)  z = "
            + ("Identity(other)" if "other" in nodes else "Identity(f32)")
        )
        + " }"
    )
    model = build(
        graph,
        table=normal(40, 64),
        small=normal(8, 64),
        f32=normal(2, 3, 64),
        zero=np.array(0),
        two=np.array(2),
        rows=np.array(40),
        axes=np.array([0]),
    )
    [spec] = import_onnx(model).inputs
    assert spec.values == expected


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("same = Equal(column, row)", (-1, 6)),
        ("same = Equal(row, column)", (-1, 6)),
        ("wide = Expand(column, shape)  same = Equal(wide, row)", (-1, 6)),
        ("more = Add(column, one)  same = Equal(more, row)", (-2, 5)),
        ("same = Equal(column, one)", None),
        ("hot = OneHot(column, seven, values)  same = Cast<to=9>(hot)", (0, 7)),
    ],
)
def test_one_hot_encodings_tell_what_is_meant(nodes, expected):
    """Other values are allowed, and are no number of the row."""
    model = build(
        f"(int64[n,1] column) => (float y) {{ {nodes}"
        "  ones = Cast<to=1>(same)  y = ReduceSum<keepdims=0>(ones) }",
        row=np.array([[-1, 3, 5]]),
        shape=np.array([1, 3]),
        one=np.array(1),
        seven=np.array(7),
        values=np.array([0, 1]),
    )
    [spec] = import_onnx(model).inputs
    assert spec.values is None
    assert spec.typical == expected
    assert TensorSpec.from_json(spec.as_json()).typical == expected
    low, high = expected or (0, 2)
    drawn = random_inputs([spec], sizes={"n": 1000})["column"]
    assert (drawn.min(), drawn.max() + 1) == (low, high)


def test_positions_counted_from_a_mask_bound_the_sequence():
    """RoBERTa's positions: padding has its own, the others follow it."""
    graph = """(int64[batch,sequence] ids) => (float[batch,sequence,64] y) {
        pad = Equal(ids, one)
        real = Not(pad)
        count = Cast<to=7>(real)
        running = CumSum(count, one)
        masked = Mul(running, count)
        positions = Add(masked, one)
        y = Gather(table, positions)
    }"""
    imported = import_onnx(build(graph, one=np.array(1), table=normal(40, 64)))
    assert imported.bounds == {"sequence": (1, 38)}
    assert imported.inputs[0].values is None


def test_bert():
    config = BertConfig(layers=1, hidden=32, heads=2, intermediate=64, vocabulary=50)
    imported = import_onnx(build_bert(config, batch="batch", sequence="sequence"))
    assert {spec.name: spec.values for spec in imported.inputs} == {
        "input_ids": (0, 50),
        "attention_mask": None,
        "token_type_ids": (0, 2),
    }
    assert imported.bounds == {"sequence": (1, 512)}
