"""Machines whose clock falls while they are measured, for a moment or for good."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from pretended import CSR, SILENT, Pretender, job, layer_of, sparse_weight

from sparse_tvm.cli import main
from sparse_tvm.errors import ThrottledError
from sparse_tvm.machine_state import State
from sparse_tvm.tuning import throttling
from sparse_tvm.tuning.measuring import LIMIT_S, Measurer
from sparse_tvm.tuning.records import read_records
from sparse_tvm.tuning.throttling import SteadyMeasurer
from sparse_tvm.tuning.tuner import tune

W = sparse_weight()
JOB = job(layer_of(W), CSR, tokens=(1,))
HOT: State = {
    **SILENT,
    "governor": "ondemand",
    "mhz": 600.0,
    "zones": [{"name": "cpu-thermal", "celsius": 81.2, "passive": 80.0}],
    "firmware": 0x50005,
}


class Machine:
    """One whose clock, and what it says, follow a script: an item a look, the last one for ever."""

    def __init__(
        self, clocks: Iterable[float] = (1.0,), states: Iterable[State] = (SILENT,), **options: Any
    ) -> None:
        self.clocks, self.states = list(clocks), list(states)
        self.notices: list[str] = []
        self.slept: list[float] = []
        self.pretender = Pretender(lambda layout: 1e-3, 0, *map(self._next, (clocks, states)))
        self.steady = SteadyMeasurer(
            self.pretender,
            lambda notice: self.notices.append(notice.text),
            sleep=self.slept.append,
            **options,
        )

    @staticmethod
    def _next(script: Iterable[Any]) -> Callable[[], Any]:
        left = list(script)
        return lambda: left.pop(0) if len(left) > 1 else left[0]

    def measure(self) -> dict[str, Any]:
        """Measure once; the first time, the machine is looked at before."""
        (result,) = self.steady(JOB, W)["results"]
        return dict(result)

    @property
    def measured(self) -> int:
        return len(self.pretender.jobs)


def test_a_steady_clock_costs_nothing():
    machine = Machine([1.0, 1.02, 1.14, 1.0])  # an eighth, as neighbours take
    assert [machine.measure()["pace"] for _ in range(3)] == pytest.approx([1 / 1.02, 1 / 1.14, 1])
    assert machine.measured == 3
    assert machine.slept == []
    assert list(machine.steady.remarks()) == []
    (notice,) = machine.notices
    assert notice.startswith("this machine says nothing of its frequency and its temperature")


def test_a_moment_is_measured_again():
    machine = Machine([1.0, 2.0, 1.0])
    assert machine.measure()["pace"] == 1
    assert machine.measured == 2
    assert machine.slept == [0.5]
    assert len(machine.notices) == 1
    (remark,) = machine.steady.remarks()
    assert remark.startswith("made again, because this machine was slowed down: 1 measurements")


def test_seconds_of_noise_are_waited_for_and_shown():
    machine = Machine([1.0, *[2.0] * 4, 1.0])
    assert machine.measure()["pace"] == 1
    assert machine.slept == [0.5, 2.0, 5.0, 10.0]
    assert [text.partition("waiting ")[2] for text in machine.notices[1:]] == [
        "2 s (1 of 6)",
        "5 s (2 of 6)",
        "10 s (3 of 6)",
    ]
    assert "its clock has 50% of its best pace" in machine.notices[1]


def test_noise_over_and_over_never_ends_it():
    machine = Machine([1.0] + [2.0, 1.0, 1.0] * 100)
    for _ in range(50):
        assert machine.measure()["pace"] == 1
    assert set(machine.slept) == {0.5}


def test_a_lasting_fall_ends_it():
    machine = Machine([1.0, 2.0])
    with pytest.raises(ThrottledError, match=r"this machine is still slowed down after 128 s"):
        machine.measure()
    assert machine.measured == 1
    assert machine.slept == list(throttling._PAUSES)


def test_a_host_that_has_more_to_do_does_not_end_it():
    machine = Machine([1.0, 1.4])
    assert machine.measure()["pace"] == pytest.approx(1 / 1.4)
    waited, told = list(machine.slept), list(machine.notices)
    assert "a clock is good enough that has 67% of its best pace" in told[-1]
    assert machine.measure()["pace"] == pytest.approx(1 / 1.4)
    assert (machine.slept, machine.notices) == (waited, told)  # that is waited for once


@pytest.mark.parametrize("state", [{**SILENT, "throttled": 8}, {**SILENT, "firmware": 4}])
def test_the_same_fall_of_a_machine_that_says_why_ends_it(state):
    machine = Machine([1.0, 1.4], [{**SILENT, "throttled": 7}, state])
    with pytest.raises(ThrottledError):
        machine.measure()


def test_counts_of_other_cpus_say_nothing():
    elsewhere: State = {**SILENT, "cpu": 1, "throttled": 9}
    machine = Machine([1.0, 1.4], [{**SILENT, "throttled": 7}, elsewhere])
    assert machine.measure()["pace"] == pytest.approx(1 / 1.4)


def test_a_clock_that_falls_whenever_it_works_ends_it():
    machine = Machine([1.0] + [2.0, 1.0] * 10)
    with pytest.raises(ThrottledError, match="whenever it measures, 4 times in turn"):
        machine.measure()
    assert machine.measured == 4


def test_a_hot_machine_is_let_cool_first():
    cooler: State = {**SILENT, "zones": [{"name": "cpu", "celsius": 78.0, "passive": 80.0}]}
    cool: State = {**SILENT, "zones": [{"name": "cpu", "celsius": 76.0, "passive": 80.0}]}
    machine = Machine(states=[HOT, HOT, cooler, cool])
    assert machine.measure()["pace"] == 1
    assert machine.measured == 1
    assert machine.slept == [0.5, 2.0, 5.0]


def test_a_machine_that_stays_hot_is_told_what_to_do():
    with pytest.raises(ThrottledError) as caught:
        Machine(states=[HOT]).measure()
    for said in (
        "still slowed down after 128 s",
        "cpu-thermal 81.2 °C (slowed down from 80.0 on)",
        "at 600 MHz",
        "governor ondemand",
        "firmware says undervoltage, throttled (0x50005)",
        "cool it",
        "stronger power supply",
        "`cpupower frequency-set -g performance`",
        "fewer threads",
        "--ignore-throttling",
    ):
        assert said in str(caught.value)


def test_it_goes_on_regardless_where_that_is_asked_for():
    machine = Machine([1.0, 2.0], [HOT], ignore=True)
    assert machine.measure()["pace"] == 0.5
    assert machine.slept == []
    assert any("cpu-thermal is at 81.2 °C" in notice for notice in machine.notices)
    (remark,) = machine.steady.remarks()
    assert remark == "made while this machine was slowed down: 1 measurements"


def test_what_was_measured_is_kept_with_its_pace(tmp_path, model, monkeypatch):
    monkeypatch.setattr(throttling, "_PAUSES", (0.0, 0.0))
    path = tmp_path / "records.jsonl"
    falling = iter([1.0, 1.0, 1.05])
    pretender = Pretender(lambda layout: 1e-3, clock=lambda: next(falling, 3.0))
    with pytest.raises(ThrottledError):
        tune(model, path, tokens=[1], threads=[1], measurer=pretender)
    assert [record.provenance.pace for record in read_records([path])] in (
        [1.0, pytest.approx(1 / 1.05)],
        [pytest.approx(1 / 1.05), 1.0],
    )


WORKER = """
from pathlib import Path
from sparse_tvm import machine_state
from sparse_tvm.tuning.worker import serve

