"""Which stored form a weight gets and why, and that the stored arrays are the weight."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_tvm.errors import OptionError
from sparse_tvm.passes.convert_weights import (
    FormatOptions,
    balanced_partition,
    choose,
    split_arrays,
    stored_arrays,
)
from sparse_tvm.schedules.cpu.matmul import JOBS_PER_GROUP, WeightLayout
from sparse_tvm.sparsity.analysis import analyse
from sparse_tvm.sparsity.pruning import prune_array
from sparse_tvm.targets import get_target

V4, V3 = get_target("x86-64-v4"), get_target("x86-64-v3")


def weight(shape, sparsity=0.0, structure="unstructured", seed=0):
    w = np.random.default_rng(seed).standard_normal(shape).astype("float32")
    return prune_array(w, sparsity, structure) if sparsity else w


def chosen(w, *rules, layer="encoder.fc", target=V4, format="auto", block=None, threshold=None):
    options = FormatOptions.parse(format, block, threshold, rules)
    return choose(layer, w, analyse(w), options, target)


def form(choice):
    return choice.layout.format, choice.layout.block


def test_auto_keeps_a_dense_weight_dense():
    choice = chosen(weight((256, 256)))
    assert choice.layout.format == "dense"
    assert choice.reason == "no zeros"


def test_auto_refuses_a_sparsity_that_does_not_pay():
    choice = chosen(weight((256, 256), 0.1))
    assert choice.layout.format == "dense"
    assert "does not pay" in choice.reason
    assert "10" in choice.reason.partition("%")[0]


@pytest.mark.parametrize("target", [V4, V3])
def test_auto_takes_the_block_of_a_structured_weight(target):
    choice = chosen(weight((256, 256), 0.9, "4x1"), target=target)
    format, (rows, columns) = form(choice)
    assert (format, 4 % rows, columns) == ("bsr", 0, 1)  # blocks without stored zeros
    assert rows == 4 or target is not V4
    assert "x dense" in choice.reason


def test_auto_makes_very_sparse_weights_sparse():
    assert chosen(weight((256, 256), 0.98)).layout.sparse
    assert chosen(np.zeros((64, 64), "float32")).layout.sparse


def test_auto_with_a_block_compares_it_with_dense():
    assert form(chosen(weight((256, 256), 0.9, "4x1"), block="4x1")) == ("bsr", (4, 1))
    assert chosen(weight((256, 256), 0.5), block="16x1").layout.format == "dense"


@pytest.mark.parametrize(
    ("format", "block", "expected"),
    [
        ("dense", None, "dense"),
        ("csr", None, ("csr", (1, 1))),
        ("bsr", "4x1", ("bsr", (4, 1))),
        ("bsr", "2x4", ("bsr", (2, 4))),
    ],
)
def test_format_of_all_layers(format, block, expected):
    choice = chosen(weight((64, 48), 0.5), format=format, block=block)
    assert choice.layout.format == expected if format == "dense" else form(choice) == expected
    assert f"--format {format}" in choice.reason


def test_threshold():
    w = weight((256, 256), 0.8, "4x1")
    below = chosen(w, threshold=0.85)
    assert below.layout.format == "dense"
    assert "below the threshold 0.85" in below.reason
    assert chosen(w, threshold=0.75).layout.format == "bsr"
    assert chosen(w, threshold=0.85, format="csr").layout.format == "dense"


def test_last_rule_that_matches_wins():
    w = weight((64, 64), 0.9)
    rules = ("fc=csr", r"encoder\..*=bsr:2x1", "decoder=dense")
    choice = chosen(w, *rules)
    assert form(choice) == ("bsr", (2, 1))
    assert r"rule encoder\..*=bsr:2x1" in choice.reason
    assert chosen(w, *rules, layer="x.fc").layout.format == "csr"
    assert chosen(w, *rules, layer="decoder.out").layout.format == "dense"


def test_rule_wins_over_threshold_and_format():
    w = weight((64, 64), 0.2)
    assert chosen(w, "fc=csr", threshold=0.9, format="dense").layout.format == "csr"


@pytest.mark.parametrize(
    ("asked", "stored"), [("32x1", (16, 1)), ("1x16", (1, 8)), ("6x1", (6, 1)), ("24x3", (12, 3))]
)
def test_block_is_cut_to_what_registers_hold(asked, stored):
    choice = chosen(weight((96, 96), 0.5), format="bsr", block=asked)
    assert form(choice) == ("bsr", stored)
    assert choice.asked_block == tuple(map(int, asked.split("x")))


@pytest.mark.parametrize("shape", [(1, 40), (3, 40), (40, 1), (1, 1)])
@pytest.mark.parametrize("format", ["auto", "csr", "bsr"])
def test_tiny_weights_have_every_format(shape, format):
    w = weight(shape)
    w.flat[::2] = 0
    choice = chosen(w, format=format)
    assert format in ("auto", choice.layout.format)
    rows, columns = choice.layout.block
    if choice.layout.sparse:
        assert rows <= shape[0]
        assert columns <= shape[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "coo"}, "unknown format 'coo'"),
        ({"format": "csr", "block": "4x1"}, "needs --format bsr"),
        ({"threshold": 1.5}, "not a share of zeros"),
        ({"block": "4"}, "not of the form RxC"),
        ({"rules": ("fc",)}, "is not REGEX=FORMAT"),
        ({"rules": ("fc=coo",)}, "is not REGEX=FORMAT"),
        ({"rules": ("fc=csr:4x1",)}, "is not REGEX=FORMAT"),
        ({"rules": ("fc=bsr:4",)}, "not of the form RxC"),
        ({"rules": ("(=csr",)}, "bad regular expression"),
    ],
)
def test_options_that_make_no_sense(options, message):
    values = {"format": "auto", "block": None, "threshold": None, "rules": (), **options}
    with pytest.raises(OptionError, match=message.replace("(", r"\(")):
        FormatOptions.parse(**values)


def test_rule_may_hold_an_equals_sign():
    (rule,) = FormatOptions.parse("auto", None, None, ["a=b=csr"]).rules
    assert (rule.pattern.pattern, rule.format) == ("a=b", "csr")


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
    layout = WeightLayout(
        format, {"dense": (rows, 1), "csr": (1, 1), "bsr": (rows, columns)}[format]
    )
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
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=200)
def test_split_arrays_are_the_weight_in_order(shape, block, parts, sparsity, seed):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape).astype("float32") * (rng.random(shape) >= sparsity)
    w = w.astype("float32")
    layout = WeightLayout("bsr", (min(block[0], shape[0]), min(block[1], shape[1])), parts)
    arrays = split_arrays(w, layout)
    (n, k), (rows, columns) = shape, layout.block
    block_rows = -(-n // rows)
    indptr, partition = arrays["indptr"], arrays["partition"]
    order = arrays["rows"].reshape(parts, block_rows)
    counts = np.diff(indptr).reshape(parts, block_rows)
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


def test_unstructured_weights_are_split_and_blocks_are_not():
    assert chosen(weight((768, 768), 0.9)).layout.parts > 1
    assert chosen(weight((768, 768), 0.9, "4x1")).layout.parts == 1
    assert chosen(weight((64, 64), 0.9)).layout.parts == 1  # X is in the first cache as it is


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
