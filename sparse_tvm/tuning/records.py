"""Records of measured kernels: JSON lines that any number of machines and runs may add to.

A line is one layout of one layer's weight, timed for one number of tokens on one number of threads,
or one schedule of an operator without a kernel (:mod:`~sparse_tvm.tuning.schedule_records`).
It is found by what decides its time: the operator with its epilogue, the zeros of the weight, the
target, the CPU, tokens and threads. Records measured with other versions of this package or of TVM
are of other kernels; they are passed over, as damaged lines are, and the reader says so.

Needs no TVM.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

from sparse_tvm.errors import OptionError, OutputError
from sparse_tvm.files import replacing
from sparse_tvm.manifest import Natural, check
from sparse_tvm.operators import Layout, WeightedOperator, from_json, to_json
from sparse_tvm.sparsity.statistics import WeightStatistics
from sparse_tvm.tuning.provenance import VERSION, Provenance, Source, check_outcome, here
from sparse_tvm.tuning.schedule_records import ScheduleRecord, Schedules

_ALIKE = 0.1
"""How much two weights' shares of non-zeros, or of stored blocks, may differ and be one kernel."""

_COLDER = 4
"""By which factor more weights may have taken turns than the model has of a layer's size: they came
from farther away than the layer's will."""

_NEAR_TOKENS = math.sqrt(2)
"""By which factor measured and wanted numbers of tokens may differ."""

_DAMAGED_SHOWN = 5


class _Weight(TypedDict):
    density: float
    block: list[Natural] | None


class _Line(Source):
    """The schema of a line."""

    version: Natural
    operator: str
    call: dict[str, Any]
    weight: _Weight
    target: str
    tokens: Natural
    threads: Natural
    stored_blocks: Natural
    copies: Natural
    seconds: float | None
    noise: float
    failure: str | None


@dataclass(frozen=True)
class Problem:
    """A layer as far as it decides which layout is fastest.

    Attributes
    ----------
    op : WeightedOperator
        Without the layer's name and without a layout.
    density : float
        Share of the weight's values that are not zero, to two digits.
    block : tuple[int, int] | None
        The largest block that the zeros follow.
    target : str
        Name of the target.
    """

    op: WeightedOperator
    density: float
    block: tuple[int, int] | None
    target: str

    @classmethod
    def of(cls, op: WeightedOperator, weight: WeightStatistics, target: str) -> Problem:
        """The problem that a layer poses."""
        size = weight.shape[0] * weight.shape[1]
        density = float(f"{weight.nonzeros / size:.2g}")
        if density == 1 and weight.nonzeros < size:
            density = 0.99  # a weight without any zero is a case of its own
        return cls(anonymous(op), density, weight.block, target)


@dataclass(frozen=True, order=True)
class Condition:
    """For how many tokens (or pixels), and on how many threads, a kernel runs."""

    tokens: int
    threads: int


@dataclass(frozen=True)
class Record:
    """One layout, measured.

    Attributes
    ----------
    problem, condition : Problem, Condition
        What was computed.
    layout : Layout
        How the weight was stored.
    stored_blocks : int
        How many blocks of the layout's size that were.
    copies : int
        How many weights of its size took turns, of which a call read one.
    seconds : float | None
        Median of a call; None where there is none, as ``failure`` explains.
    noise : float
        Distance of the quartiles, as a share of the median.
    failure : str | None
        Why the layout cannot be used.
    provenance : Provenance
        Where, when and with what.
    """

    problem: Problem
    condition: Condition
    layout: Layout
    stored_blocks: int
    copies: int
    seconds: float | None
    noise: float
    failure: str | None
    provenance: Provenance

    @property
    def key(self) -> tuple[Any, ...]:
        """What two records have in common of which one is enough."""
        return (self.problem, self.condition, self.layout, self.provenance.cpu)

    def as_json(self) -> dict[str, Any]:
        """The record as a line has it."""
        problem, block = self.problem, self.problem.block
        return {
            "version": VERSION,
            "operator": problem.op.name,
            "call": to_json(replace(problem.op, layout=self.layout)),
            "weight": {"density": problem.density, "block": list(block) if block else None},
            "target": problem.target,
            "tokens": self.condition.tokens,
            "threads": self.condition.threads,
            "stored_blocks": self.stored_blocks,
            "copies": self.copies,
            "seconds": self.seconds,
            "noise": self.noise,
            "failure": self.failure,
            **self.provenance.as_json(),
        }

    @classmethod
    def from_json(cls, value: Any) -> Record:
        """Read a line.

        Raises
        ------
        ValueError
            When it is no record; it says why not.
        """
        check(value, _Line, "it")
        try:
            op = from_json(value["operator"], value["call"])
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            raise ValueError(f"its operator {value['operator']!r} cannot be read") from error
        if not isinstance(op, WeightedOperator) or op.layout is None:
            raise ValueError(f"its operator {value['operator']!r} has no weight with a layout")
        seconds, block = value["seconds"], value["weight"]["block"]
        check_outcome(seconds, value["failure"])
        if not 0 <= value["weight"]["density"] <= 1:
            raise ValueError(f"its density is {value['weight']['density']}")
        if min(value["tokens"], value["threads"]) < 1:
            raise ValueError("its tokens and threads have to be 1 or more")
        if block is not None and len(block) != 2:
            raise ValueError(f"its block is {block}")
        density = float(value["weight"]["density"])
        return cls(
            Problem(anonymous(op), density, tuple(block) if block else None, value["target"]),
            Condition(value["tokens"], value["threads"]),
            op.layout,
            value["stored_blocks"],
            value["copies"],
            seconds,
            value["noise"],
            value["failure"],
            Provenance.from_json(value),
        )


