"""Plans: goals, what cannot be reached, and that uniform sparsity is never better."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from plannable import SMALL, TARGET, small_bert

import sparse_tvm
from sparse_tvm.errors import InputError, ModelError, OptionError
from sparse_tvm.planning.calibration import input_products
from sparse_tvm.planning.document import Plan
from sparse_tvm.planning.planner import Planner, open_subject, plan
from sparse_tvm.planning.prediction import predict
from sparse_tvm.planning.report import doubt, uniform_error
from sparse_tvm.planning.sensitivity import measured_errors
from sparse_tvm.planning.settings import DENSE, Setting
from sparse_tvm.reference import Reference
from sparse_tvm.sparsity.layer_inputs import find_inputs

STRUCTURES = ("unstructured", "4x1", "16x1")

MODEL = small_bert()


@pytest.fixture(scope="module")
def planner() -> Planner:
    subject = open_subject(MODEL, target=TARGET, tokens=128, threads=1, input_shapes={})
    return Planner(predict(subject, STRUCTURES, measure=False), STRUCTURES)


def recomputed(planner: Planner, found: Plan) -> tuple[float, float]:
    return planner.prediction.seconds(found.settings), planner.error(found.settings)


@pytest.mark.parametrize("speedup", [1.2, 1.5, 2.0, 2.5, 3.0])
def test_a_plan_keeps_the_goal_and_beats_uniform_sparsity(planner: Planner, speedup: float) -> None:
    found = planner.plan("speedup", speedup)
    assert found.dense_seconds / found.seconds >= speedup
    assert (found.seconds, found.error) == pytest.approx(recomputed(planner, found))
    uniform = uniform_error(found)
    assert uniform is not None
    assert found.error < uniform[1]
    for structure in STRUCTURES:
        alike = planner.uniform_for(structure, found.seconds)
        if alike is not None:
            assert found.error < planner.error(planner.prediction.uniform(alike))


def test_latency_and_speedup_are_the_same_goal(planner: Planner) -> None:
    by_speedup = planner.plan("speedup", 2.0)
    by_latency = planner.plan("latency", by_speedup.dense_seconds / 2)
    assert by_latency.settings == by_speedup.settings


def test_a_size_is_kept(planner: Planner, tmp_path: Path) -> None:
    dense = round(planner.prediction.nbytes({}))
    found = planner.plan("size", 0.4 * dense)
    assert found.nbytes <= 0.4 * dense
    assert found.dense_bytes == dense
    assert found.settings


def test_bytes_are_those_of_an_artifact(planner: Planner, tmp_path: Path) -> None:
    subject = planner.prediction.subject
    for wanted in (1.0, 2.5):
        found = planner.plan("speedup", wanted)
        made = sparse_tvm.compile(
            subject.pruned(found.settings), tmp_path / "model.so", target=TARGET, verify=False
        )
        # Planned for 128 tokens, compiled for any: some layers are stored once more for few tokens.
        assert made.manifest["totals"]["weight_bytes"] == pytest.approx(found.nbytes, rel=0.05)


def test_what_needs_no_pruning_is_left_alone(planner: Planner) -> None:
    found = planner.plan("latency", 1.0)
    assert not found.settings
    assert found.error == 0
    assert all(layer.setting == DENSE for layer in found.layers)


@pytest.mark.parametrize(
    ("goal", "value", "says"),
    [
        ("latency", 1e-6, "a latency of 0.001 ms is out of reach: the dense rest .* takes"),
        ("speedup", 1000.0, "a speed-up of 1000 is out of reach"),
        ("size", 1000.0, "a size of 0.001 MB is out of reach: embeddings"),
    ],
)
def test_what_cannot_be_reached_is_explained(
    planner: Planner, goal: str, value: float, says: str
) -> None:
    with pytest.raises(OptionError, match=says) as error:
        planner.plan(goal, value)
    hint = error.value.hint or ""
    assert "can be reached" in hint
    option, amount = hint.split()[:2]
    number = float(amount.rstrip("msMB"))
    factor = {"--latency": 1e-3, "--size": 1e6, "--speedup": 1.0}[option]
    assert planner.plan(goal, factor * number).settings


def test_only_the_layers_that_are_chosen_are_planned() -> None:
    found = plan(MODEL, speedup=1.1, target=TARGET, measure=False, layers="intermediate")
    assert found.layers
    assert all("intermediate" in layer.name for layer in found.layers)
    others = plan(MODEL, speedup=1.1, target=TARGET, measure=False, exclude="intermediate")
    assert not any("intermediate" in layer.name for layer in others.layers)


def test_open_shapes_are_those_of_so_many_tokens() -> None:
    model = small_bert(sequence="sequence")
    few, many = (
        plan(model, speedup=1.1, target=TARGET, measure=False, tokens=tokens)
        for tokens in (32, 256)
    )
    assert few.inputs["input_ids"] == (1, 32)
    assert many.dense_seconds > 4 * few.dense_seconds


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"latency": 1.0, "speedup": 2.0},
        {"speedup": 0.0},
        {"speedup": float("nan")},
        {"speedup": 2.0, "structures": ["5"]},
        {"speedup": 2.0, "layers": "("},
        {"speedup": 2.0, "layers": "nosuch"},
        {"speedup": 2.0, "threads": 0},
        {"speedup": 2.0, "target": "nosuch"},
        {"speedup": 2.0, "target": "neoverse-n1", "measure": True},
    ],
)
def test_wrong_options_are_refused(options: dict) -> None:
    with pytest.raises(OptionError):
        plan(MODEL, **{"target": TARGET, "measure": False, **options})


def test_a_model_without_layers_is_refused() -> None:
    from onnx_models import build

    model = build("(float[2,3] x) => (float[2,3] y) { y = Relu(x) }")
    with pytest.raises(ModelError, match="no layer to prune"):
        plan(model, speedup=2.0, target=TARGET, measure=False)


def test_predictions_follow_trials() -> None:
    """Measured layers: a kind that takes three times as long as predicted is planned so."""
    from sparse_tvm.planning import prediction
    from sparse_tvm.planning.trials import Trial, trial_settings

    subject = open_subject(MODEL, target=TARGET, tokens=128, threads=1, input_shapes={})
    plain = predict(subject, STRUCTURES, measure=False)
    trials = []
    for settings in trial_settings(subject, STRUCTURES):
        layers = {
            layer.name: 3 * plain.costs.seconds(layer, settings[layer.name])
            for layer in subject.layers
        }
        formats = {
            layer.name: plain.costs.choice(layer.kinds[0], settings[layer.name]).layout.format
            for layer in subject.layers
        }
        trials.append(Trial(settings, formats, layers, 0.4, sum(layers.values()) + 0.5))
    found = prediction.from_trials(subject, trials, STRUCTURES, 1)
    assert found.rest_seconds == pytest.approx(0.5)
    assert found.worst_error == pytest.approx(0, abs=1e-9)
    for layer in subject.layers:
        tried, beyond = (found.costs.seconds(layer, Setting("4x1", s)) for s in (0.97, 0.995))
        assert beyond == tried
    measured = Planner(found, STRUCTURES).plan("latency", 1.0)
    assert measured.basis == "measured"
    assert doubt(measured) is None
    assert doubt(replace(measured, worst_trial=0.3)) is not None
    for settings in trial_settings(subject, ["4x1"]):
        layers = 3 * (plain.seconds(settings) - plain.rest_seconds)
        assert found.seconds(settings) == pytest.approx(layers + 0.5)


def test_errors_are_measured_on_calibration_data(planner: Planner) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, SMALL.vocabulary, (8, 64))
    data = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
    }
    subject = planner.prediction.subject
    refs = [layer.ref for layer in subject.layers]
    products = dict(input_products(subject.model, refs, data))
    assert set(products) == {ref.layer for ref in refs}
    query = next(ref for ref in refs if "query" in ref.layer)
    tensor = find_inputs(subject.model, [query])[0][query.layer].tensor
    told = onnx.ModelProto()
    told.CopyFrom(subject.model)
    told.graph.output.append(onnx.helper.make_empty_tensor_value_info(tensor))
    reference = Reference(told.SerializeToString(), threads=1)
    feeds = ({name: array[i : i + 1] for name, array in data.items()} for i in range(len(ids)))
    rows = np.concatenate([reference.run(feed)[tensor][0] for feed in feeds])
    expected = np.cov(rows, rowvar=False, bias=True)  # the layer has a bias
    np.testing.assert_allclose(products[query.layer], expected, atol=1e-5)
    calibrated = plan(MODEL, speedup=1.5, target=TARGET, measure=False, calibrate=data)
    assert calibrated.error != planner.plan("speedup", 1.5).error
    for one in calibrated.layers:
        weight = subject.matrix(next(each for each in subject.layers if each.name == one.name))
        errors = measured_errors(weight, [one.setting], products[one.name])
        assert one.error == pytest.approx(errors[one.setting], rel=1e-4)


def test_calibration_data_of_another_model_are_refused() -> None:
    with pytest.raises(InputError, match="input_ids"):
        plan(MODEL, speedup=1.5, target=TARGET, measure=False, calibrate={"x": np.zeros(3)})
