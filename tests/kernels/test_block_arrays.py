"""The arrays that kernels read are the weight, and jobs have equally much to do."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_tvm.operators import Layout
from sparse_tvm.schedules.cpu.block_arrays import (
    JOBS_PER_GROUP,
    balanced_partition,
    sliced_arrays,
    split_arrays,
    stacked_rows,
    stored_arrays,
)


def rebuilt(arrays, shape, layout):
    """The weight as the kernel sees it: what each output adds up."""
    (n, k), (rows, columns) = shape, layout.block
    block_rows = -(-n // rows)
    w = np.zeros((block_rows * rows, k), "float64")
    if not layout.sparse:
        assert arrays["data"].shape == (block_rows, k, rows)
        return arrays["data"].transpose(0, 2, 1).reshape(-1, k)[:n]
    data, indices, indptr = (arrays[name] for name in ("data", "indices", "indptr"))
    assert data.shape[1:] == (columns, rows)
    assert indptr.shape == (block_rows + 1,)
    for block_row in range(block_rows):
        for at in range(indptr[block_row], indptr[block_row + 1]):
            first = indices[at]
            assert 0 <= first <= k - columns
            w[block_row * rows : (block_row + 1) * rows, first : first + columns] += data[at].T
    assert not w[n:].any()
    return w[:n]


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    block=st.tuples(st.integers(1, 16), st.integers(1, 8)),
    sparsity=st.sampled_from([0.0, 0.3, 0.8, 0.97, 1.0]),
    format=st.sampled_from(["dense", "csr", "bsr"]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=200)
def test_stored_arrays_are_the_weight(shape, block, sparsity, format, seed):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape).astype("float32") * (rng.random(shape) >= sparsity)
    rows, columns = min(block[0], shape[0]), min(block[1], shape[1])
    blocks = {"dense": (rows, 1), "csr": (1, 1), "bsr": (rows, columns)}
    layout = Layout("matmul", format, blocks[format])
    w = w.astype("float32")
    arrays = stored_arrays(w, layout)
    np.testing.assert_array_equal(rebuilt(arrays, shape, layout), w)
    assert all(array.flags.c_contiguous and array.size for array in arrays.values())
    if layout.sparse:
        assert {str(arrays[name].dtype) for name in ("indices", "indptr", "partition")} == {"int32"}
        assert arrays["partition"][-1] == len(arrays["indptr"]) - 1


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    block=st.tuples(st.integers(1, 8), st.integers(1, 4)),
    parts=st.integers(1, 6),
    sparsity=st.sampled_from([0.0, 0.3, 0.8, 0.97, 1.0]),
    together=st.sampled_from([1, 4]),
    abreast=st.sampled_from([1, 4]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=200)
def test_split_arrays_are_the_weight_in_order(
    shape, block, parts, sparsity, together, abreast, seed
):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape).astype("float32") * (rng.random(shape) >= sparsity)
    w = w.astype("float32")
    layout = Layout("matmul", "bsr", (min(block[0], shape[0]), min(block[1], shape[1])))
    layout = layout.having(parts=parts)
    arrays = split_arrays(w, layout, together, abreast)
    (n, k), (rows, columns) = shape, layout.block
    block_rows = -(-n // rows)
    indptr, partition = arrays["indptr"], arrays["partition"]
    order = arrays["rows"].reshape(parts, block_rows)
    counts = np.diff(indptr).reshape(parts, block_rows)
    assert not (counts % together).any()
    assert not (partition[:-1] % abreast).any()
    for part, first in product(range(parts), range(0, block_rows, abreast)):
        some = counts[part, first : first + abreast]
        short = len(some) < abreast
        assert len({*some}) == 1 or short or not all(some) or 4 * max(some) > 1.4 * sum(some)
    padded = np.zeros((block_rows * rows, k), "float64")
    for part, segment in np.ndindex(parts, block_rows):
        at = part * block_rows + segment
        first_row = order[part, segment] * rows
        for block_index in range(indptr[at], indptr[at + 1]):
            first = int(arrays["indices"][block_index])
            assert first * parts // k == part
            columns_of = slice(first, first + columns)
            padded[first_row : first_row + rows, columns_of] += arrays["data"][block_index].T
    np.testing.assert_array_equal(padded[:n], w)
    for start, stop in pairwise(partition):  # a job has the same rows in every part, few first
        for part in range(parts):
            assert sorted(order[part, start:stop]) == list(range(start, stop))
            assert np.all(np.diff(counts[part, start:stop]) >= 0)
    assert arrays["indices"].dtype == np.uint16
    assert all(array.flags.c_contiguous and array.size for array in arrays.values())


@given(
    stack=st.sampled_from([1, 3, 4]),
    shape=st.tuples(st.integers(1, 70), st.integers(16, 40)),
    format=st.sampled_from(["csr", "sell", "2x1", "3x2", "16x1"]),
    sparsity=st.sampled_from([0.0, 0.8, 1.0]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=100)
def test_a_job_has_the_same_rows_of_each_matrix_of_a_stack(stack, shape, format, sparsity, seed):
    rng = np.random.default_rng(seed)
    (n, k), abreast = shape, 4 if format == "csr" else 1
    w = rng.standard_normal((stack, n, k)) * (rng.random((stack, n, k)) >= sparsity)
    w = w.astype("float32")
    block = tuple(map(int, format.split("x"))) if "x" in format else (1, 1)
    layout = Layout("recurrent", format if block == (1, 1) else "bsr", block)
    if format == "sell":
        layout = layout.having(sell=16)
    arrays = split_arrays(w.reshape(-1, k), layout, abreast, abreast, stack)
    rows = stacked_rows(n, layout, abreast)
    assert n <= rows < n + 16
    if format == "sell":
        filled = np.pad(w, ((0, 0), (0, rows - n), (0, 0))).reshape(-1, k)
        expected = sliced_arrays(filled, layout, stack)
        assert all(np.array_equal(arrays[name], expected[name]) for name in expected)
        assert arrays["sliced_partition"][-1] == rows // 16
        return
    block_rows, partition = rows // block[0], arrays["partition"]
    assert partition[-1] == block_rows
    assert not (partition[:-1] * block[0] % 16).any()
    order = arrays["rows"].reshape(stack, block_rows)
    counts = np.diff(arrays["indptr"]).reshape(stack, block_rows)
    for matrix in range(stack):
        first = matrix * block_rows
        for start, stop in pairwise(partition):
            assert sorted(order[matrix, start:stop]) == list(range(first + start, first + stop))
            assert np.all(np.diff(counts[matrix, start:stop]) >= 0)


def test_one_long_row_does_not_make_its_neighbours_long():
    w = np.zeros((16, 64), "float32")
    w[::5, :] = 1
    w[1::5, :8] = 1
    layout = Layout("matmul", "csr", (1, 1))
    arrays = split_arrays(w, layout, 4, 4)
    assert len(arrays["indices"]) <= 1.4 * np.count_nonzero(w)


@given(
    counts=st.lists(st.integers(0, 50), min_size=1, max_size=300), jobs=st.sampled_from([1, 4, 16])
)
@settings(deadline=None)
def test_partition_is_complete_and_balanced(counts, jobs):
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype("int32")
    bounds = balanced_partition(indptr, jobs)
    assert bounds.shape == (jobs + 1,)
    assert bounds.dtype == np.int32
    assert (bounds[0], bounds[-1]) == (0, len(counts))
    assert np.all(np.diff(bounds) >= 0)
    work = [sum(counts[start:stop]) + 2 * (stop - start) for start, stop in pairwise(bounds)]
    assert sum(work) == sum(counts) + 2 * len(counts)
    assert max(work) <= sum(work) / jobs + max(counts) + 2


def test_partition_of_one_heavy_row():
    indptr = np.array([0, 0, 0, 1000, 1000], "int32")
    bounds = balanced_partition(indptr)
    assert len(bounds) == JOBS_PER_GROUP + 1
    assert (bounds[0], bounds[-1]) == (0, 4)