def anonymous(op: WeightedOperator) -> WeightedOperator:
    """The operator of any layer that computes the same, stored in any way."""
    return replace(op, layer="", layout=None)


Seconds = dict[Layout, dict[Condition, float]]
"""Measured seconds of a call, by layout and condition."""


@dataclass
class Records:
    """Records of layers, the newest of each kind; and beside them those of other operators.

    Attributes
    ----------
    remarks : list[str]
        What was passed over when they were read, a sentence each.
    damaged : int
        How many lines of the files were no records.
    schedules : Schedules
        Those of operators without a kernel.
    """

    remarks: list[str] = field(default_factory=list)
    damaged: int = 0
    schedules: Schedules = field(default_factory=Schedules)
    _newest: dict[tuple[Any, ...], Record] = field(default_factory=dict)

    def add(self, record: Record | ScheduleRecord) -> None:
        """Add a record; of two of a kind the newer one stays, of two as old the faster one."""
        if isinstance(record, ScheduleRecord):
            self.schedules.add(record)
            return
        known = self._newest.get(record.key)
        if known is None or _rank(record) >= _rank(known):
            self._newest[record.key] = record

    def __iter__(self) -> Iterator[Record]:
        """In an order that does not depend on when a record was added."""
        return iter(sorted(self._newest.values(), key=_line))

    def __len__(self) -> int:
        return len(self._newest)

    def seconds(self, op: WeightedOperator, weight: WeightStatistics, target: str) -> Seconds:
        """What was measured of layers like this one, without failures."""
        found: dict[Layout, dict[Condition, tuple[float, float]]] = {}
        for record in self._alike(op, weight, target):
            if record.seconds is None:
                continue
            column = found.setdefault(record.layout, {})
            offer = (_apart(record.problem, weight), record.seconds)
            column[record.condition] = min(offer, column.get(record.condition, offer))
        return {
            layout: {condition: seconds for condition, (_, seconds) in column.items()}
            for layout, column in found.items()
        }

    def failures(self, op: WeightedOperator, weight: WeightStatistics, target: str) -> set[Layout]:
        """Layouts with which such a layer could not be measured."""
        return {r.layout for r in self._alike(op, weight, target) if r.failure is not None}

    def _alike(
        self, op: WeightedOperator, weight: WeightStatistics, target: str
    ) -> Iterator[Record]:
        wanted = Problem.of(op, weight, target)
        for record in self._by_operator().get((wanted.op, wanted.target), ()):
            problem, layout = record.problem, record.layout
            if (problem.density == 1) != (wanted.density == 1) or problem.block != wanted.block:
                continue
            if _apart(problem, weight) > _ALIKE or record.copies > _COLDER * max(weight.copies, 1):
                continue
            if layout.sparse:
                stored = weight.stored_blocks(layout.block)
                if abs(record.stored_blocks - stored) > _ALIKE * stored:
                    continue
            yield record

    def _by_operator(self) -> dict[tuple[WeightedOperator, str], list[Record]]:
        found: dict[tuple[WeightedOperator, str], list[Record]] = {}
        for record in self._newest.values():
            found.setdefault((record.problem.op, record.problem.target), []).append(record)
        return found


