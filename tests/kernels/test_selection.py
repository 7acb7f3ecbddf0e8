"""Kernels whose results are as long as the data wants them, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from harness import FORMS, KERNELS, compiled, targets
from hypothesis import given
from hypothesis import strategies as st

from sparse_tvm.schedules.cpu.lane_tiles import symbol
from sparse_tvm.schedules.cpu.selection import select_nonzero, suppress_boxes, unique_rows
from sparse_tvm.schedules.cpu.top_k import top_k

seeds = st.integers(0, 2**32 - 1)


def called(kernel, target, arguments, results):
    """The results, of these shapes and types, of which the last counts the rows of the first."""
    outputs = [np.full(shape, -7, dtype) for shape, dtype in results]
    tensors = [tvm.runtime.tensor(array) for array in (*arguments, *outputs)]
    compiled(kernel, target)["kernel"](*tensors)
    return [tensor.numpy() for tensor in tensors[len(arguments) :]]


def extents(shape, symbolic):
    return [symbol(f"size_{axis}") if symbolic else size for axis, size in enumerate(shape)]


@KERNELS
@given(
    targets,
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.booleans(),
    st.sampled_from(["bool", "float32", "int64", "uint8"]),
    seeds,
)
def test_select_nonzero(target, shape, symbolic, dtype, seed):
    x = np.random.default_rng(seed).integers(-1, 2, shape).astype(dtype)
    kernel = select_nonzero(extents(shape, symbolic), dtype)
    results = [((x.size,), "int64"), ((1,), "int64")]
    positions, [count] = called(kernel, target, [x], results)
    np.testing.assert_array_equal(positions[:count], np.flatnonzero(x))


def overlaps(a, b, most):
    shared = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    if (shared <= 0).any():
        return False
    areas = [np.prod(box[2:] - box[:2], dtype=np.float32) for box in (a, b)]
    area = np.prod(shared, dtype=np.float32)
    return area / (areas[0] + areas[1] - area) > most


def suppressed(boxes, scores, limit, overlap, least):
    kept = []
    for image, kind in np.ndindex(scores.shape[:2]):
        own, taken = scores[image, kind], []
        for box in np.argsort(-own, kind="stable"):
            others = (boxes[image, other] for other in taken)
            better = any(overlaps(boxes[image, box], other, overlap) for other in others)
            if own[box] > least and len(taken) < limit and not better:
                taken.append(box)
        kept += [(image, kind, box) for box in taken]
    return np.array(kept, np.int64).reshape(-1, 3)


@KERNELS
@given(
    targets,
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 60)),
    st.booleans(),
    st.booleans(),
    st.integers(0, 70),
    seeds,
)
def test_suppress_boxes(target, shape, symbolic, centred, limit, seed):
    rng = np.random.default_rng(seed)
    batch, _, rows = shape
    corners = rng.integers(0, 12, (batch, rows, 2, 2)).astype("float32")  # with equal ones
    low, high = corners.min(2), corners.max(2)
    mixed = np.where(rng.random(low.shape) < 0.5, [low, high], [high, low])
    boxes = np.concatenate([(low + high) / 2, high - low] if centred else list(mixed), -1)
    scores = (rng.integers(0, 20, shape) / 20).astype("float32")
    kernel = suppress_boxes(*extents(shape, symbolic), 5 if limit < 5 else rows, centred)
    room = np.prod(shape[:2]) * (5 if limit < 5 else rows)
    parameters = [np.array([limit]), np.float32([0.3]), np.float32([0.25])]
    results = [((room, 3), "int64"), ((1,), "int64")]
    kept, [count] = called(kernel, target, [boxes.astype("float32"), scores, *parameters], results)
    expected = suppressed(np.concatenate([low, high], -1), scores, limit, 0.3, 0.25)
    np.testing.assert_array_equal(kept[:count], expected)


@KERNELS
@given(
    targets,
    st.tuples(st.integers(1, 70), st.integers(1, 3)),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["float32", "int64", "uint8"]),
    seeds,
)
def test_unique_rows(target, shape, symbolic, ascending, dtype, seed):
    x = np.random.default_rng(seed).integers(0, 4, shape).astype(dtype)
    kernel = unique_rows(*extents(shape, symbolic), dtype, ascending)
    results = [((shape[0],), "int64")] * 3 + [((1,), "int64")]
    first, inverse, counts, [count] = called(kernel, target, [x], results)
    expected = np.unique(x, True, True, True, axis=0)
    order = np.arange(count) if ascending else np.argsort(expected[1])
    np.testing.assert_array_equal(x[first[:count]], expected[0][order])
    np.testing.assert_array_equal(first[:count], expected[1][order])
    np.testing.assert_array_equal(inverse, np.argsort(order)[expected[2].ravel()])
    np.testing.assert_array_equal(counts[:count], expected[3][order])


@pytest.mark.parametrize("target", FORMS, ids=lambda target: target.name)
@pytest.mark.parametrize("count", [0, 1, 5, 9])
def test_how_many_are_the_largest_is_known_by_the_result(target, count):
    x = np.random.default_rng(count).standard_normal((4, 9, 2)).astype("float32")
    kernel = top_k([4, symbol("rows"), 2], 1, symbol("count"), True, "float32", "int64")
    shape = (4, count, 2)
    values, places = called(kernel, target, [x], [(shape, "float32"), (shape, "int64")])
    expected = np.argsort(-x, 1, kind="stable")[:, :count]
    np.testing.assert_array_equal(places, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(x, expected, 1))
