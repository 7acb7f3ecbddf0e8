"""Records decide the layout of a layer, and the report says so."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from pretended import CSR, DENSE, layer_of, record, sparse_weight

from sparse_tvm import compile, load
from sparse_tvm.backends import resolve_target
from sparse_tvm.families import TYPICAL_TOKENS
from sparse_tvm.operators import Activation, Layout
from sparse_tvm.passes.formats import FormatOptions
from sparse_tvm.passes.layout_choice import choose
from sparse_tvm.sparsity.statistics import MeasuredWeight
from sparse_tvm.tuning.evidence import Evidence
from sparse_tvm.tuning.records import Records, append_record

BSR2 = Layout("matmul", "bsr", (2, 1))


def chosen(w, records, tokens=(128,), **options):
    known = Records()
    for one in records:
        known.add(one)
    parsed = FormatOptions.parse(**options)
    backend, target = resolve_target("native")
    weight = MeasuredWeight(w)
    return choose(layer_of(w), weight, parsed, backend, target, tokens, Evidence(known))


def test_what_was_measured_wins_over_what_is_predicted():
    w = sparse_weight(sparsity=0.98)
    assert chosen(w, []).layout.sparse
    choice = chosen(w, [record(w, DENSE, 1e-6), record(w, CSR, 2e-6)])
    assert (choice.layout, choice.basis) == (DENSE, "measured")
    assert "2.0x slower than dense (measured; predicted: " in choice.reason
    choice = chosen(w, [record(w, DENSE, 9e-6), record(w, CSR, 4e-6), record(w, BSR2, 3e-6)])
    assert choice.layout == BSR2
    assert choice.reason.startswith("3.0x faster than dense (measured; predicted: ")
    assert choice.times["measured"] == {"seconds": 3e-6, "dense_seconds": 9e-6}
    assert choice.times["predicted"]["seconds"] > 0
    assert (choice.times["tokens"], choice.times["threads"]) == (128, 1)


def test_what_is_chosen_anyway_stays_unless_another_is_certainly_faster():
    w = sparse_weight(sparsity=0.98)
    usual = chosen(w, []).layout
    dense, other = record(w, DENSE, 9e-6), replace(usual, parameters=(("group", 1),))
    records = [dense, record(w, usual, 1.01e-6), record(w, other, 1e-6)]
    assert chosen(w, records).layout == usual
    assert chosen(w, [dense, record(w, usual, 1.1e-6), record(w, other, 1e-6)]).layout == other


def test_weights_that_came_from_farther_away_say_nothing():
    w = sparse_weight()
    for copies, basis in ((48, "measured"), (49, "predicted")):  # the model has 12
        records = [record(w, layout, 1e-6, copies=copies) for layout in (DENSE, CSR)]
        assert chosen(w, records).basis == basis


def test_the_user_wins_over_what_was_measured():
    w = sparse_weight()
    records = [record(w, DENSE, 1e-6), record(w, CSR, 2e-6), record(w, BSR2, 3e-6)]
    assert chosen(w, records, format="bsr", block="2x1").layout == BSR2
    choice = chosen(w, records, format="csr")
    assert choice.layout.format == "csr"
    assert choice.reason.startswith("--format csr; 2.0x slower than dense (measured")
    assert not chosen(w, records, threshold=0.99).layout.sparse


def test_a_form_that_was_not_measured_is_predicted():
    w = sparse_weight()
    choice = chosen(w, [record(w, DENSE, 1e-6), record(w, CSR, 2e-6)], format="bsr", block="2x1")
    assert choice.layout.block == (2, 1)
    assert choice.basis == "predicted"


def test_only_dense_measured_says_nothing_about_sparse():
    w = sparse_weight(sparsity=0.98)
    assert chosen(w, [record(w, DENSE, 1e-9)]).basis == "predicted"


def test_the_fastest_dense_form_is_measured_too():
    w = sparse_weight(sparsity=0.0)
    wide = Layout("matmul", "dense", (16, 1))
    for fast, slow in ((wide, DENSE), (DENSE, wide)):
        choice = chosen(w, [record(w, fast, 1e-6), record(w, slow, 2e-6)])
        assert (choice.layout, choice.basis, choice.reason) == (fast, "measured", "no zeros")


def test_all_numbers_of_tokens_that_a_layer_may_see_count():
    w = sparse_weight()
    at_1 = [record(w, DENSE, 1e-6, 1), record(w, CSR, 9e-6, 1)]
    at_128 = [record(w, DENSE, 2e-6, 128), record(w, CSR, 1e-6, 128)]
    assert chosen(w, at_1 + at_128, (128,)).layout == CSR
    assert chosen(w, at_1 + at_128, (128, 1)).layout == DENSE
    slower = [record(w, DENSE, 1.0e-6, 1), record(w, CSR, 1.1e-6, 1)]
    choice = chosen(w, slower + at_128, (128, 1))  # 1.3 times as fast in the mean
    assert not choice.layout.sparse
    assert choice.reason.startswith("sparsity 90.0% does not pay at every size: ")
    much_faster = [record(w, DENSE, 2e-6, 128), record(w, CSR, 0.7e-6, 128)]
    choice = chosen(w, slower + much_faster, (128, 1))  # 1.6 times
    assert choice.layout == CSR
    assert choice.reason.endswith("; slower at 1 tokens")
    far_slower = [record(w, DENSE, 1e-6, 1), record(w, CSR, 2e-6, 1)]
    far_faster = [record(w, DENSE, 9e-6, 128), record(w, CSR, 1e-6, 128)]
    assert not chosen(w, far_slower + far_faster, (128, 1)).layout.sparse  # 2.1 times in the mean


def test_what_was_measured_at_some_numbers_is_joined_by_predictions_at_others():
    w = sparse_weight(768, 768, 0.7)
    records = [record(w, DENSE, 1e-3), record(w, CSR, 1e-6)]
    choice = chosen(w, records, (128, 1))
    assert (choice.layout, choice.basis) == (CSR, "measured")


def test_an_artifact_tells_what_decided(tmp_path, model):
    w, records = sparse_weight(), tmp_path / "records.jsonl"
    for tokens in TYPICAL_TOKENS:
        for layout, seconds in ((DENSE, 9e-6), (BSR2, 3e-6)):
            one = record(w, layout, seconds, tokens)
            op = one.problem.op.then(Activation("relu"))
            append_record(records, replace(one, problem=replace(one.problem, op=op)))
    with records.open("a") as file:
        file.write("not a record\n")
    result = compile(model, tmp_path / "model.so", records=[records])
    first, second = result.manifest["layers"]
    assert (first["format"], first["block"], first["basis"]) == ("bsr", [2, 1], "measured")
    assert first["times"]["measured"] == {"seconds": 3e-6, "dense_seconds": 9e-6}
    assert second["basis"] == "predicted"
    assert f"{records}:13: passed over: it is not JSON" in result.manifest["notes"]
    x = np.ones((3, 64), np.float32)
    assert load(tmp_path / "model.so").run({"x": x})["y"].shape == (3, 32)
