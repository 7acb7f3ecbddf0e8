from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sparse_tvm.errors import OptionError, OutputError
from sparse_tvm.report import check_report_path, write_report
from sparse_tvm.report.content import human_bytes, human_count, human_percent
from sparse_tvm.report.tables import fold_name, layer_table, print_summary


def sample_layer(name: str, sparsity: float, **changes: Any) -> dict[str, Any]:
    layer = {
        "name": name,
        "op": "MatMul",
        "shape": [3072, 768],
        "sparsity": sparsity,
        "nnz": round((1 - sparsity) * 3072 * 768),
        "structure": "4x1 blocks (fill 1.00)",
        "format": "bsr",
        "block": [4, 1],
        "kernel": "sparse_dense_bsr_4x1",
        "epilogue": ["bias", "gelu"],
        "reason": "predicted 0.31 ms, dense 2.05 ms",
        "bytes": 1_200_000,
    }
    return {**layer, **changes}


def sample_manifest(depth: int = 2) -> dict[str, Any]:
    layers = []
    for index in range(depth):
        prefix = f"bert.encoder.layer.{index}"
        layers += [
            sample_layer(f"{prefix}.attention.self.query", 0.9, shape=[768, 768]),
            sample_layer(f"{prefix}.intermediate.dense", 0.95, block=None, format="csr"),
        ]
    layers.append(
        sample_layer(
            "pooler|<dense>",
            0.0,
            block=None,
            format="dense",
            structure="dense",
            epilogue=[],
            reason="sparsity 0.000: every sparse format is predicted slower",
        )
    )
    return {
        "format_version": 1,
        "versions": {"sparse_tvm": "0.1.0", "tvm": "0.27.0.post1", "tvm_ffi": "0.1.14.post1"},
        "model": {"name": "bert_base", "source": "bert_base.onnx", "sha256": "0" * 64},
        "target": {
            "name": "native",
            "triple": "x86_64-linux-gnu",
            "cpu": "znver3",
            "features": ["avx2", "fma"],
            "vector_bits": 256,
        },
        "threads": 2,
        "inputs": [{"name": "input_ids", "dtype": "int64", "shape": [1, 128]}],
        "outputs": [{"name": "last_hidden_state", "dtype": "float32", "shape": [1, 128, 768]}],
        "layers": layers,
        "totals": {
            "parameters": 109_482_240,
            "nonzeros": 32_345_678,
            "weight_bytes": 143_000_000,
            "file_bytes": 145_200_000,
        },
        "compile": {
            "seconds": 41.25,
            "peak_memory_bytes": 2_100_000_000,
            "phases": [{"name": "read", "seconds": 0.8}, {"name": "build", "seconds": 21.5}],
        },
        "verification": {
            "reference": "ONNX Runtime 1.31.1",
            "tolerance": 1e-4,
            "max_abs_diff": {"last_hidden_state": 3.1e-6},
        },
        "weights": [],
        "kernels": {},
    }


class PageReader(HTMLParser):
    """Collects the text of each table row and every attribute that could load something."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[str] = []
        self.links: list[str | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append("")
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        if self.rows:
            self.rows[-1] += f" {data.strip()}"


def test_json_report_is_the_manifest(tmp_path: Path) -> None:
    manifest = sample_manifest()
    write_report(manifest, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == manifest


def test_markdown_report_says_what_each_layer_became(tmp_path: Path) -> None:
    write_report(sample_manifest(), tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# bert_base\n")
    assert "bsr 4x1" in text
    assert "3.1e-06 (tolerance 1e-04)" in text
    assert "pooler\\|\\<dense>" in text
    layer_lines = [line for line in text.splitlines() if "predicted" in line]
    assert len(layer_lines) == 5
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 9 for line in layer_lines)


def test_html_report_is_complete_and_needs_no_other_file(tmp_path: Path) -> None:
    write_report(sample_manifest(), tmp_path / "report.html")
    page = PageReader()
    page.feed((tmp_path / "report.html").read_text())
    assert not page.links
    layers = [row for row in page.rows if "predicted" in row]
    assert len(layers) == 5
    assert "bsr 4x1" in layers[0]
    assert "90.0 %" in layers[0]
    assert "pooler|<dense>" in layers[-1]
    assert any("last_hidden_state" in row and "3.1e-06" in row for row in page.rows)
    assert any("build" in row and "21.50 s" in row for row in page.rows)


def test_reports_say_when_nothing_was_verified(tmp_path: Path) -> None:
    manifest = {**sample_manifest(), "verification": None}
    for name in ("report.md", "report.html"):
        write_report(manifest, tmp_path / name)
        assert "Not verified" in (tmp_path / name).read_text()


@pytest.mark.parametrize("name", ["report.pdf", "report", "missing/report.md"])
def test_impossible_report_path_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(OptionError, match="report"):
        check_report_path(tmp_path / name)


def test_failed_report_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "report.md").mkdir()
    with pytest.raises(OutputError, match=r"report\.md"):
        write_report(sample_manifest(), tmp_path / "report.md")
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_tables_fit_the_console_and_keep_every_word(width: int) -> None:
    console = Console(width=width, file=StringIO())
    with console.capture() as capture:
        print_summary(console, sample_manifest(depth=12), Path("model.so"))
    text = capture.get()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert text.count("0.31") == 24
    assert layer_table(sample_manifest(depth=12)).row_count == 25


def test_long_names_break_at_their_parts() -> None:
    name = "bert.encoder.layer.11.attention.self.query"
    assert fold_name(name).split("\n") == ["bert.encoder.layer.11.", "attention.self.query"]
    assert fold_name("x" * 40) == "x" * 40


def test_human_numbers() -> None:
    assert human_bytes(0) == "0 B"
    assert human_bytes(999) == "999 B"
    assert human_bytes(145_200_000) == "145.2 MB"
    assert human_count(109_482_240) == "109.5 M"
    assert human_percent(0.9) == "90.0 %"
    assert human_percent(0.99996) == ">99.9 %"
    assert human_percent(1.0) == "100.0 %"
