"""DenseToSparse: layers get the form chosen, and reports that say why."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import apply, build, calls, check_weights, context, operators
from tvm import relax

from sparse_tvm.operators import Dense, Layout
from sparse_tvm.passes.cpu.lane_layout import lane_layout
from sparse_tvm.passes.dense_to_sparse import dense_to_sparse
from sparse_tvm.passes.fc_transpose import fc_transpose
from sparse_tvm.passes.fuse_convolution import fuse_convolution
from sparse_tvm.passes.fuse_epilogue import fuse_epilogue
from sparse_tvm.passes.program import Program
from sparse_tvm.sparsity.analysis import analyse
from sparse_tvm.sparsity.masks import prune_array

OP = relax.op
PASSES = [fc_transpose, fuse_epilogue, fuse_convolution, dense_to_sparse]


def layers(emit, x, sparse, plain, b):
    y = emit(OP.nn.relu(emit(OP.add(emit(OP.matmul(x, sparse)), b))))
    return OP.matmul(y, plain)


def before(tokens="tokens", weights=None):
    subject = build(
        layers, {"x": (tokens, 64)}, {"sparse": (64, 64), "plain": (64, 64), "b": (64,)}
    )
    # Weights are stored [in, out] here: prune them as [out, in].
    subject.weights["sparse"] = prune_array(subject.weights["sparse"].T, 0.9, "4x1").T
    subject.weights.update(weights or {})
    return subject


def converted(subject: Program, *rules: str) -> Program:
    return apply(PASSES, subject, context(*rules, target="x86-64-v4"))


@pytest.mark.parametrize("tokens", [24, "tokens"])
def test_each_layer_gets_its_form(tokens):
    after = converted(before(tokens))
    check_weights(after)
    assert operators(after) == ["dense", "dense"]
    sparse, dense = calls(after, Dense)
    assert (sparse.op.layer, sparse.op.matrix) == ("sparse", (64, 64))
    assert list(map(str, sparse.op.epilogue)) == ["bias", "relu"]
    assert sparse.op.layout in [Layout("matmul", "bsr", block) for block in ((4, 1), (8, 1))]
    assert [arg.name for arg in sparse.args[1:]] == [
        "sparse_fc.data",
        "sparse_fc.indices",
        "sparse_fc.indptr",
        "sparse_fc.rows",
        "sparse_fc.partition",
        "b",
    ]
    assert [arg.name for arg in dense.args[1:]] == ["plain_fc.data"]
    assert (dense.op.layer, dense.op.stored.format) == ("plain", "dense")


def test_layers_in_tiles_keep_their_weights():
    after = apply(lane_layout, converted(before()))
    names = [name for name in operators(after) if name != "reshape"]
    assert names == ["lane_pack", "dense", "dense", "lane_unpack"]
    assert after.weights.keys() == converted(before()).weights.keys()


def test_dense_weights_leave_the_program():
    after = converted(before())
    assert set(after.weights) == {
        "b",
        "plain_fc.data",
        *(f"sparse_fc.{key}" for key in ("data", "indices", "indptr", "rows", "partition")),
    }


def test_reports():
    subject = before()
    after = converted(subject)
    assert list(after.reports) == ["sparse", "plain"]
    report = after.reports["sparse"]
    found = analyse(subject.weights["sparse"].T)
    assert (report.op, report.shape, report.format) == ("dense", (64, 64), "bsr")
    assert report.block in [(4, 1), (8, 1)]
    assert (report.nnz, report.sparsity, report.structure) == (
        found.nnz,
        found.sparsity,
        found.label,
    )
    assert report.epilogue == ("bias", "relu")
    assert "than dense (predicted)" in report.reason
    stored = [a.nbytes for name, a in after.weights.items() if name.startswith("sparse_fc.")]
    assert report.bytes == sum(stored)
    plain = after.reports["plain"]
    assert (plain.format, plain.block, plain.reason) == ("dense", None, "no zeros")


def test_reports_picture_where_the_zeros_of_sparse_weights_are():
    weight = np.ones((64, 64), np.float32)
    weight[:32] = 0  # of the inputs: weights are stored [in, out] here
    reports = converted(before(weights={"sparse": weight})).reports
    density = reports["sparse"].density
    assert density == ("00" * 12 + "ff" * 12,) * 24
    assert reports["sparse"].as_json()["density"] == list(density)
    assert "density" not in reports["plain"].as_json()


def test_rules_and_a_block_that_was_cut():
    after = converted(before(), "plain=bsr:32x1", "sparse=dense")
    assert after.reports["sparse"].format == "dense"
    assert after.reports["sparse"].reason == "rule sparse=dense"
    report = after.reports["plain"]
    assert (report.format, report.block) == ("bsr", (16, 1))
    assert report.reason.endswith("32x1 stored as 16x1")


def test_shared_weight_is_stored_once_and_each_use_reported():
    def body(emit, x, w):
        return OP.matmul(emit(OP.nn.relu(emit(OP.matmul(x, w)))), w)

    subject = build(body, {"x": ("tokens", 64)}, {"w": (64, 64)})
    subject.weights["w"] = prune_array(subject.weights["w"].T, 0.95, "4x1").T
    after = converted(subject)
    first, second = calls(after, Dense)
    assert [a.name for a in first.args[1:]] == [a.name for a in second.args[1:]]
    assert len(after.weights) == 5
    assert list(after.reports) == [first.op.layer, second.op.layer]
    stored, shared = after.reports.values()
    assert (stored.name, shared.name) == ("w", second.op.layer)
    assert stored.bytes == sum(array.nbytes for array in after.weights.values())
    assert shared.bytes == 0
    assert "shares" not in stored.reason
    assert shared.reason == f"{stored.reason}; shares the weight of w"
    assert (stored.epilogue, shared.epilogue) == (("relu",), ())
    for key in ("op", "shape", "sparsity", "nnz", "structure", "format", "block", "precision"):
        assert getattr(stored, key) == getattr(shared, key), key


def test_convolutions_of_images_of_two_sizes_store_one_weight_twice():
    """The arrays of a convolution's weight hold offsets into the image."""

    def body(emit, small, large, w):
        sums = [emit(OP.sum(emit(OP.nn.conv2d(image, w)))) for image in (small, large)]
        return OP.add(*sums)

    inputs = {"small": (1, 4, 6, 6), "large": (1, 4, 9, 9)}
    subject = build(body, inputs, {"w": (8, 4, 3, 3)})
    after = converted(subject)
    check_weights(after)
    small, large = after.reports.values()
    assert (small.op, large.op) == ("convolution", "convolution")
    assert small.bytes > 0
    assert large.bytes > 0
    assert small.bytes + large.bytes == sum(array.nbytes for array in after.weights.values())


def test_two_forms_of_one_weight_have_reports_of_their_own():
    def body(emit, x, w):
        return OP.matmul(emit(OP.matmul(x, w)), emit(OP.permute_dims(w)))

    subject = build(body, {"x": ("tokens", 64)}, {"w": (64, 64)})
    subject.weights["w"] = prune_array(subject.weights["w"], 0.95, "unstructured")
    after = converted(subject)
    assert len(after.reports) == 2
    assert {report.nnz for report in after.reports.values()} == {
        int(np.count_nonzero(subject.weights["w"]))
    }
