"""Check the cost model: random layers, each predicted and measured in every layout worth a look.

    python scripts/check_cost_model.py records.jsonl    # 200 layers on this machine
    sparse-tvm tune --fit records.jsonl                 # the entry for the target table

A layer has a random shape, sparsity, structure and number of tokens, and stands for one of twelve
in a model: so many copies of its weight take turns. A clock that moves is no error of the model:
each layout takes turns with the chosen one, and that with a kernel that is the same for all layers
and counts the cycles. What comes near the best, and what was chosen, is timed again by itself, some
times, and the median counts: how much of a weight the last cache holds depends on the pages that it
happens to lie in. The best of many owes that to chance, too, so it is timed once more in turns with
the chosen one, and the best then, until one stays the best. Printed is how far predictions are off,
and how much slower than the best measured layout the one is that ``compile`` chooses: by the
target's parameters, and by parameters fitted to one half of the layers for the other half. Layers
that the file has already are not measured again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import typer

from sparse_tvm.backends import get_backend, resolve_target
from sparse_tvm.cli.console import stderr_console, stdout_console
from sparse_tvm.cli.tables import plain_table
from sparse_tvm.cli.tune import layout_name
from sparse_tvm.cpu import cpu_model
from sparse_tvm.families import WeightedFamily
from sparse_tvm.operators import Bias, Dense, Layout, to_json
from sparse_tvm.passes.formats import FormatOptions
from sparse_tvm.passes.layout_choice import choose
from sparse_tvm.sparsity.masks import prune_array
from sparse_tvm.sparsity.statistics import MeasuredWeight
from sparse_tvm.targets import Target
from sparse_tvm.tuning.fitting import fit
from sparse_tvm.tuning.job import Job
from sparse_tvm.tuning.measuring import Measurer
from sparse_tvm.tuning.provenance import here
from sparse_tvm.tuning.records import (
    Condition,
    Problem,
    Record,
    Records,
    append_record,
    read_records,
)

EXTENTS = (64, 4096)
MOST_WEIGHTS = 4 << 20
STRUCTURES = ("unstructured", "2x1", "4x1", "8x1", "16x1")
ZEROS = (0.3, 0.98)
TOKENS = (1, 256)
LAYERS = 12
"""Of a model, of which the random layer is one."""

HOPELESS = 2.0
"""Layouts predicted this many times slower than the best are not timed."""

SECONDS = 0.06
"""How long one timing takes."""

NEAR, ROUNDS = 1.2, 5
"""How many times the best one's time is near it, and how often what is near is timed again."""


@dataclass(frozen=True)
class Case:
    """A layer: its weight ``[N, K]``, what is known of it, and how many tokens it sees."""

    title: str
    w: np.ndarray
    weight: MeasuredWeight
    tokens: int

    @property
    def op(self) -> Dense:
        n, k = self.w.shape
        return Dense(layer="", matrix=(n, k), epilogue=(Bias(),))

    def predicted(self, target: Target) -> dict[Layout, float]:
        """Seconds of every layout that ``compile`` compares."""
        return {
            layout: family.cost(self.op, layout, self.weight, self.tokens, target)
            for family in get_backend("cpu").accepting(self.op, target)
            if isinstance(family, WeightedFamily)
            for layout in family.candidates(self.op, self.weight, target)
        }

    def chosen(self, target: Target) -> Layout:
        """The layout that ``compile`` chooses."""
        backend, options = get_backend("cpu"), FormatOptions()
        return choose(self.op, self.weight, options, backend, target, [self.tokens]).layout

    def wanted(self, target: Target) -> list[Layout]:
        """The layouts worth a measurement."""
        predicted = self.predicted(target)
        limit = HOPELESS * min(predicted.values())
        chosen = self.chosen(target)
        others = [one for one, seconds in predicted.items() if seconds <= limit and one != chosen]
        return [chosen, *others]

    def job(self, layout: Layout, target: Target, beside: Layout | None) -> Job:
        """A layout of it, as a worker is told, and the one that takes turns with it."""
        return {
            "backend": "cpu",
            "target": target.name,
            "operator": self.op.name,
            "call": to_json(replace(self.op, layout=layout)),
            "leading": [self.tokens],
            "weight": self.title,
            "tokens": [self.tokens],
            "threads": [1],
            "copies": LAYERS,
            "seconds": SECONDS,
            "beside": to_json(replace(self.op, layout=beside)) if beside is not None else None,
        }


