"""What pruning would give: of a model, of a table, and on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from plannable import TARGET, small_bert

import sparse_tvm
from sparse_tvm.benchmark import bench
from sparse_tvm.cli import main
from sparse_tvm.errors import OptionError
from sparse_tvm.planning.document import read_plan
from sparse_tvm.planning.settings import Setting
from sparse_tvm.planning.what_if import ShapeRow, read_shapes, what_if

NINETY = Setting("4x1", 0.9)
PREDICTED = ["--target", TARGET, "--no-measure"]


def test_a_model_is_faster_the_more_is_pruned() -> None:
    found = [
        what_if(small_bert(), Setting("4x1", share), target=TARGET, measure=False)
        for share in (0.5, 0.8, 0.95)
    ]
    seconds = [one.seconds for one in found]
    assert sorted(seconds, reverse=True) == seconds
    assert seconds[0] <= found[0].dense_seconds
    assert len({one.dense_seconds for one in found}) == 1
    assert found[0].nbytes > found[-1].nbytes


def test_a_table_counts_its_layers() -> None:
    one, twelve = (
        what_if([ShapeRow(768, 3072, 128, count)], NINETY, target=TARGET, measure=False)
        for count in (1, 12)
    )
    assert twelve.seconds == pytest.approx(12 * one.seconds)
    assert twelve.nbytes == pytest.approx(12 * one.nbytes)
    assert one.rest_seconds is None
    (row,) = one.rows
    assert row.shape == (3072, 768)
    assert row.format == "bsr"


def test_a_table_of_many_large_layers_needs_little_memory() -> None:
    rows = [ShapeRow(2048, 8192, 16, 64), ShapeRow(2048, 2048, 16, 256)]
    found = what_if(rows, NINETY, target=TARGET, measure=False)
    assert [row.count for row in found.rows] == [64, 256]
    assert found.dense_bytes > 8e9


def test_rows_of_one_shape_stay_apart() -> None:
    rows = [ShapeRow(256, 256, 32), ShapeRow(256, 256, 32, 3)]
    first, second = what_if(rows, NINETY, target=TARGET, measure=False).rows
    assert second.seconds == pytest.approx(3 * first.seconds)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("shapes.csv", "in,out,tokens,count\n768,3072,128,12\n64,64,1,1\n"),
        ("shapes.csv", "count,tokens,out,in\n12, 128,3072,768\n1,1,64,64\n"),
        (
            "shapes.json",
            '[{"in": 768, "out": 3072, "tokens": 128, "count": 12},'
            ' {"in": 64, "out": 64, "tokens": 1}]',
        ),
    ],
)
def test_tables_are_read(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    assert read_shapes(path) == [ShapeRow(768, 3072, 128, 12), ShapeRow(64, 64, 1, 1)]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("shapes.csv", "", "no rows"),
        ("shapes.csv", "in,out,count\n1,2,3\n", "row 1 has no 'tokens'"),
        ("shapes.csv", "in,out,tokens\n8,8,8\n8,x,8\n", "row 2: out is 'x'"),
        ("shapes.csv", "in,out,tokens\n8,0,8\n", "row 1: out is '0'"),
        ("shapes.csv", "in,out,tokens\n8,-1,8\n", "row 1: out is '-1'"),
        ("shapes.csv", "in,out,tokens\n8,8\n", "row 1: tokens is 'None'"),
        ("shapes.json", "{", "neither CSV nor JSON"),
        ("shapes.json", "[1]", "row 1 has no 'in'"),
        ("shapes.json", '[{"in": 1.5, "out": 1, "tokens": 1}]', "row 1: in is '1.5'"),
        ("shapes.csv", "in,out,tokens\n8,8,99999999999999999999\n", "row 1: tokens"),
    ],
)
def test_wrong_tables_are_refused(name: str, content: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(OptionError, match=says):
        read_shapes(path)


def test_the_verb_plans_and_asks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, output = tmp_path / "model.onnx", tmp_path / "plan.json"
    page, figure = tmp_path / "plan.html", tmp_path / "plan.svg"
    onnx.save(small_bert(), model)
    command = ["plan", str(model), "--speedup", "1.5x", "-o", str(output), *PREDICTED]
    for report in (page, figure):
        assert main([*command, "--report", str(report)]) == 0
    printed = capsys.readouterr().out
    assert "this plan" in printed
    assert f"--plan {output}" in printed
    assert read_plan(output).dense_seconds / read_plan(output).seconds >= 1.5
    assert "<svg" in page.read_text()
    assert page.read_text().count('class="layer"') == len(read_plan(output).layers)
    assert figure.read_text().startswith("<svg")

    assert main(["plan", str(model), "--what-if", "90%:4x1", *PREDICTED]) == 0
    assert "90%:4x1 in all layers" in capsys.readouterr().out
    shapes = tmp_path / "shapes.json"
    shapes.write_text(json.dumps([{"in": 64, "out": 256, "tokens": 32, "count": 2}]))
    assert main(["plan", "--shapes", str(shapes), "--what-if", "90%:4x1", *PREDICTED]) == 0
    assert "256x64" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("model.onnx -o plan.json", "takes one goal"),
        ("model.onnx --latency 5ms --size 1MB -o plan.json", "not latency and size"),
        ("model.onnx --latency 5 -o plan.json", "not a positive number with a unit"),
        ("model.onnx --latency 0ms -o plan.json", "not a positive number"),
        ("model.onnx --speedup -2 -o plan.json", ""),
        ("model.onnx --latency 5ms", "needs a file to write"),
        ("--latency 5ms -o plan.json", "either a MODEL or --shapes"),
        ("--shapes shapes.csv --latency 5ms -o plan.json", "has no weights"),
        ("nosuch.onnx --latency 5ms -o plan.json", "no such file"),
        ("model.onnx --latency 5ms -o nosuch/plan.json", "cannot write"),
        ("model.onnx --latency 5ms -o plan.json --report plan.pdf", "unknown format"),
    ],
)
def test_wrong_arguments_leave_nothing_behind(
    arguments: str,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(small_bert(), "model.onnx")
    assert main(["plan", *arguments.split()]) in (1, 2)
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_measured_plans_hold(tmp_path: Path) -> None:
    """The whole way, on this machine: loosely, as other tests may run beside."""
    model = small_bert(layers=1)
    found = what_if(model, NINETY, threads=1)
    assert found.basis == "measured"
    pruned, artifact = tmp_path / "pruned.onnx", tmp_path / "model.so"
    onnx.save(model, tmp_path / "model.onnx")
    sparse_tvm.prune(tmp_path / "model.onnx", pruned, sparsity=0.9, structure="4x1")
    sparse_tvm.compile(pruned, artifact, verify=False)
    seconds = bench(artifact, threads=1, warmup=0.1, duration=0.5).model.p50
    assert found.seconds == pytest.approx(seconds, rel=1.0)
    assert 0 < found.rest_seconds < found.seconds  # type: ignore[operator]
    assert found.seconds < found.dense_seconds
