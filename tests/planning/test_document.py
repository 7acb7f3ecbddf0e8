"""Plans as files: read as written, and refused in one line where they are of no use."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import numpy_helper
from plannable import TARGET, small_bert

import sparse_tvm
from sparse_tvm.cli import main
from sparse_tvm.errors import OptionError
from sparse_tvm.frontends.onnx.weights import canonical, find_weights
from sparse_tvm.models.bert import BertConfig, build_bert
from sparse_tvm.planning.document import Plan, read_plan, write_plan
from sparse_tvm.planning.planner import plan
from sparse_tvm.sparsity.analysis import analyse

MODEL = small_bert()


@pytest.fixture(scope="module")
def planned() -> Plan:
    return plan(MODEL, speedup=1.5, target=TARGET, measure=False)


def test_a_plan_is_read_as_it_was_written(planned: Plan, tmp_path: Path) -> None:
    write_plan(planned, tmp_path / "plan.json")
    found = read_plan(tmp_path / "plan.json")
    assert found.as_json() == planned.as_json()
    assert found.settings == planned.settings
    found.check_model(find_weights(MODEL), "model")


def _without(*path: str) -> Callable[[Any], None]:
    def damage(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        del document[path[-1]]

    return damage


def _first_layer(**values: Any) -> Callable[[Any], None]:
    return lambda document: document["layers"][0].update(values)


DAMAGES: dict[str, Callable[[Any], None]] = {
    "has no 'layers'": _without("layers"),
    "has no 'seconds'": _without("totals", "seconds"),
    "it is of version 99": lambda document: document.update(version=99),
    "it is no plan": lambda document: document.update(kind="something else"),
    "has a sparsity of 1": _first_layer(sparsity=1.0),
    "has a sparsity of -0.5": _first_layer(sparsity=-0.5),
    "is 'most', not a number": _first_layer(sparsity="most"),
    "unknown structure '4by1'": _first_layer(structure="4by1"),
    "has the shape": _first_layer(shape=[1, 2, 3]),
    "is in it twice": lambda document: document["layers"].append(document["layers"][0]),
    "not one of latency, speedup, size": lambda document: document["goal"].update(what="luck"),
}


@pytest.mark.parametrize("says", DAMAGES)
def test_a_damaged_plan_is_refused(says: str, planned: Plan, tmp_path: Path) -> None:
    document = copy.deepcopy(planned.as_json())
    DAMAGES[says](document)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(document))
    with pytest.raises(OptionError, match=says) as error:
        read_plan(path)
    assert str(path) in error.value.message
    assert "\n" not in error.value.message


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_plan_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(OptionError, match=r"plan .*plan\.json"):
        read_plan(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="No such file"):
        read_plan(tmp_path / "nosuch.json")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (BertConfig(1, 256, 4, 1024, 500), "has no layer"),
        (BertConfig(2, 256, 4, 512, 500), "is 512x256, not 1024x256"),
        (BertConfig(3, 256, 4, 1024, 500), "has other layers"),
    ],
)
def test_a_plan_of_another_model_is_refused(planned: Plan, config: BertConfig, says: str) -> None:
    with pytest.raises(OptionError, match=f"the plan is of another model.*{says}"):
        planned.check_model(find_weights(build_bert(config)), "other.onnx")


def test_training_does_not_make_it_another_model(planned: Plan) -> None:
    other = build_bert(BertConfig(2, 256, 4, 1024, 500), seed=7)
    planned.check_model(find_weights(other), "trained.onnx")


def test_a_plan_without_a_precision_says_nothing_of_it(planned: Plan, tmp_path: Path) -> None:
    document = planned.as_json()
    assert document["conditions"].pop("precision") == "fp32"
    (tmp_path / "plan.json").write_text(json.dumps(document))
    found = read_plan(tmp_path / "plan.json")
    assert (found.precision, found.where) == (None, TARGET)


def test_a_plan_in_int8_is_compiled_as_planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, path, output = (tmp_path / name for name in ("model.onnx", "plan.json", "pruned.onnx"))
    onnx.save(MODEL, model)
    options = ["--speedup", "1.7", "--target", TARGET, "--precision", "int8", "--no-measure"]
    assert main(["plan", str(model), "-o", str(path), *options]) == 0
    assert "then: sparse-tvm compile pruned.onnx" in capsys.readouterr().out
    assert main(["prune", str(model), "-o", str(output), "--plan", str(path)]) == 0
    assert f"{TARGET} in int8" in capsys.readouterr().out
    found = read_plan(path)
    assert found.precision == "int8"
    compiled = sparse_tvm.preview(output, target=TARGET, precision=found.precision)
    layers = {layer["name"]: layer for layer in compiled["layers"]}
    for planned in found.layers:
        layer = layers[planned.name]
        assert layer["precision"] == "int8"
        if planned.setting.sparsity:
            assert layer["sparsity"] == pytest.approx(planned.setting.sparsity, abs=2e-3)
            assert "x".join(map(str, layer["block"])) == planned.setting.structure


def test_prune_follows_a_plan(planned: Plan, tmp_path: Path) -> None:
    model, path, output = (tmp_path / name for name in ("model.onnx", "plan.json", "pruned.onnx"))
    onnx.save(MODEL, model)
    write_plan(planned, path)
    assert main(["prune", str(model), "-o", str(output), "--plan", str(path)]) == 0
    pruned = onnx.load(output)
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in pruned.graph.initializer}
    found = {
        ref.layer: analyse(canonical(ref, tensors[ref.initializer])) for ref in find_weights(pruned)
    }
    assert planned.settings
    for layer in planned.layers:
        structure = found[layer.name]
        assert structure.sparsity == pytest.approx(layer.setting.sparsity, abs=2e-3)
        if layer.setting.structure in ("4x1", "16x1"):
            rows = int(layer.setting.structure.partition("x")[0])
            assert structure.blocks[rows, 1] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("config", "options", "says"),
    [
        (BertConfig(2, 256, 4, 512, 500), [], "the plan is of another model"),
        (BertConfig(2, 256, 4, 1024, 500), ["--sparsity", "0.9"], "no sparsity to choose"),
        (BertConfig(2, 256, 4, 1024, 500), ["--scope", "global"], "global"),
    ],
)
def test_what_a_plan_does_not_fit_is_not_pruned(
    planned: Plan,
    config: BertConfig,
    options: list[str],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, path = tmp_path / "model.onnx", tmp_path / "plan.json"
    onnx.save(build_bert(config), model)
    write_plan(planned, path)
    command = ["prune", str(model), "-o", str(tmp_path / "pruned.onnx"), "--plan", str(path)]
    assert main([*command, *options]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "pruned.onnx").exists()
