from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from sample_manifest import sample_layer, sample_manifest

from sparse_tvm.cli.console import stdout_console
from sparse_tvm.errors import OptionError, OutputError
from sparse_tvm.report import check_report_path, write_report
from sparse_tvm.report.content import (
    human_bytes,
    human_count,
    human_percent,
    human_threads,
    nothing_sparse,
    target_name,
)
from sparse_tvm.report.groups import common_prefix, grouped
from sparse_tvm.report.tables import fold_name, layer_table, print_summary
from sparse_tvm.targets import get_target
from sparse_tvm.targets.cuda import CUDA_TARGETS


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
    assert text.startswith("# bert\\_base\n")
    assert "bsr 4x1" in text
    assert "3.1e-06 (tolerance 1e-04)" in text
    assert "pooler\\|\\<dense>" in text
    layer_lines = [
        line for line in text.splitlines() if line.startswith("| ") and "predicted" in line
    ]
    assert len(layer_lines) == 5
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 9 for line in layer_lines)


def test_html_report_is_complete_and_needs_no_other_file(tmp_path: Path) -> None:
    manifest = sample_manifest()
    for layer in manifest["layers"]:
        layer.pop("times", None)
    write_report(manifest, tmp_path / "report.html")
    page = PageReader()
    page.feed((tmp_path / "report.html").read_text())
    assert not page.links
    layers = [row for row in page.rows if "predicted" in row]
    assert len(layers) == 2 + 5  # those that repeat, and each
    assert "layer.0-1.attention" in layers[0]
    assert "bsr 4x1" in layers[0]
    assert "90.0 %" in layers[0]
    assert "pooler|<dense>" in layers[-1]
    assert any("last_hidden_state" in row and "3.1e-06" in row for row in page.rows)
    text = (tmp_path / "report.html").read_text()
    assert len(text) < 200_000
    for title in ("model&#39;s order", "bytes go", "Compile phases"):
        assert title in text
    for title in (
        "Time of each layer",
        "time goes",
        "machine's limit",
    ):  # of which nothing is known
        assert title not in text


def bench_of(manifest: dict) -> dict:
    kernels = [
        {"layer": layer["name"], "function": layer["kernel"], "group": "sparse layers",
         "seconds": 4e-4, "share": 0.15, "bound": 2e-4}
        for layer in manifest["layers"]
    ]  # fmt: skip
    group = {"group": "sparse layers", "seconds": 2e-3, "share": 1.0}
    return {
        "threads": 2,
        "cpu": "Some CPU",
        "model": {"p50": 0.0025},
        "speedup": 7.25,
        "reference": {"engine": "ONNX Runtime 1.31.1"},
        "profile": {"kernels": kernels, "groups": [group]},
    }


def test_html_report_plots_what_was_predicted_and_measured(tmp_path: Path) -> None:
    manifest = sample_manifest()
    figures = {"seconds": 1e-4, "dense_seconds": 8e-4}
    for layer in manifest["layers"]:
        layer["times"] = {"tokens": 128, "predicted": figures}
    write_report(manifest, tmp_path / "report.html", bench_of(manifest))
    text = (tmp_path / "report.html").read_text()
    for title in ("Time of each layer", "time goes", "machine&#39;s limit"):
        assert title in text
    assert "<b>7.2x</b>" in text
    assert "<b>8.0x</b>" in text
    label = r'aria-label="pooler\|&lt;dense&gt;: dense 0.100 ms, dense 0.800 ms, measured 0.400 ms"'
    assert re.search(label, text)
    assert "sparse layers: 2.000 ms, 100.0 %" in text