machine_state.SYSFS = Path({directory!r})
machine_state.Clock.__call__ = lambda self: float((machine_state.SYSFS / "clock").read_text())
serve()
"""


@pytest.fixture
def board(tmp_path, monkeypatch):
    """A directory whose ``clock`` is what the worker of the next command counts, without a unit."""
    directory = tmp_path / "sys"
    zone = directory / "class/thermal/thermal_zone0"
    zone.mkdir(parents=True)
    for name, content in {
        "clock": "1.0",
        f"{zone}/type": "cpu-thermal",
        f"{zone}/temp": "85000",
        f"{zone}/trip_point_0_type": "passive",
        f"{zone}/trip_point_0_temp": "80000",
    }.items():
        (directory / name).write_text(content)
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(directory=str(directory)))
    command = [sys.executable, str(script)]
    monkeypatch.setattr(Measurer.__init__, "__defaults__", (command, LIMIT_S))
    monkeypatch.setattr(throttling, "_PAUSES", (0.01, 0.02))
    return directory


def command(model: str, records: Path, *more: str) -> list[str]:
    some = ["--layer", "w1", "--tokens", "4", "--threads", "1", "--trials", "2"]
    return ["tune", model, "-o", str(records), *some, *more]


def test_a_hot_machine_is_not_measured(tmp_path, model, board, capsys):
    records = tmp_path / "records.jsonl"
    assert main(command(model, records)) == 1
    told = capsys.readouterr().err
    assert "waiting 0.02 s (1 of 1)" in told
    assert "error: this machine is still slowed down after" in told
    assert "cpu-thermal 85.0 °C (slowed down from 80.0 on)" in told
    assert not records.exists()
    assert main(command(model, records, "--ignore-throttling")) == 0
    assert "note: " in capsys.readouterr().err
    assert len(read_records([records])) == 2


def test_a_clock_that_falls_is_noticed_in_the_worker(board):
    (board / "class/thermal/thermal_zone0/temp").unlink()
    notices: list[str] = []

    def recover(seconds: float) -> None:
        (board / "clock").write_text("1.0")

    with Measurer() as measurer:
        steady = SteadyMeasurer(measurer, lambda one: notices.append(one.text), sleep=recover)
        (first,) = steady(JOB, W)["results"]
        (board / "clock").write_text("1.5")
        (second,) = steady(JOB, W)["results"]
    assert first["pace"] == second["pace"] == 1
    assert len(notices) == 1  # that it says nothing
    assert list(steady.remarks())
