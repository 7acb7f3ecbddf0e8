"""Masks and positions that exporters compute by gathering at indices need no gathers."""

from __future__ import annotations

import numpy as np
import pytest
from onnx_models import assert_same_as_onnxruntime, build, calls, normal

from sparse_tvm.frontends.importer.model import import_onnx

SIZES = ({"batch": 1, "sequence": 7}, {"batch": 3, "sequence": 12}, {"batch": 2, "sequence": 1})

CONSTANTS = {
    "zero": np.array(0),
    "one": np.array(1),
    "first": np.array([0]),
    "second": np.array([1]),
    "last": np.array([-1]),
    "after": np.array([1, 2, 3]),
    "row_axes": np.array([0, 1, 3]),
    "column_axes": np.array([0, 1, 2]),
    "keep": np.float32(0),
    "drop": np.float32(-1e9),
}

INDICES = """
    shape = Shape(m)
    b = Gather(shape, zero)
    s = Gather(shape, one)
    count_b = Range(zero, b, one)
    count_s = Range(zero, s, one)
    i_b = Unsqueeze(count_b, after)
    i_row = Unsqueeze(count_s, row_axes)
    i_column = Unsqueeze(count_s, column_axes)
    m_bool = Cast<to=9>(m)
"""

STACKED = """
    grid = Max(i_b, i_column)
    grid_shape = Shape(grid)
    e_b = Expand(i_b, grid_shape)
    e_column = Expand(i_column, grid_shape)
    u_b = Unsqueeze(e_b, last)
    u_column = Unsqueeze(e_column, last)
    at = Concat<axis=-1>(u_b, u_column)
"""


def check(outputs: str, nodes: str, expected: list[str], sizes=SIZES, **tensors):
    graph = f"(int64[batch,sequence] m) => ({outputs}) {{ {INDICES} {nodes} }}"
    tensors = {**CONSTANTS, **tensors}
    imported = assert_same_as_onnxruntime(build(graph, **tensors), sizes=sizes)
    assert sorted(calls(imported)) == sorted(expected)
    return imported


def test_mask_gathered_at_batch_and_key_as_the_dynamo_exporter_does():
    nodes = f"""{STACKED}
        seen = GatherND(m_bool, at)
        y = Where(seen, keep, drop)
    """
    check("float[batch,1,1,sequence] y", nodes, ["astype", "reshape", "where"])


def test_mask_gathered_from_flat_as_the_torchscript_exporter_does():
    nodes = """
        flat = Flatten<axis=2>(m_bool)
        offset = Mul(i_b, s)
        at = Add(i_column, offset)
        gathered = Gather<axis=0>(flat, at)
        at_shape = Shape(at)
        rows = Reshape(gathered, last)
        seen = Reshape(rows, at_shape)
        always = GreaterOrEqual(i_row, zero)
        allowed = And(always, seen)
        y = Where(allowed, keep, drop)
    """
    expected = ["astype", "reshape", "where", "broadcast_to"]
    check("float[batch,1,sequence,sequence] y", nodes, expected)


def test_mask_along_other_axes():
    nodes = f"""{STACKED.replace("i_column", "i_row")}
        y = GatherND(m_bool, at)
        flipped = Concat<axis=-1>(u_column, u_b)
        z = GatherND(f, flipped)
    """
    graph = f"""(int64[n,n] m, float[n,n] f) => (bool[n,1,n,1] y, float[n,1,n,1] z) {{
        {INDICES} {nodes}
    }}"""
    imported = assert_same_as_onnxruntime(build(graph, **CONSTANTS), sizes=[{"n": 3}, {"n": 1}])
    assert sorted(calls(imported)) == ["astype", "permute_dims", "reshape", "reshape"]


