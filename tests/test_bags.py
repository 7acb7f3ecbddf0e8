"""Embedding bags: a loop over the rows of indices, as PyTorch's exporter writes it, is a sum."""

from __future__ import annotations

import numpy as np
import pytest
from onnx_models import assert_same_as_onnxruntime, build, normal

from sparse_tvm.errors import ModelError
from sparse_tvm.frontends.importer.model import import_onnx

COUNTED = """
    shape = Shape(x)
    elements = ReduceProd<keepdims=0>(shape)
    width = Gather<axis=0>(shape, one)
    integer = Cast<to=7>(width)
    begins = Range(zero, elements, integer)
"""


def bags(
    indices: str = "batch,size",
    reduce: str = "ReduceSum",
    *,
    begins: str = COUNTED,
    axis: int = 0,
    last: int = np.iinfo(np.int64).max,
    opset: int = 17,
    stored: list[int] | None = None,
):
    by_input = reduce == "ReduceSum" or opset >= 18
    axes, attribute = (", axis", "") if by_input else ("", f", axes=[{axis}]")
    graph = f"""(int64[{indices}] x) => (float[bags,12] y) {{
        flat = Reshape(x, minus)
        {begins}
        all = Shape(flat)
        offsets = Concat<axis=0>(begins, all)
        ends = Slice(offsets, ones, last, zeros, ones)
        counts = Shape(ends)
        count = Gather<axis=0>(counts, zero)
        y = Loop(count, true) <body = bag (int64 i, bool c) => (bool more, float[d] row) {{
            first = Gather<axis=0>(offsets, i)
            after = Gather<axis=0>(ends, i)
            from = Unsqueeze(first, zeros)
            to = Unsqueeze(after, zeros)
            of_bag = Slice(flat, from, to, zeros)
            rows = Gather<axis=0>(table, of_bag)
            row = {reduce}<keepdims=0{attribute}>(rows{axes})
            more = Cast<to=9>(true)
        }}>
    }}"""
    constants = {
        "minus": np.array([-1]),
        "zero": np.array(0),
        "one": np.array(1),
        "zeros": np.array([0]),
        "ones": np.array([1]),
        "last": np.array([last]),
        "true": np.array(True),
        "axis": np.array([axis]),
        "table": normal(20, 12),
    }
    if stored:
        constants["begins"] = np.array(stored)
    return build(graph, opset=opset, **constants)


@pytest.mark.parametrize("opset", [17, 18])
@pytest.mark.parametrize("reduce", ["ReduceSum", "ReduceMean", "ReduceMax"])
def test_bags_of_one_size(reduce, opset):
    model = bags(reduce=reduce, opset=opset)
    imported = assert_same_as_onnxruntime(
        model, sizes=[{"batch": 3, "size": 5}, {"batch": 1, "size": 9}]
    )
    assert imported.inputs[0].values == (0, 20)


def test_sizes_that_the_exporter_knew():
    assert_same_as_onnxruntime(bags("4,6", begins="", stored=[0, 6, 12, 18]))


@pytest.mark.parametrize(
    ("other", "batch"),
    [
        ({"indices": "4,6", "begins": "", "stored": [0, 5, 12, 18]}, {}),
        ({"indices": "4,6", "begins": "", "stored": [0, 6, 12]}, {}),
        ({"indices": "batch,6", "begins": "", "stored": [0, 6]}, {"batch": 2}),
    ],
    ids=["uneven", "fewer", "symbolic"],
)
def test_other_bags_that_the_exporter_knew_are_unrolled(other, batch):
    assert_same_as_onnxruntime(bags(**other), sizes=[batch])


@pytest.mark.parametrize(
    "other",
    [
        {"axis": 1},
        {"last": -1},
        {"begins": COUNTED.replace("Gather<axis=0>(shape, one)", "Gather<axis=0>(shape, zero)")},
        {"begins": COUNTED.replace("Range(zero", "Range(one")},
    ],
    ids=["axis", "last", "width", "start"],
)
def test_other_loops_are_refused(other):
    with pytest.raises(ModelError, match="Loop"):
        import_onnx(bags(**other))
