"""Operators: what one writes into a module, the other reads back; equal ones compute the same."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, is_dataclass
from types import UnionType
from typing import ClassVar, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_tvm.backends import backends
from sparse_tvm.operators import (
    Activation,
    Bias,
    Clamp,
    Convolution,
    Dense,
    Layout,
    Operator,
    Residual,
    Step,
    Types,
    all_operators,
    from_json,
    to_json,
)

backends()  # have operators of their own
OPERATORS = pytest.mark.parametrize("cls", all_operators(), ids=lambda cls: cls.name)
PLAIN = {
    int: st.integers(-(2**40), 2**40),
    bool: st.booleans(),
    float: st.floats(allow_nan=False),
    str: st.text(),
}


def subclasses(cls: type) -> list[type]:
    return [found for sub in cls.__subclasses__() for found in (sub, *subclasses(sub))]


def values(hint: object) -> st.SearchStrategy:
    """Any values of an annotated type; a type that no strategy is known for fails the test."""
    if get_origin(hint) is tuple:
        *items, last = get_args(hint)
        if last is Ellipsis:
            return st.lists(values(items[0]), max_size=4).map(tuple)
        return st.tuples(*map(values, (*items, last)))
    if get_origin(hint) in (Union, UnionType):
        return st.one_of(*map(values, get_args(hint)))
    if hint is type(None):
        return st.none()
    if hint is Step:
        return st.one_of(*map(values, subclasses(Step)))
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        return st.builds(hint, **{field.name: values(hints[field.name]) for field in fields(hint)})
    return PLAIN[hint]


def through_text(op: Operator) -> Operator:
    return from_json(op.name, json.loads(json.dumps(to_json(op), sort_keys=True)))


@OPERATORS
@given(st.data())
def test_what_is_written_is_read_back(cls, data):
    op = data.draw(values(cls))
    again = through_text(op)
    assert type(again) is cls
    assert again == op
    assert hash(again) == hash(op)
    assert to_json(again) == to_json(op)


@OPERATORS
@given(st.data())
def test_different_operators_are_written_differently(cls, data):
    """Calls are told apart, and kernels shared, by this text."""
    a, b = data.draw(values(cls)), data.draw(values(cls))
    assert (json.dumps(to_json(a)) == json.dumps(to_json(b))) == (a == b)


def test_text_of_an_operator():
    op = Dense(
        layer="fc",
        matrix=(6, 8),
        epilogue=(Bias(), Activation("gelu"), Clamp(low=0.0), Residual()),
        layout=Layout("matmul", "bsr", (4, 1)).having(parts=3),
        types=Types(weight="int8"),
    )
    assert to_json(op) == {
        "layer": "fc",
        "matrix": [6, 8],
        "epilogue": [
            {"is": "bias"},
            {"is": "activation", "function": "gelu"},
            {"is": "clamp", "low": 0.0},
            {"is": "residual"},
        ],
        "layout": {
            "family": "matmul",
            "format": "bsr",
            "block": [4, 1],
            "parameters": [["parts", 3]],
        },
        "types": {"weight": "int8"},
    }
    assert through_text(op) == op


def test_defaults_are_left_out():
    assert to_json(Dense(layer="fc", matrix=(6, 8))) == {"layer": "fc", "matrix": [6, 8]}


def test_epilogue_grows_and_counts_what_it_reads():
    op = Dense(layer="fc", matrix=(6, 8)).then(Bias(), Activation("relu")).then(Residual())
    assert op.epilogue == (Bias(), Activation("relu"), Residual())
    assert op.extras == 2
    assert list(map(str, op.epilogue)) == ["bias", "relu", "residual"]


def test_bounds_are_named_in_reports():
    bounds = (Clamp(0.0, 6.0), Clamp(low=-1.5), Clamp(high=2.5))
    assert list(map(str, bounds)) == ["clamp(0, 6)", "clamp(-1.5, )", "clamp(, 2.5)"]


def test_titles_of_steps_are_names():
    steps = (Bias(), Activation("gelu_tanh"), Clamp(0.0, 6.0), Clamp(low=-1.5), Clamp(high=1e-9))
    titles = Dense(layer="fc", matrix=(6, 8), epilogue=steps).step_titles
    assert titles[:2] == ["bias", "gelu_tanh"]
    assert all(f"f_{title}".isidentifier() for title in titles)


def test_layout_that_was_not_chosen():
    with pytest.raises(ValueError, match="fc: how its weight is stored was not chosen yet"):
        _ = Dense(layer="fc", matrix=(6, 8)).stored


def test_parameters_of_a_layout():
    layout = Layout("matmul", "csr").having(parts=2, tile=5).having(parts=3)
    assert layout == Layout("matmul", "csr", parameters=(("parts", 3), ("tile", 5)))
    assert (layout.get("parts", 1), layout.get("unroll", 7)) == (3, 7)
    assert layout.sparse
    assert not Layout("matmul", "dense").sparse


@pytest.mark.parametrize(("groups", "depthwise"), [(1, False), (4, False), (8, True)])
def test_depthwise(groups, depthwise):
    op = Convolution(
        layer="conv",
        matrix=(8, 9 * 8 // groups),
        channels=8,
        out_channels=8,
        size=(5, 5),
        kernel=(3, 3),
        stride=(1, 1),
        dilation=(1, 1),
        pads=(0, 0, 0, 0),
        groups=groups,
    )
    assert op.depthwise is depthwise


def test_names_are_taken_once():
    with pytest.raises(ValueError, match="called 'dense' already"):

        @dataclass(frozen=True, kw_only=True)
        class AnotherDense(Operator):
            name: ClassVar[str] = "dense"

    with pytest.raises(ValueError, match="called 'bias' already"):

        @dataclass(frozen=True)
        class AnotherBias(Step):
            name: ClassVar[str] = "bias"

    assert type(from_json("dense", {"layer": "fc", "matrix": [1, 1]})) is Dense


def test_operator_that_nobody_knows():
    with pytest.raises(KeyError, match="no such"):
        from_json("no such", {})