def test_html_report_shows_where_the_zeros_are(tmp_path: Path) -> None:
    manifest = sample_manifest()
    write_report(manifest, tmp_path / "report.html")
    assert "Where the zeros are" not in (tmp_path / "report.html").read_text()
    manifest["layers"][0]["density"] = ["0066", "3300"]
    write_report(manifest, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "Where the zeros are" in text
    assert "darkest: 40.0 % non-zero" in text
    assert '<path fill-opacity="0.5" d="M0 1h1v1h-1z"/>' in text
    assert '<path fill-opacity="1" d="M1 0h1v1h-1z"/>' in text


def test_markdown_and_json_reports_have_the_measurements(tmp_path: Path) -> None:
    manifest = sample_manifest()
    for suffix in (".md", ".json"):
        write_report(manifest, tmp_path / f"report{suffix}", bench_of(manifest))
    assert "7.2x: the speed of ONNX Runtime 1.31.1, measured" in (
        tmp_path / "report.md"
    ).read_text().replace("\\", "")
    assert json.loads((tmp_path / "report.json").read_text())["bench"]["speedup"] == 7.25


def test_html_needs_what_draws_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_tvm.report.files.find_spec", lambda name: None)
    with pytest.raises(OptionError, match="vl_convert") as refusal:
        check_report_path(tmp_path / "report.html")
    assert "pip install" in str(refusal.value.hint)
    check_report_path(tmp_path / "report.md")


def test_reports_say_when_nothing_was_verified(tmp_path: Path) -> None:
    manifest = {**sample_manifest(), "verification": None}
    for name in ("report.md", "report.html"):
        write_report(manifest, tmp_path / name)
        assert "Not verified" in (tmp_path / name).read_text()


@pytest.mark.parametrize("name", ["report.md", "report.html"])
def test_reports_show_what_passes_noted(tmp_path: Path, name: str) -> None:
    write_report(sample_manifest(), tmp_path / name)
    assert "attention at lv7 runs unfused" in (tmp_path / name).read_text()


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
    for word in ("(predicted)", "7.6x", "faster", "dense", "(fill", "1.00)", "gelu", "layer.0-11."):
        assert text.count(word) >= 2, word
    assert layer_table(sample_manifest(depth=12)).row_count == 3
    assert text.splitlines()[-1] == "next: sparse-tvm bench model.so"


def test_layers_that_repeat_share_a_row() -> None:
    assert grouped(
        [
            ("layer.0.query", "bsr 4x1", "9.1x faster"),
            ("layer.0.key", "csr", "9.1x faster"),
            ("layer.1.query", "bsr 4x1", "8.7x faster"),
            ("layer.2.query", "bsr 8x1", "8.7x faster"),
            ("layer.3.query", "bsr 4x1", "10.0x faster"),
            ("layer.1.conv2.weight", "dense", ""),
        ]
    ) == [
        ("layer.0-1,3.query", "bsr 4x1", "8.7-10.0x faster"),
        ("layer.0.key", "csr", "9.1x faster"),
        ("layer.2.query", "bsr 8x1", "8.7x faster"),
        ("layer.1.conv2.weight", "dense", ""),
    ]


def test_what_all_names_begin_with_is_found() -> None:
    assert common_prefix(["bert.encoder.0.query", "bert.embeddings"]) == "bert."
    assert common_prefix(["bert.encoder.0", "bert.encoder.10"]) == "bert.encoder."
    assert common_prefix(["query", "key"]) == ""
    assert common_prefix(["bert.query"]) == ""


@pytest.mark.parametrize(
    ("sparsities", "says"),
    [([], "no layer"), ([0.0, 0.0], "hold no zeros"), ([0.3, 0.0], "--layer")],
)
def test_a_model_that_gains_nothing_is_warned_of(sparsities: list[float], says: str) -> None:
    layers = [sample_layer(f"l{n}", s, format="dense") for n, s in enumerate(sparsities)]
    warning = nothing_sparse({"layers": layers, "target": {"name": "x86-64-v3"}})
    assert warning is not None
    assert says in warning
    if layers:
        assert "--structure auto --target x86-64-v3`" in warning
        for layer in layers:
            layer["precision"] = "int8"
        warning = nothing_sparse({"layers": layers, "target": {"name": "avx512-vnni"}})
        assert warning is not None
        assert "--structure auto --target avx512-vnni --precision int8`" in warning
    assert nothing_sparse(sample_manifest()) is None


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
    assert [human_threads(count) for count in (1, 4)] == ["1 thread", "4 threads"]


NASTY = (
    "\x1b[2J\x1b]0;owned\x07\u202eevil\udcff ![x](http://example.com/x.png) [red]red[/blue]\nsecond"
)


def nasty_manifest() -> dict:
    manifest = sample_manifest()
    for layer in manifest["layers"]:
        layer.update(name=NASTY, structure=NASTY, reason=NASTY, kernel=NASTY, epilogue=[NASTY])
    manifest["model"]["name"] = manifest["inputs"][0]["name"] = NASTY
    manifest["verification"]["max_abs_diff"] = {NASTY: 0.0}
    manifest["notes"] = [NASTY]
    return manifest


def is_harmless(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


def test_terminals_obey_no_name(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(stdout_console(), nasty_manifest(), Path(f"{NASTY}.so"))
    text = capsys.readouterr().out
    assert is_harmless(text)
    assert r"\x1b[2J" in text
    assert "[red]red[/blue]" in text


@pytest.mark.parametrize("suffix", [".html", ".md", ".json"])
def test_reports_load_and_hide_nothing(tmp_path: Path, suffix: str) -> None:
    write_report(nasty_manifest(), tmp_path / f"report{suffix}")
    text = (tmp_path / f"report{suffix}").read_text()
    assert is_harmless(text)
    if suffix == ".md":
        assert "![x]" not in text
        assert "http://example.com/x.png" in text
        assert re.search(r"(?<!\\)\[", text) is None


def test_targets_are_named_by_what_they_are_made_for() -> None:
    assert target_name(get_target("x86-64-v3").as_json()) == "x86-64-v3 (256-bit vectors)"
    assert target_name(CUDA_TARGETS[0].as_json()) == "cuda-sm80 (sm_80)"
