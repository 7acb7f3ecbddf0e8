"""What a report says, as plain strings: shared by the terminal, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparse_tvm.operators import PRECISION_NAMES

LAYER_HEADER = (
    "layer",
    "shape",
    "sparsity",
    "structure",
    "format",
    "kernel",
    "epilogue",
    "reason",
)

_FLOAT32 = 4

_WORST = 3
"""Layers that are named where some hurt in low precision."""


@dataclass(frozen=True)
class LayerRow:
    """One layer's cells, and its sparsity also as a number from 0 to 1."""

    name: str
    shape: str
    sparsity: str
    structure: str
    format: str
    kernel: str
    epilogue: str
    reason: str
    fraction: float

    @property
    def cells(self) -> tuple[str, ...]:
        """The strings under :data:`LAYER_HEADER`."""
        return tuple(getattr(self, column) for column in ("name", *LAYER_HEADER[1:]))


def layer_rows(manifest: Mapping[str, Any]) -> list[LayerRow]:
    """Return one row per layer of the manifest, in its order."""
    return [
        LayerRow(
            name=layer["name"],
            shape="x".join(str(size) for size in layer["shape"]),
            sparsity=human_percent(layer["sparsity"]),
            structure=layer["structure"],
            format=format_name(layer),
            kernel=layer["kernel"],
            epilogue=" + ".join(layer["epilogue"]),
            reason=layer["reason"],
            fraction=layer["sparsity"],
        )
        for layer in manifest["layers"]
    ]


def format_name(layer: Mapping[str, Any]) -> str:
    """Return a layer's weight format: ``dense``, ``csr`` or ``bsr 4x1``."""
    if not layer["block"]:
        return str(layer["format"])
    rows, columns = layer["block"]
    return f"{layer['format']} {rows}x{columns}"


