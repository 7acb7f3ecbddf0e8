"""Fitting cost parameters to records, on records of which the parameters are known."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pretended import layer_of, record, sparse_weight

from sparse_tvm.cli import main
from sparse_tvm.errors import OptionError
from sparse_tvm.families import TYPICAL_TOKENS
from sparse_tvm.schedules.cpu.families.matmul import MatmulFamily
from sparse_tvm.sparsity.statistics import MeasuredWeight
from sparse_tvm.targets import get_target
from sparse_tvm.tuning.fitting import fit
from sparse_tvm.tuning.records import Records, append_record

TARGET = get_target("x86-64-v4")
FAMILY = MatmulFamily()


def records_of(costs, shapes=((256, 256), (768, 3072), (2048, 512))):
    """What a machine with these parameters would measure, if the model were right."""
    machine, found = replace(TARGET, costs=costs), Records()
    for shape in shapes:
        for sparsity in (0.5, 0.9):
            w = sparse_weight(*shape, sparsity)
            op, weight = layer_of(w), MeasuredWeight(w)
            for layout in FAMILY.candidates(op, weight, TARGET):
                for tokens in TYPICAL_TOKENS:
                    seconds = FAMILY.cost(op, layout, weight, tokens, machine)
                    found.add(record(w, layout, seconds, tokens, target=TARGET.name, copies=12))
    return found


def test_parameters_are_found_again():
    pytest.importorskip("scipy")
    truth = replace(TARGET.costs, fma=1.0, index=1.2, last=6.0, l2_line=2.0)
    (found,) = fit(records_of(truth))
    assert found.target == TARGET.name
    assert found.before.error > 0.2
    assert found.after.error < 0.02
    assert found.after.lost < 0.01
    for name in ("fma", "index", "last"):
        assert getattr(found.costs, name) == pytest.approx(getattr(truth, name), rel=0.15)
    assert found.costs.ghz == truth.ghz


def test_right_parameters_stay():
    pytest.importorskip("scipy")
    (found,) = fit(records_of(TARGET.costs))
    assert found.after.error < 0.005
    assert found.costs.fma == pytest.approx(TARGET.costs.fma, rel=0.02)


def test_an_entry_can_be_pasted_into_the_table(tmp_path, capsys):
    pytest.importorskip("scipy")
    path = tmp_path / "records.jsonl"
    path.write_text("damaged\n")
    for one in records_of(replace(TARGET.costs, fma=1.0), shapes=((256, 256),)):
        append_record(path, one)
    assert main(["tune", "--fit", str(path)]) == 0
    shown = capsys.readouterr()
    assert "median error" in shown.out
    entry = shown.out[shown.out.index("costs=Costs(") :]
    from sparse_tvm.targets import Costs

    costs = eval(entry.strip().removeprefix("costs=").removesuffix(","), {"Costs": Costs})
    assert costs.fma > TARGET.costs.fma
    assert f"{path}:1: passed over: it is not JSON" in shown.err


def test_too_few_records():
    w = sparse_weight()
    with pytest.raises(OptionError, match="0 records of kernels on one thread are too few"):
        fit(Records())
    few = Records()
    few.add(record(w, FAMILY.candidates(layer_of(w), MeasuredWeight(w), TARGET)[0], 1e-4))
    with pytest.raises(OptionError, match="1 records of kernels"):
        fit(few)


@pytest.mark.parametrize("arguments", [[], ["model.onnx", "--fit", "records.jsonl"]])
def test_a_model_or_records(capsys, arguments):
    assert main(["tune", *arguments]) == 2
    assert "either a MODEL or --fit FILE" in capsys.readouterr().err