def test_sequences_without_a_mask_are_not_packed(capfd):
    """GPT-2 looks for positions that do not follow each other; here all do."""
    nodes = """
        positions = Unsqueeze(count_s, first)
        b1 = Unsqueeze(b, first)
        s1 = Unsqueeze(s, first)
        rows = Concat<axis=0>(b1, second)
        spread = Expand(positions, rows)
        start = Slice(spread, first, second, second)
        before = Sub(start, one)
        padded = Concat<axis=1>(before, spread)
        left = Slice(padded, first, s1, last)
        s2 = Add(s1, second)
        right = Slice(padded, second, s2, last)
        step = Sub(right, left)
        follows = Equal(step, one)
        breaks = Not(follows)
        counted = Cast<to=7>(breaks)
        sequence_number = CumSum(counted, last)
        same = Equal(sequence_number, zero)
        causal = LessOrEqual(i_column, i_row)
        wide = Unsqueeze(same, second2)
        allowed = And(wide, causal)
        y = Where(allowed, keep, drop)
    """
    expected = ["arange", "reshape", "reshape", "less_equal", "where", "broadcast_to"]
    check("float[batch,1,sequence,sequence] y", nodes, expected, second2=np.array([1, 2]))
    fixed = build(
        f"(int64[2,8] m) => (float[2,1,8,8] y) {{ {INDICES} {nodes} }}",
        **CONSTANTS,
        second2=np.array([1, 2]),
    )
    assert calls(import_onnx(fixed)) == []
    assert capfd.readouterr() == ("", "")


def test_token_types_gathered_from_a_table_of_zeros():
    nodes = """
        b1 = Unsqueeze(b, first)
        rows = Concat<axis=0>(b1, width)
        wide = Expand(table, rows)
        types = GatherElements<axis=1>(wide, m)
        y = Gather(weights, types)
    """
    check(
        "float[batch,sequence,64] y",
        nodes,
        ["strided_slice", "reshape", "broadcast_to"],
        table=np.zeros((1, 20), np.int64),
        width=np.array([20]),
        weights=normal(2, 64),
    )


def test_positions_are_rows_of_the_table():
    nodes = """
        two = Identity(one)
        s3 = Add(s, two)
        s1 = Unsqueeze(s, first)
        ids = Slice(table, first, s1, second)
        y = Gather(weights, ids)
        beyond = Range(two, s3, one)
        z = Gather(weights, beyond)
    """
    imported = check(
        "float[1,sequence,64] y, float[sequence,64] z",
        nodes,
        ["strided_slice", "strided_slice", "reshape"],
        table=np.arange(30)[None],
        weights=normal(20, 64),
    )
    assert imported.bounds == {"sequence": (1, 19)}


def test_a_slice_of_a_lower_triangle_is_a_comparison():
    nodes = """
        s1 = Unsqueeze(s, first)
        start = Sub(s1, s1)
        rows = Slice(table, start, s1, first)
        corner = Slice(rows, first, s1, last)
        y = Where(corner, keep, drop)
    """
    expected = ["arange", "reshape", "reshape", "less_equal", "where"]
    table = np.tril(np.ones((20, 20), bool))
    imported = check("float[sequence,sequence] y", nodes, expected, table=table)
    assert imported.bounds == {"sequence": (1, 20)}


@pytest.mark.parametrize("index", ["Add(i_column, one)", "Mul(i_column, i_column)"])
def test_other_indices_are_gathered(index):
    nodes = f"other = {index}  y = Gather<axis=0>(weights, other)"
    imported = assert_same_as_onnxruntime(
        build(
            f"(int64[batch,sequence] m) => (float[1,1,1,sequence,4] y) {{ {INDICES} {nodes} }}",
            **CONSTANTS,
            weights=normal(145, 4),
        ),
        sizes=SIZES,
    )
    assert ("take" in calls(imported)) == index.startswith("Mul")


def test_masks_that_are_always_true_vanish():
    nodes = """
        always = GreaterOrEqual(i_row, zero)
        never = Less(i_row, zero)
        wide = Unsqueeze(m_bool, one_two)
        some = Or(never, wide)
        y = And(always, some)
    """
    expected = ["astype", "expand_dims", "broadcast_to"]
    check("bool[batch,1,sequence,sequence] y", nodes, expected, one_two=np.array([1, 2]))