def claims(manifest: Mapping[str, Any], bench: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What to know first, as a figure and what it is of."""
    return [
        claim
        for claim in (
            _measured_speed(bench) if bench else None,
            _layers_speed(manifest["layers"]),
            _size(manifest["totals"]),
            _difference(manifest["verification"]),
        )
        if claim is not None
    ]


def _measured_speed(bench: Mapping[str, Any]) -> tuple[str, str]:
    p50 = f"{1e3 * bench['model']['p50']:.2f} ms"
    where = f"{human_threads(bench['threads'])}, {bench['cpu']}"
    if bench["speedup"] is None:
        return p50, f"a run (median), {where}"
    reference = bench["reference"]["engine"]
    return f"{bench['speedup']:.1f}x", f"the speed of {reference}, measured: {p50}, {where}"


def _layers_speed(layers: Sequence[Mapping[str, Any]]) -> tuple[str, str] | None:
    timed = [layer for layer in layers if "times" in layer]
    if not timed:
        return None
    dense = sum(layer_figures(layer)["dense_seconds"] for layer in timed)
    chosen = sum(layer_figures(layer)["seconds"] for layer in timed)
    basis = " and ".join(sorted({_basis(layer) for layer in timed}))
    sizes = sorted({layer["times"]["tokens"] for layer in timed})
    size = "each at its own size" if len(sizes) > 2 else f"{' or '.join(map(str, sizes))} tokens"
    what = f"the speed of the same layers stored dense ({basis}, {size})"
    return f"{dense / chosen:.1f}x", what


def _size(totals: Mapping[str, Any]) -> tuple[str, str]:
    dense = human_bytes(totals["parameters"] * _FLOAT32)
    return human_bytes(totals["file_bytes"]), f"the file; {dense} of dense float32 weights before"


def _difference(verification: Mapping[str, Any] | None) -> tuple[str, str]:
    if verification is None:
        return "not verified", "see below"
    largest = max(verification["max_abs_diff"].values(), default=0.0)
    return f"{largest:.1e}", f"largest difference from {verification['reference']}"


def layer_figures(layer: Mapping[str, Any]) -> Mapping[str, float]:
    """Return what a layer's choice rests on: ``seconds`` and ``dense_seconds`` of a call."""
    times: Mapping[str, Any] = layer["times"]
    figures: Mapping[str, float] = times[_basis(layer)]
    return figures


def _basis(layer: Mapping[str, Any]) -> str:
    return "measured" if "measured" in layer["times"] else "predicted"


def summary_facts(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the totals of a compile as (label, value) pairs."""
    totals, run = manifest["totals"], manifest["compile"]
    return [
        *_model_facts(manifest),
        ("File", human_bytes(totals["file_bytes"])),
        ("Compile time", f"{run['seconds']:.1f} s"),
        ("Peak memory", human_bytes(run["peak_memory_bytes"])),
    ]


def preview_facts(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what a compile would come to as (label, value) pairs."""
    speed = _layers_speed(manifest["layers"])
    return [*_model_facts(manifest), *([("Layers", " ".join(speed))] if speed else [])]


def _model_facts(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    totals, layers = manifest["totals"], manifest["layers"]
    sparse = sum(layer["format"] != "dense" for layer in layers)
    parameters, nonzeros = totals["parameters"], totals["nonzeros"]
    share = human_percent(nonzeros / parameters) if parameters else "none"
    return [
        ("Target", target_name(manifest["target"])),
        ("Sparse layers", f"{sparse} of {len(layers)}"),
        ("Parameters", human_count(parameters)),
        ("Non-zeros", f"{human_count(nonzeros)} ({share})"),
        ("Weights", human_bytes(totals["weight_bytes"])),
    ]


def nothing_sparse(manifest: Mapping[str, Any]) -> str | None:
    """Return what to do where no layer became sparse, so that the model gains nothing."""
    layers = manifest["layers"]
    if any(layer["format"] != "dense" for layer in layers):
        return None
    if not layers:
        return "nothing became sparse: the model has no layer whose weights could be"
    auto = f"--structure auto --target {manifest['target']['name']}"
    lowest = {PRECISION_NAMES[layer["precision"]] for layer in layers} - {"fp32"}
    auto += f" --precision {min(lowest)}" if len(lowest) == 1 else ""
    if not any(layer["sparsity"] for layer in layers):
        return (
            "nothing became sparse: the weights hold no zeros; prune the model while training it, "
            f"or try `sparse-tvm prune MODEL -o PRUNED --sparsity 0.9 {auto}`"
        )
    return (
        "nothing became sparse; the reasons are in the table. More zeros pay, and so do zeros in "
        f"blocks, as of `sparse-tvm prune {auto}`; --layer REGEX=FORMAT insists"
    )


def verification_facts(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (output name, largest difference and tolerance) pairs; empty when not verified."""
    verification = manifest["verification"]
    if verification is None:
        return []
    tolerance = verification["tolerance"]
    similarities = verification.get("similarity", {})
    outputs = [
        (
            name,
            f"max |difference| {difference:.1e}"
            + (
                _similarity(similarities[name])
                if name in similarities
                else f" (tolerance {tolerance:.0e})"
            ),
        )
        for name, difference in verification["max_abs_diff"].items()
    ]
    return outputs + _sensitivity(verification.get("sensitivity", {}))


def _sensitivity(losses: Mapping[str, float]) -> list[tuple[str, str]]:
    """The layers that hurt most in low precision, and by how much."""
    worst = sorted(losses.items(), key=lambda entry: -entry[1])[:_WORST]
    text = ", ".join(f"{name} {loss:.1e}" for name, loss in worst)
    return [("layers that take most from the cosine", text)] if worst else []


def _similarity(found: Mapping[str, float]) -> str:
    """How outputs of low precision compare with float32's."""
    text = f", mean {found['mean_abs_diff']:.1e}, cosine {found['cosine']:.5f} or more"
    return text + (f", same class in {found['top1']:.1%}" if "top1" in found else "")


def verification_title(manifest: Mapping[str, Any]) -> str:
    """Return the line that says against what the artifact was verified, or that it was not."""
    verification = manifest["verification"]
    if verification is None:
        return f"Not verified ({manifest.get('unverified') or 'compiled with --no-verify'})"
    where = f", in an emulator ({verification['emulated']})" if "emulated" in verification else ""
    return f"Verified against {verification['reference']}{where}"


def target_name(target: Mapping[str, Any]) -> str:
    """Return a target as in ``x86-64-v3 (256-bit vectors)`` or ``cuda-sm90 (sm_90)``."""
    if "architectures" in target:
        return f"{target['name']} ({', '.join(target['architectures'])})"
    cpu = "" if target["cpu"] == target["name"] else f"{target['cpu']}, "
    return f"{target['name']} ({cpu}{target['vector_bits']}-bit vectors)"


def human_bytes(size: float) -> str:
    """Return a size in bytes with a decimal unit: ``12.3 MB``."""
    return _scaled(size, ("B", "kB", "MB", "GB", "TB"))


def human_count(count: float) -> str:
    """Return a count with a decimal suffix: ``109.5 M``."""
    return _scaled(count, ("", "k", "M", "G", "T")).rstrip()


def human_threads(count: int) -> str:
    """Return ``1 thread`` or ``4 threads``."""
    return "1 thread" if count == 1 else f"{count} threads"


def human_percent(fraction: float) -> str:
    """Return a fraction as a percentage with one decimal, never rounded up to 100."""
    percent = 100 * fraction
    if 99.95 <= percent < 100:
        return ">99.9 %"
    return f"{percent:.1f} %"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    power = 0
    while value >= 999.95 and power < len(units) - 1:
        value /= 1000
        power += 1
    return f"{value:.{1 if power else 0}f} {units[power]}"
