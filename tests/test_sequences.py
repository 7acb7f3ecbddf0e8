"""Sequences and optionals, of which nothing is left at run time."""

from __future__ import annotations

import numpy as np
import pytest
from onnx_models import assert_same_as_onnxruntime, build, calls, normal

from sparse_tvm.errors import ModelError
from sparse_tvm.frontends.importer.model import import_onnx

ONE, TWO = np.array(1), np.array(2)
GIVEN = "(float[n,4] a, float[n,4] b, float[n,4] c) => (float[rows,4] y)"


def test_elements_are_put_in_and_taken_out():
    graph = f"""{GIVEN} {{
        none = SequenceEmpty()
        of_a = SequenceInsert(none, a)
        of_ba = SequenceInsert(of_a, b, zero)
        of_bca = SequenceInsert(of_ba, c, last)
        of_bc = SequenceErase(of_bca)
        of_c = SequenceErase(of_bc, zero)
        of_cbca = SequenceConstruct(c, b, c, a)
        one = SequenceAt(of_c, last)
        other = SequenceAt(of_cbca, one_)
        both = SequenceConstruct(one, other, a)
        y = ConcatFromSequence<axis=0>(both)
    }}"""
    model = build(graph, zero=np.array(0), last=np.array(-1), one_=ONE)
    imported = assert_same_as_onnxruntime(model, sizes=({"n": 1}, {"n": 3}))
    assert calls(imported) == ["concat"]


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_sequences_are_stacked_and_counted(axis):
    graph = f"""(float[n,4] a, float[n,4] b) => (float[i,j,k] y, int64 count) {{
        both = SequenceConstruct(a, b, a)
        y = ConcatFromSequence<axis={axis}, new_axis=1>(both)
        count = SequenceLength(both)
    }}"""
    assert_same_as_onnxruntime(build(graph), sizes=({"n": 1}, {"n": 3}))


@pytest.mark.parametrize(
    ("split", "attributes", "at"),
    [
        (None, "axis=1", 3),
        (None, "axis=1, keepdims=0", -1),
        (np.array(2), "axis=1", 2),
        (np.array([1, 3, 1]), "axis=-1", 1),
        (np.array([5]), "axis=1, keepdims=0", 0),
    ],
)
def test_tensors_are_split(split, attributes, at):
    inputs = "x" if split is None else "x, split"
    rank = "n" if split is None and "keepdims" in attributes else "n,k"
    graph = f"""(float[n,5] x) => (float[{rank}] y, int64 count) {{
        parts = SplitToSequence<{attributes}>({inputs})
        y = SequenceAt(parts, at)
        count = SequenceLength(parts)
    }}"""
    tensors = {"at": np.array(at)} | ({} if split is None else {"split": split})
    assert_same_as_onnxruntime(build(graph, **tensors), sizes=({"n": 1}, {"n": 3}))


def test_a_loop_fills_a_sequence():
    graph = """(float[n,4] x) => (float[n,12] y) {
        none = SequenceEmpty()
        states, all = Loop(times, yes, x, none) <
            body = b (int64 i, bool go, float[n,4] s, seq(float[n,4]) before)
                => (bool on, float[n,4] t, seq(float[n,4]) behind) {
            on = Identity(go)
            p = MatMul(s, w)
            t = Tanh(p)
            behind = SequenceInsert(before, t)
        }>
        y = ConcatFromSequence<axis=1>(all)
    }"""
    model = build(graph, times=np.array(3), yes=np.array(True), w=normal(4, 4))
    assert_same_as_onnxruntime(model, sizes=({"n": 1}, {"n": 3}))


BRANCHES = """(float[n,4] x, bool which) => (float[n,4] y) {
    parts = If(which) <
        then_branch = t () => (seq(float[n,4]) yes) {
            d = Add(x, x)
            yes = SequenceConstruct(d, x)
        },
        else_branch = e () => (seq(float[n,4]) no) {
            s = Mul(x, x)
            no = SequenceConstruct(%s)
        }
    >
    y = SequenceAt(parts, zero)
}"""


def test_data_chooses_between_sequences():
    model = build(BRANCHES % "s, s", zero=np.array(0))
    assert_same_as_onnxruntime(model, sizes=({"n": 1}, {"n": 3}))


OPTIONAL = """(float[n,4] x) => (float[n,4] y, bool full, bool empty) {
    some = Optional(x)
    none = Optional<type=float[n,4]>()
    full = OptionalHasElement(some)
    empty = OptionalHasElement(none)
    y = OptionalGetElement(some)
}"""


def test_optionals():
    imported = import_onnx(build(OPTIONAL, opset=18))
    assert calls(imported) == []
    assert [output.dtype for output in imported.outputs] == ["float32", "bool", "bool"]


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (BRANCHES % "s, s, s", "how long a sequence is depends on data"),
        (
            "(float[n,4] x, int64 at) => (float[n,4] y) {"
            "s = SequenceConstruct(x, x) y = SequenceAt(s, at) }",
            "which element of the sequence it takes depends on data",
        ),
        (
            "(float[n,4] x) => (float[n,4] y) {"
            "s = SequenceConstruct(x, x) y = SequenceAt(s, two) }",
            "a sequence of 2 has no place 2",
        ),
        (
            "(float[n,4] x) => (float[m,4] y) { s = SplitToSequence(x) y = SequenceAt(s, two) }",
            "how many parts there are depends on sizes, which --input-shape fixes",
        ),
        (
            "(float[n,4] x, int64[2] split) => (float[m,4] y) {"
            "s = SplitToSequence(x, split) y = SequenceAt(s, zero) }",
            "the lengths of its parts depend on data",
        ),
        (
            "() => (float[m,4] y) { s = SequenceEmpty() y = ConcatFromSequence<axis=0>(s) }",
            "the sequence is empty",
        ),
        (
            "() => (float[m,4] y) { s = Optional<type=float[m,4]>() y = OptionalGetElement(s) }",
            "the optional has no element",
        ),
    ],
)
def test_what_depends_on_data_is_refused(graph, reason):
    with pytest.raises(ModelError, match=reason):
        import_onnx(build(graph, opset=18, zero=np.array(0), two=TWO))


def test_a_sequence_is_no_output():
    graph = "(float[n,4] x) => (seq(float[n,4]) s) { s = SequenceConstruct(x, x) }"
    with pytest.raises(ModelError, match="s is a sequence_type, not a tensor"):
        import_onnx(build(graph))
