"""Structures that are chosen by layer, at one sparsity: ``prune --structure auto``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from plannable import SMALL, TARGET, small_bert

from sparse_tvm.cli import main
from sparse_tvm.errors import SparseTvmError
from sparse_tvm.frontends.onnx.detach import as_array
from sparse_tvm.frontends.onnx.weights import canonical, find_weights, replace_data, stored
from sparse_tvm.models.bert import build_bert
from sparse_tvm.planning.planner import open_subject
from sparse_tvm.planning.structures import StructureChoice, choose_structures
from sparse_tvm.sparsity.analysis import analyse
from sparse_tvm.sparsity.blocks import parse_block
from sparse_tvm.sparsity.formats import occupied_blocks
from sparse_tvm.sparsity.pattern import Goal
from sparse_tvm.sparsity.pruning import PruneReport, prune

MODEL = small_bert(layers=1)


def choice(sparsity: float, model: onnx.ModelProto = MODEL, **options: object) -> StructureChoice:
    return choose_structures(model, sparsity, target=TARGET, threads=1, **options)


def pruned(tmp_path: Path, **options: object) -> PruneReport:
    wanted = {"sparsity": 0.9, "structure": "auto", "target": TARGET, "threads": 1, **options}
    return prune(MODEL, tmp_path / "pruned.onnx", **wanted)


def matrices(path: Path) -> dict[str, np.ndarray]:
    model = onnx.load(path)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    return {
        ref.layer: canonical(ref, as_array(tensors[ref.initializer])) for ref in find_weights(model)
    }


def in_blocks_of_16(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with all energy of every weight in a tenth of its 16x1 blocks."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    tensors = {tensor.name: tensor for tensor in changed.graph.initializer}
    rng = np.random.default_rng(0)
    for ref in find_weights(changed):
        tensor = tensors[ref.initializer]
        w = 1e-4 * rng.standard_normal(ref.shape, np.float32)
        large = rng.random((-(-ref.shape[0] // 16), ref.shape[1])) < 0.1
        w[np.repeat(large, 16, axis=0)[: ref.shape[0]]] *= 1e4
        replace_data(tensor, stored(ref, w, tuple(tensor.dims)))
    return changed


@pytest.mark.parametrize(
    ("target", "precision", "compared"),
    [
        (TARGET, None, {"unstructured", "4x1", "16x1"}),
        (TARGET, "fp16", {"unstructured", "4x1", "16x1"}),
        (TARGET, "int8", {"unstructured", "1x4", "4x4"}),
        ("avx512-bf16", "bf16", {"unstructured", "1x2", "4x2"}),
        ("sapphirerapids", "int8", {"unstructured", "1x4", "4x4", "16x4", "32x4", "16x64"}),
        ("sapphirerapids", "bf16", {"unstructured", "16x2", "32x2", "16x32"}),
        ("neoverse-v1", "int8", {"unstructured", "1x4", "4x4", "4x8"}),
        ("neoverse-v1", "bf16", {"unstructured", "1x2", "4x2", "4x4"}),
        ("cuda-sm90", None, {"unstructured", "16x16", "32x32", "64x64"}),
    ],
)
def test_what_kernels_skip_depends_on_target_and_precision(
    target: str, precision: str | None, compared: set[str]
) -> None:
    subject = open_subject(
        MODEL, target=target, precision=precision, tokens=128, threads=1, input_shapes={}
    )
    assert set(subject.structures) == compared


def test_int8_is_pruned_in_words() -> None:
    found = choice(0.9, precision="int8")
    assert found.precision == "int8"
    chosen = {one.candidates[0].setting.structure for one in found.layers if one.candidates}
    assert chosen
    assert chosen <= {"1x4", "4x4"}


def test_the_best_of_time_and_norm_comes_first() -> None:
    found = choice(0.9)
    assert found.basis == "predicted"
    assert found.seconds < found.dense_seconds
    for layer in found.layers:
        structures = {one.setting.structure for one in layer.candidates}
        assert structures == {"unstructured", "4x1", "16x1"}
        assert all(one.faster > 1 and 0 < one.kept < 1 for one in layer.candidates)
        merits = [one.faster * one.kept for one in layer.candidates]
        assert merits == sorted(merits, reverse=True)
        kept = {one.setting.structure: one.kept for one in layer.candidates}
        assert kept["unstructured"] > kept["4x1"] > kept["16x1"]
        assert found.goals[layer.name] == Goal.parse(layer.candidates[0].setting.structure, 0.9)


def test_weights_that_are_in_blocks_are_pruned_in_blocks() -> None:
    found = choice(0.9, in_blocks_of_16(MODEL))
    for layer in found.layers:
        kept = {one.setting.structure: one.kept for one in layer.candidates}
        assert kept["16x1"] > 0.9 * kept["unstructured"]
        assert layer.candidates[0].setting.structure != "unstructured"


def test_two_of_four_is_compared_where_half_is_to_go() -> None:
    halves = {one.setting.structure for layer in choice(0.5).layers for one in layer.candidates}
    assert "2:4" in halves
    more = {one.setting.structure for layer in choice(0.6).layers for one in layer.candidates}
    assert "2:4" not in more


def test_on_a_gpu_its_own_structures_are_compared(tmp_path: Path) -> None:
    model = build_bert(replace(SMALL, layers=1, hidden=768, heads=12, intermediate=3072), batch=16)
    found = choose_structures(model, 0.75, target="cuda-sm90", threads=8)
    assert (found.target, found.basis, found.threads) == ("cuda-sm90", "predicted", None)
    assert 0 < found.seconds < found.dense_seconds
    blocks = {"16x16", "32x32", "64x64"}
    for layer in found.layers:
        assert layer.candidates[0].setting.structure in blocks
        assert all(one.faster > 1 for one in layer.candidates)
        assert {one.setting.structure for one in layer.candidates} <= blocks | {"unstructured"}
    half = choose_structures(model, 0.5, target="cuda-sm90")
    assert "2:4" in {one.setting.structure for layer in half.layers for one in layer.candidates}
    options = {"sparsity": 0.75, "structure": "auto", "target": "cuda-sm90"}
    report = prune(model, tmp_path / "pruned.onnx", **options)
    chosen = {layer.name: layer.candidates[0].setting.structure for layer in found.layers}
    assert [layer.name for layer in report.layers] == list(chosen)
    assert all(abs(layer.after - 0.75) < 0.01 for layer in report.layers)
    for name, w in matrices(tmp_path / "pruned.onnx").items():
        blocks = occupied_blocks(w != 0, parse_block(chosen[name]))
        assert abs(1 - blocks.mean() - 0.75) < 0.01


def test_a_gpu_that_few_zeros_leave_dense(tmp_path: Path) -> None:
    with pytest.raises(SparseTvmError, match="makes it no faster on cuda-sm90"):
        prune(MODEL, tmp_path / "y.onnx", sparsity=0.05, structure="auto", target="cuda-sm90")


def test_prune_follows_the_choice(tmp_path: Path) -> None:
    report = pruned(tmp_path, exclude="output")
    assert report.structures is not None
    goals = report.structures.goals
    assert goals
    assert goals == choice(0.9, exclude="output").goals
    for name, w in matrices(report.output).items():
        if name in goals:
            structure = analyse(w)
            assert structure.sparsity == pytest.approx(0.9, abs=0.01)
            assert (structure.block or (1, 1)) == goals[name].pattern.block
        else:
            assert "output" in name
            assert np.count_nonzero(w) == w.size


def test_it_goes_with_calibration_data(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {value.name: value for value in MODEL.graph.input}
    data = {
        name: rng.integers(0, 2, (64, *[d.dim_value for d in value.type.tensor_type.shape.dim][1:]))
        for name, value in shapes.items()
    }
    report = pruned(tmp_path, method="obs", calibrate=data)
    assert report.structures is not None
    assert {layer.name for layer in report.layers} == set(report.structures.goals)
    assert all(layer.error is not None for layer in report.layers)


def test_what_no_structure_makes_faster_is_left(tmp_path: Path) -> None:
    with pytest.raises(SparseTvmError, match="faster"):
        pruned(tmp_path, sparsity=0.01)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sparsity": None}, "needs a sparsity between 0 and 1"),
        ({"sparsity": 0.0}, "between 0 and 1, not 0.0"),
        ({"sparsity": 1.5}, "between 0 and 1, not 1.5"),
        ({"scope": "global"}, "does not fit structure auto"),
        ({"structure": "4x1"}, "target is for structure auto"),
        ({"structure": "4x1", "target": None, "tokens": 64}, "tokens is for structure auto"),
        ({"structure": "4x1", "target": None, "measure": True}, "measure is for structure auto"),
        ({"target": "armv8-a", "measure": True}, "cannot be measured"),
        ({"target": "z80"}, "z80"),
        ({"threads": 0}, "threads must be at least 1"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, object], said: str) -> None:
    with pytest.raises(SparseTvmError, match=said):
        pruned(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, output = tmp_path / "model.onnx", tmp_path / "pruned.onnx"
    onnx.save(MODEL, model)
    command = f"prune {model} -o {output} --structure auto --target {TARGET} --threads 1"
    assert main([*command.split(), "--sparsity", "0.9"]) == 0
    said = capsys.readouterr().out
    assert "rather than" in said
    assert f"predicted, {TARGET} in fp32, 1 thread" in said
    assert main(command.split()) != 0
    assert "needs a sparsity" in capsys.readouterr().err
    assert main([*command.split(), "--sparsity", "0.9", "--target", "z80"]) != 0
    assert "unknown target" in capsys.readouterr().err


def test_the_command_prunes_for_a_precision(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, output = tmp_path / "model.onnx", tmp_path / "pruned.onnx"
    onnx.save(MODEL, model)
    command = f"prune {model} -o {output} --structure auto --target {TARGET} --threads 1"
    assert main([*command.split(), "--sparsity", "0.9", "--precision", "int8"]) == 0
    assert f"predicted, {TARGET} in int8" in capsys.readouterr().out
    assert main([*command.split(), "--sparsity", "0.9", "--precision", "int3"]) == 2
    assert "unknown precision 'int3'" in capsys.readouterr().err
    fixed = command.replace("auto", "4x1").split()
    assert main([*fixed, "--sparsity", "0.9", "--precision", "int8"]) == 2