def random_case(seed: int, index: int) -> Case:
    """Layer number ``index`` of a seed."""
    rng = np.random.default_rng((seed, index))

    def between(low: float, high: float) -> int:
        return round(math.exp(rng.uniform(math.log(low), math.log(high))))

    n = 16 * between(EXTENTS[0] / 16, EXTENTS[1] / 16)
    k = 16 * between(EXTENTS[0] / 16, min(EXTENTS[1], MOST_WEIGHTS / n) / 16)
    zeros, tokens = round(float(rng.uniform(*ZEROS)), 2), between(*TOKENS)
    structure = STRUCTURES[rng.integers(len(STRUCTURES))]
    w = prune_array(rng.standard_normal((n, k), np.float32), zeros, structure)
    title = f"{n}x{k}, {zeros:.0%} {structure}, {tokens} tokens"
    return Case(title, w, MeasuredWeight(w), tokens)


def measured(case: Case, target: Target, known: Records) -> dict[Layout, float]:
    """Seconds of the case's layouts, as far as they are known."""
    condition = Condition(case.tokens, 1)
    problem = Problem.of(case.op, case.weight, target.name)
    return {
        record.layout: record.seconds
        for record in known
        if record.problem == problem and record.condition == condition and record.seconds
    }


def measure(
    case: Case,
    layout: Layout,
    target: Target,
    measurer: Measurer,
    beside: Record | None,
    pace: float = 1.0,
) -> Record:
    """Time one layout, the first one by itself at a clock that is so many times too slow."""
    held = beside.layout if beside is not None else None
    answer = measurer(case.job(layout, target, held), case.w)
    (result,) = answer.get("results") or [{"seconds": None, "noise": 0.0}]
    taken = result["seconds"] / pace if result["seconds"] is not None else None
    if beside is not None and beside.seconds is not None and "relative" in result:
        taken = result["relative"] * beside.seconds
    n, k = case.w.shape
    rows = layout.block[0]
    return Record(
        Problem.of(case.op, case.weight, target.name),
        Condition(case.tokens, 1),
        layout,
        case.weight.stored_blocks(layout.block) if layout.sparse else -(-n // rows) * k,
        answer.get("copies", 0),
        taken,
        result["noise"],
        answer.get("failure"),
        here(datetime.now(UTC).isoformat(timespec="milliseconds")),
    )


@dataclass
class Clock:
    """How fast the machine is, by a kernel that computes out of registers and the first cache."""

    case: Case
    target: Target
    known: Records
    path: Path

    def pace(self, measurer: Measurer) -> float:
        """How many times as long as the first time the kernel takes."""
        layout = self.case.chosen(self.target)
        record = measure(self.case, layout, self.target, measurer, None, 1.0)
        first = measured(self.case, self.target, self.known).get(layout)
        if first is None:
            self.known.add(record)
            append_record(self.path, record)
            return 1.0
        assert record.seconds is not None, record.failure
        return record.seconds / first


def measure_all(case: Case, clock: Clock, measurer: Measurer, again: bool) -> None:
    """Time what is not known of a case's layouts, the chosen one first, then the best again."""
    found = Found(case, clock)
    chosen, *others = case.wanted(clock.target)
    new = [layout for layout in (chosen, *others) if layout not in found.known]
    if chosen in new:
        found.keep(measure(case, chosen, clock.target, measurer, None, clock.pace(measurer)))
    for layout in (one for one in new if one != chosen):
        found.keep(measure(case, layout, clock.target, measurer, found.known[chosen]))
    if new or again:
        time_near_ones_again(found, chosen, measurer)
        confirm_best(found, chosen, measurer)


class Found:
    """A case's records by layout, all of them kept in the file."""

    def __init__(self, case: Case, clock: Clock) -> None:
        self.case, self.clock = case, clock
        problem = Problem.of(case.op, case.weight, clock.target.name)
        condition = Condition(case.tokens, 1)
        self.known = {
            record.layout: record
            for record in clock.known
            if (record.problem, record.condition) == (problem, condition)
        }

    def keep(self, record: Record) -> None:
        self.known[record.layout] = record
        self.clock.known.add(record)
        append_record(self.clock.path, record)

    def seconds(self, layout: Layout) -> float:
        return seconds_of(self.known[layout])


def time_near_ones_again(found: Found, chosen: Layout, measurer: Measurer) -> None:
    """What is near the best, and the chosen one: the median counts."""
    near = NEAR * min(map(found.seconds, found.known))
    rivals = [one for one in found.known if found.seconds(one) <= near or one == chosen]
    timed = in_turns(found.case, rivals, found.clock, measurer)
    for layout in rivals:
        found.keep(sorted(timed[layout], key=seconds_of)[ROUNDS // 2])


def confirm_best(found: Found, chosen: Layout, measurer: Measurer) -> None:
    """Time the best in turns with the chosen one, until what is best then has been."""
    confirmed = {chosen}
    while (best := min(found.known, key=found.seconds)) not in confirmed:
        timed = in_turns(found.case, [chosen, best], found.clock, measurer)
        pairs = zip(timed[best], timed[chosen], strict=True)
        ratio = median(seconds_of(one) / seconds_of(other) for one, other in pairs)
        found.keep(replace(timed[best][0], seconds=ratio * found.seconds(chosen)))
        confirmed.add(best)


def in_turns(
    case: Case, layouts: Sequence[Layout], clock: Clock, measurer: Measurer
) -> Mapping[Layout, Sequence[Record]]:
    """Some timings of each layout, one after the other, each in memory of its own."""
    timed: dict[Layout, list[Record]] = {layout: [] for layout in layouts}
    for _ in range(ROUNDS):
        pace = clock.pace(measurer)
        for layout in layouts:
            timed[layout].append(measure(case, layout, clock.target, measurer, None, pace))
    return timed


def seconds_of(record: Record) -> float:
    return math.inf if record.seconds is None else record.seconds


@dataclass(frozen=True)
class Verdict:
    """How a target's parameters did: a prediction's errors, and what choices lost, by case."""

    errors: list[float]
    lost: dict[str, float]

    @classmethod
    def of(cls, target: Target, cases: Iterable[Case], known: Records) -> Verdict:
        errors, lost = [], {}
        for case in cases:
            predicted, found = case.predicted(target), measured(case, target, known)
            seconds = {layout: taken for layout, taken in found.items() if layout in predicted}
            errors += [abs(predicted[one] / taken - 1) for one, taken in seconds.items()]
            chosen = case.chosen(target)
            best = min(seconds, key=lambda layout: seconds[layout])
            names = f"{case.title}: {layout_name(chosen)}, best {layout_name(best)}"
            # Fitted parameters may choose what seemed hopeless, and was not timed.
            lost[names] = seconds.get(chosen, HOPELESS * seconds[best]) / seconds[best] - 1
        return cls(errors, lost)

    def __add__(self, other: Verdict) -> Verdict:
        return Verdict(self.errors + other.errors, self.lost | other.lost)

    def row(self) -> list[str]:
        lost = list(self.lost.values())
        within = [f"{np.mean([one <= limit for one in lost]):.1%}" for limit in (0.05, 0.12)]
        return [f"{median(self.errors):.1%}", *within, f"{np.mean(lost):.1%}", f"{max(lost):.0%}"]


def fitted(target: Target, cases: Sequence[Case], known: Records) -> Target:
    """The target with parameters fitted to these cases' records."""
    problems = {Problem.of(case.op, case.weight, target.name) for case in cases}
    chosen = Records()
    for record in known:
        if record.problem in problems:
            chosen.add(record)
    (found,) = fit(chosen)
    return replace(target, costs=found.costs)


def main(
    records: Annotated[Path, typer.Argument(help="Where measurements are kept.")],
    cases: Annotated[int, typer.Option(help="How many layers.")] = 200,
    seed: int = 0,
    target: Annotated[str, typer.Option(help="A target that this machine runs.")] = "native",
    worst: Annotated[int, typer.Option(help="How many bad choices to list.")] = 0,
    again: Annotated[bool, typer.Option(help="Time the best of known layers again.")] = False,
) -> None:
    """Compare the cost model with measured kernels on this machine, one thread."""
    _, found = resolve_target(target)
    assert isinstance(found, Target)
    layers = [random_case(seed, index) for index in range(cases)]
    known = read_records([records], cpu_model()) if records.exists() else Records()
    w = np.random.default_rng(seed).standard_normal((48, 96), np.float32)
    clock = Clock(Case("clock", w, MeasuredWeight(w), 32), found, known, records)
    with Measurer() as measurer:
        for number, case in enumerate(layers, 1):
            measure_all(case, clock, measurer, again)
            stderr_console().print(f"{number} of {cases}: {case.title}")
    halves = layers[::2], layers[1::2]
    verdicts = {"as it is": Verdict.of(found, layers, known)}
    verdicts["fitted to the other half"] = Verdict.of(
        fitted(found, halves[1], known), halves[0], known
    ) + Verdict.of(fitted(found, halves[0], known), halves[1], known)
    columns = ("median error", "choice within 5%", "within 12%", "lost, mean", "most")
    table = plain_table("parameters", *columns, numbers=columns)
    for name, verdict in verdicts.items():
        table.add_row(name, *verdict.row())
    console = stdout_console()
    count = len(verdicts["as it is"].errors)
    console.print(f"{cpu_model()}, {found.name}: {cases} layers, {count} kernels, 1 thread", table)
    for name, verdict in verdicts.items():
        for title, lost in sorted(verdict.lost.items(), key=lambda pair: -pair[1])[:worst]:
            console.print(f"{name}: {lost:.0%} lost: {title}")


if __name__ == "__main__":
    typer.run(main)
