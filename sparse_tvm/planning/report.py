"""A plan for people: rows, facts, and the page with its frontier."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_tvm.errors import OptionError
from sparse_tvm.extras import install_command
from sparse_tvm.files import check_writable, replacing
from sparse_tvm.printable import printable
from sparse_tvm.report import charts
from sparse_tvm.report.content import human_bytes, human_percent, human_threads
from sparse_tvm.report.html import render_page

if TYPE_CHECKING:
    from sparse_tvm.planning.document import LayerPlan, Plan

COLUMNS = ("layer", "shape", "sparsity", "structure", "faster", "error")
_DOUBTFUL = 0.1
"""Of a trial: how far off from which on a user should know."""

_SHOWN = 9
"""Points of the frontier in the terminal."""


def check_plan_report(path: str | os.PathLike[str]) -> None:
    """Refuse a report's path that cannot work, before the plan that it would show.

    Raises
    ------
    OptionError
        When the suffix is neither ``.html`` nor ``.svg``, or what draws is not installed.
    OutputError
        When the file cannot be written.
    """
    suffix = Path(path).suffix
    if suffix not in (".html", ".svg"):
        raise OptionError(
            f"report {path}: unknown format {suffix!r}", hint="end the name in .html or .svg"
        )
    if not all(map(find_spec, ("jinja2", "vl_convert"))):
        raise OptionError(
            f"report {path}: plots need jinja2 and vl_convert", hint=install_command("report")
        )
    check_writable(path)


def write_plan_report(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write the frontier with the chosen point: alone as SVG, or with all layers as HTML.

    Raises
    ------
    OptionError, OutputError
        As :func:`check_plan_report`.
    """
    check_plan_report(path)
    frontier = _frontier(plan)
    text = frontier.broad
    if Path(path).suffix == ".html":
        text = render_page(
            "plan.html",
            plan=plan,
            goal=goal_text(plan),
            cost="size" if plan.goal == "size" else "latency",
            facts=facts(plan),
            frontier=frontier,
            strip=_strip(plan),
            columns=COLUMNS,
            rows=rows(plan),
        )
    with replacing(path) as temporary:
        temporary.write_text(printable(text), encoding="utf-8")


def goal_text(plan: Plan) -> str:
    """What was asked for: ``a latency of 5 ms``."""
    if plan.goal == "latency":
        return f"a latency of {milliseconds(plan.value)}"
    if plan.goal == "size":
        return f"a size of {human_bytes(round(plan.value))}"
    return f"a speed-up of {plan.value:g}"


def rows(plan: Plan) -> list[tuple[str, ...]]:
    """A row for each layer, under :data:`COLUMNS`."""
    return [
        (
            one.name,
            "x".join(map(str, one.shape)),
            human_percent(one.setting.sparsity),
            _structure(one),
            f"{one.dense_seconds / one.seconds:.1f}x" if one.seconds else "",
            human_percent(one.error),
        )
        for one in plan.layers
    ]


def facts(plan: Plan) -> list[tuple[str, str]]:
    """What the plan comes to."""
    faster = plan.dense_seconds / plan.seconds
    inputs = ", ".join(f"{name} {'x'.join(map(str, s))}" for name, s in plan.inputs.items())
    where = f"{plan.basis}, {plan.where}" + (f", {plan.cpu}" if plan.cpu else "")
    found = [
        ("Goal", goal_text(plan)),
        (
            "Latency",
            f"{milliseconds(plan.seconds)}, as it is {milliseconds(plan.dense_seconds)} "
            f"({faster:.2f}x)",
        ),
        (
            "Not pruned",
            f"{milliseconds(plan.rest_seconds)}: embeddings, attention, norms and what stays dense",
        ),
        ("Weights", f"{human_bytes(plan.nbytes)}, as they are {human_bytes(plan.dense_bytes)}"),
        ("Error", f"a layer loses {human_percent(plan.error)} of its output's energy"),
    ]
    uniform = uniform_error(plan)
    if uniform is not None:
        structure, error = uniform
        found.append(
            ("Uniform", f"{human_percent(error)}: {structure}, one sparsity for all layers")
        )
    if plan.worst_trial is not None:
        found.append(("Trials", f"predicted within {human_percent(plan.worst_trial)}"))
    return [*found, ("Times", f"{where}, {human_threads(plan.threads)}"), ("Inputs", inputs)]


def doubt(plan: Plan) -> str | None:
    """Why the plan's times should not be trusted, if so."""
    if plan.worst_trial is None or plan.worst_trial <= _DOUBTFUL:
        return None
    return (
        f"a trial took {human_percent(plan.worst_trial)} more or less than all trials together "
        "say: something else runs on this machine; stop it and plan again"
    )


def uniform_error(plan: Plan) -> tuple[str, float] | None:
    """The structure whose uniform sparsity errs least at the plan's cost, and its error."""
    cost = plan.nbytes if plan.goal == "size" else plan.seconds
    found = {
        structure: error
        for structure, points in (plan.uniform or {}).items()
        for error in [_at(points, cost)]
        if error is not None
    }
    best = min(found, key=lambda structure: found[structure], default=None)
    return None if best is None else (best, found[best])


def _at(points: Sequence[tuple[float, float]], cost: float) -> float | None:
    """The error at a cost, on the line through points; None where all of them cost more."""
    within = [point for point in points if point[0] <= cost]
    if not within:
        return None
    below = min(within, key=lambda point: point[1])
    beyond = [point for point in points if point[0] > cost and point[1] < below[1]]
    if not beyond:
        return below[1]
    above = max(beyond, key=lambda point: point[1])
    share = (cost - below[0]) / (above[0] - below[0])
    return below[1] + share * (above[1] - below[1])


def frontier_rows(plan: Plan) -> list[tuple[str, str]]:
    """A few points of the frontier, the plan among them: cost, and error."""
    own = (plan.nbytes if plan.goal == "size" else plan.seconds, plan.error)
    points = plan.frontier
    step = max(1, (len(points) - 1) // (_SHOWN - 1))
    found = sorted({*points[::step], points[-1], own})
    return [
        (_cost(plan, cost) + (" <- this plan" if (cost, error) == own else ""), f"{error:.1%}")
        for cost, error in found
    ]


def _structure(layer: LayerPlan) -> str:
    return layer.setting.structure if layer.setting.sparsity else "dense"


def milliseconds(seconds: float) -> str:
    """As in ``4.21 ms``."""
    return f"{1e3 * seconds:.3g} ms"


def _cost(plan: Plan, cost: float) -> str:
    return human_bytes(round(cost)) if plan.goal == "size" else milliseconds(cost)


def _frontier(plan: Plan) -> charts.Plot:
    unit, factor = ("MB", 1e-6) if plan.goal == "size" else ("ms", 1e3)
    curves = {"planned": plan.frontier}
    curves |= {f"uniform, {name}": points for name, points in (plan.uniform or {}).items()}
    cost = plan.nbytes if plan.goal == "size" else plan.seconds
    scaled = {
        name: [(factor * at, error) for at, error in points] for name, points in curves.items()
    }
    return charts.frontier(scaled, (factor * cost, plan.error), unit=unit)


def _strip(plan: Plan) -> charts.Plot:
    kinds = [_structure(one) for one in plan.layers]
    layers = [
        {
            "index": index,
            "sparsity": max(one.setting.sparsity, 0.01),  # a dense layer is to be seen, too
            "format": kind,
            "label": f"{printable(one.name)}: {one.setting}",
        }
        for index, (one, kind) in enumerate(zip(plan.layers, kinds, strict=True))
    ]
    return charts.layer_strip(layers, charts.format_colours(kinds))
