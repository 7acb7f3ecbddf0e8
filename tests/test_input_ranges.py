"""Integer inputs are known to index tables of so many rows, whatever lies between."""

from __future__ import annotations

import numpy as np
import pytest
from onnx_models import build, normal

from sparse_tvm.frontends.importer.model import import_onnx
from sparse_tvm.models.bert import BertConfig, build_bert


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
