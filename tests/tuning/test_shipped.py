"""Records that come with the package are sound, and decide where a user has none."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from pretended import CSR, DENSE, NATIVE, layer_of, record, sparse_weight

from sparse_tvm.backends import resolve_target
from sparse_tvm.compiler import preview
from sparse_tvm.families import TYPICAL_TOKENS, WeightedFamily, Wish
from sparse_tvm.operators import Activation
from sparse_tvm.passes.formats import FormatOptions
from sparse_tvm.passes.layout_choice import choose
from sparse_tvm.sparsity.masks import prune_array
from sparse_tvm.sparsity.statistics import MeasuredWeight
from sparse_tvm.tuning import shipped
from sparse_tvm.tuning.evidence import Evidence
from sparse_tvm.tuning.records import Records, append_record, read_records

FILES = sorted(shipped._DIRECTORY.glob("*.jsonl"))


def records_of(*found):
    records = Records()
    for one in found:
        records.add(one)
    return records


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_are_of_this_version_and_their_layouts_exist(path):
    found = read_records([path])
    assert not found.remarks
    offered = {}
    for one in found:
        problem = one.problem
        backend, target = resolve_target(problem.target)
        case = problem, one.copies
        if case not in offered:
            w = np.random.default_rng(0).standard_normal(problem.op.matrix, np.float32)
            block = "unstructured" if problem.block is None else "{}x{}".format(*problem.block)
            weight = MeasuredWeight(prune_array(w, 1 - problem.density, block), one.copies)
            wish = Wish("dense") if problem.density == 1 else None
            offered[case] = {
                layout
                for family in backend.accepting(problem.op, target)
                if isinstance(family, WeightedFamily)
                for offers in (family.candidates, family.variants)
                for layout in offers(problem.op, weight, target, wish)
            }
        assert one.layout in offered[case], (one.problem, one.layout)
        assert one.seconds is not None


def test_they_decide_where_own_records_know_nothing():
    w = sparse_weight(sparsity=0.98)
    weight, (backend, target) = MeasuredWeight(w), resolve_target("native")
    theirs = records_of(record(w, DENSE, 1e-6), record(w, CSR, 2e-6))
    own = records_of(record(w, DENSE, 3e-6), record(w, CSR, 1e-6))

    def chosen(evidence):
        return choose(layer_of(w), weight, FormatOptions.parse(), backend, target, (128,), evidence)

    choice = chosen(Evidence(shipped=theirs))
    assert (choice.layout, choice.basis) == (DENSE, "measured")
    assert "2.0x slower than dense (measured by the package's records; predicted" in choice.reason
    choice = chosen(Evidence(own, shipped=theirs))
    assert choice.layout == CSR
    assert "3.0x faster than dense (measured; predicted" in choice.reason


def test_those_of_this_cpu_are_taken_unless_told_otherwise(tmp_path, model, monkeypatch):
    monkeypatch.setattr(shipped, "_DIRECTORY", tmp_path)
    w = sparse_weight()

    def basis(**options):
        return preview(model, **options)["layers"][0]["basis"]

    def ship(path, target):
        for tokens, layout in product(TYPICAL_TOKENS, (DENSE, CSR)):
            one = record(w, layout, 1e-6, tokens, target=target)
            op = one.problem.op.then(Activation("relu"))
            append_record(path, replace(one, problem=replace(one.problem, op=op)))

    ship(tmp_path / "another-cpu.jsonl", NATIVE)
    assert basis() == "predicted"
    assert basis(target=NATIVE) == "measured"  # by name: of any of its CPUs
    ship(shipped.shipped_file(), NATIVE)
    assert basis() == "measured"
    assert basis(shipped_records=False) == "predicted"


def test_those_of_another_version_are_left_out_silently(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "_DIRECTORY", tmp_path)
    append_record(shipped.shipped_file(), record(sparse_weight(), CSR, 1e-6, tvm="0.1"))
    found = shipped.shipped_records_of("native")
    assert len(found) == 0
    assert not found.remarks