def nearest(tokens: int, measured: Iterable[int]) -> int | None:
    """The number among those measured that stands for this one; None if none is near."""
    distance = {count: abs(math.log(count / tokens)) for count in measured}
    best = min(distance, key=lambda count: (distance[count], count), default=None)
    return best if best is not None and distance[best] <= math.log(_NEAR_TOKENS) else None


def read_records(
    paths: Sequence[str | os.PathLike[str]], cpu: str | None = None, *, any_version: bool = False
) -> Records:
    """Read record files.

    Parameters
    ----------
    cpu : str | None
        The CPU that records have to be of; None for any.
    any_version : bool
        Read records of other versions of this package and of TVM too.

    Raises
    ------
    OptionError
        When a file cannot be read.
    """
    records, running = Records(), here()
    for path in map(Path, paths):
        try:
            lines = path.read_bytes().splitlines()
        except OSError as error:
            raise OptionError(f"{path}: cannot be read: {error.strerror or error}") from error
        damaged: list[str] = []
        others: Counter[str] = Counter()
        for number, line in enumerate(lines, 1):
            try:
                record = _read(line)
            except ValueError as error:
                if line.strip():
                    damaged.append(f"{path}:{number}: passed over: {error}")
                continue
            source = record.provenance
            if not any_version and not source.same_kernels(running):
                others[f"of sparse-tvm {source.sparse_tvm} with TVM {source.tvm}"] += 1
            elif cpu is not None and source.cpu != cpu:
                others[f"of another CPU, {source.cpu}"] += 1
            else:
                records.add(record)
        more = len(damaged) - _DAMAGED_SHOWN
        records.damaged += len(damaged)
        records.remarks += damaged[:_DAMAGED_SHOWN]
        if more > 0:
            records.remarks.append(f"{path}: passed over: {more} more damaged lines")
        records.remarks += [
            f"{path}: passed over: {count} record{'s' * (count > 1)} {which}"
            for which, count in others.items()
        ]
    return records


def _read(line: bytes) -> Record | ScheduleRecord:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError("it is not JSON") from error
    if isinstance(value, dict) and value.get("version") != VERSION:
        raise ValueError(f"it is of version {value.get('version')!r}, not {VERSION}")
    schedule = isinstance(value, dict) and "schedule" in value
    return ScheduleRecord.from_json(value) if schedule else Record.from_json(value)


def append_record(path: str | os.PathLike[str], record: Record | ScheduleRecord) -> None:
    """Add a line to a file, on a line of its own even if the last one was cut off.

    It is on the disk when this returns.

    Raises
    ------
    OutputError
        When the file cannot be written.
    """
    try:
        with Path(path).open("ab+") as file:
            if (
                file.seek(0, os.SEEK_END)
                and file.seek(-1, os.SEEK_END) + 1
                and file.read() != b"\n"
            ):
                file.write(b"\n")
            file.write(_line(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def tidy(path: str | os.PathLike[str]) -> None:
    """Bring a file's records into their order, the newest of each kind.

    A file with damaged lines stays as it is: they may be somebody's to mend.

    Raises
    ------
    OutputError
        When the file cannot be written.
    """
    records = read_records([path], any_version=True)
    if records.damaged:
        return
    with replacing(path) as temporary:
        lines = [_line(record) + "\n" for record in (*records, *records.schedules)]
        temporary.write_text("".join(lines), encoding="utf-8")


def _line(record: Record | ScheduleRecord) -> str:
    return json.dumps(record.as_json(), sort_keys=True)


def _rank(record: Record) -> tuple[str, float, str]:
    """Newer is greater, then faster, then anything that does not depend on the order."""
    slowness = math.inf if record.seconds is None else record.seconds
    return (record.provenance.date, -slowness, _line(record))


def _apart(problem: Problem, weight: WeightStatistics) -> float:
    """How much more, or less, of the weight is stored, relatively."""
    density = weight.nonzeros / (weight.shape[0] * weight.shape[1])
    return abs(problem.density - density) / max(density, 1e-9)
