"""What the benchmarks measured, as a table and as a plot."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench_engines import ONNX_RUNTIME

from sparse_tvm.cli.console import stdout_console
from sparse_tvm.cli.tables import plain_table

STRUCTURES = ("unstructured", "4x1")


@dataclass(frozen=True)
class Measurement:
    """One engine with one model: median seconds, largest difference from ONNX Runtime's output."""

    model: str
    engine: str
    threads: int
    seconds: float
    difference: float


@dataclass(frozen=True)
class Variant:
    """One way to prune, such as ``90%:4x1`` or ``0%``; ``@int8`` names a precision."""

    text: str

    @property
    def percent(self) -> str:
        return self.text.partition("%")[0]

    @property
    def precision(self) -> str:
        return self.text.partition("@")[2] or "fp32"

    @property
    def structure(self) -> str:
        return self.text.partition("@")[0].partition(":")[2] or "unstructured"

    @property
    def title(self) -> str:
        name = "sparse-tvm" if self.precision == "fp32" else f"sparse-tvm {self.precision}"
        if self.percent == "0":
            return f"{name}, dense"
        return f"{name}, {self.percent} % {self.structure}"


def speed_ups(measurements: Sequence[Measurement]) -> dict[Measurement, float]:
    """How many times ONNX Runtime's speed on the same model and threads each one is."""
    reference = {(m.model, m.threads): m.seconds for m in measurements if m.engine == ONNX_RUNTIME}
    return {m: reference[m.model, m.threads] / m.seconds for m in measurements}


def curves(measurements: Sequence[Measurement], threads: int) -> dict[str, dict[float, float]]:
    """Speed-up by percent of zeros, for each structure with more than one sparsity."""
    found: dict[str, dict[float, float]] = {structure: {} for structure in STRUCTURES}
    for measurement, gain in speed_ups(measurements).items():
        match = re.fullmatch(r"sparse-tvm, (?:dense|(\d+) % (.+))", measurement.engine)
        if match is not None and measurement.threads == threads:
            for structure in STRUCTURES if match[2] is None else (match[2],):
                found[structure][float(match[1] or 0)] = gain
    return {key: dict(sorted(curve.items())) for key, curve in found.items() if len(curve) > 1}


def save(measurements: Sequence[Measurement], title: str, path: Path, notes: str = "") -> None:
    """Print the table, and write it as Markdown."""
    cells = list(_cells(measurements))
    header, *rows = cells
    table = plain_table(*header, numbers=header[2:])
    for row in rows:
        table.add_row(*row)
    stdout_console().print(title, table, *filter(None, [notes]), sep="\n")
    rule = ["---", "---", *["---:"] * (len(header) - 2)]
    lines = [f"| {' | '.join(row)} |" for row in (header, rule, *rows)]
    path.write_text("\n".join([title, "", *lines, "", notes]).rstrip() + "\n", encoding="utf-8")


def _cells(measurements: Sequence[Measurement]) -> Iterable[tuple[str, ...]]:
    threads = list(dict.fromkeys(m.threads for m in measurements))
    gains = speed_ups(measurements)
    columns = [f"{n} thread{'s' if n > 1 else ''}" for n in threads]
    yield ("model", "engine", *[name for c in columns for name in (c, "gain")], "max diff")
    shown = None
    for model, engine in dict.fromkeys((m.model, m.engine) for m in measurements):
        mine = [m for m in measurements if (m.model, m.engine) == (model, engine)]
        figures = [text for m in mine for text in (f"{m.seconds * 1e3:.2f} ms", f"{gains[m]:.2f}x")]
        difference = "" if engine == ONNX_RUNTIME else f"{max(m.difference for m in mine):.1e}"
        yield ("" if model == shown else model, engine, *figures, difference)
        shown = model


def plot(measurements: Sequence[Measurement], title: str, path: Path) -> bool:
    """Draw speed-up against sparsity where matplotlib is installed; return whether it was."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for threads in dict.fromkeys(m.threads for m in measurements):
        for structure, curve in curves(measurements, threads).items():
            label = f"{structure}, {threads} thread{'s' if threads > 1 else ''}"
            axes.plot(list(curve), list(curve.values()), marker="o", label=label)
    axes.axhline(1, color="grey", linestyle="--", label="ONNX Runtime")
    axes.set(xlabel="zeros in the weights, %", ylabel="times ONNX Runtime's speed", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
    return True
