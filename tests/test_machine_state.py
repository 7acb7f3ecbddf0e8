"""What a machine says of its clock and its heat, whatever its files hold."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from sparse_tvm import machine_state
from sparse_tvm.diagnosis import diagnose
from sparse_tvm.machine_state import (
    Clock,
    described,
    doubts,
    observe,
    read_state,
    remedies,
    says_nothing,
    signs,
)

CPU = "devices/system/cpu/cpu{}"
FIRMWARE = "devices/platform/soc/soc:firmware/get_throttled"
ZONE = "class/thermal/thermal_zone0"
BOARD = {
    f"{CPU}/cpufreq/scaling_governor": "ondemand\n",
    f"{CPU}/cpufreq/scaling_cur_freq": "1500000\n",
    f"{CPU}/cpufreq/scaling_min_freq": "600000\n",
    f"{CPU}/cpufreq/scaling_max_freq": "1500000\n",
    f"{CPU}/cpufreq/cpuinfo_max_freq": "1500000\n",
    f"{CPU}/thermal_throttle/core_throttle_count": "3\n",
    f"{ZONE}/type": "cpu-thermal\n",
    f"{ZONE}/temp": "61234\n",
    f"{ZONE}/mode": "enabled\n",
    f"{ZONE}/policy": "step_wise\n",
    f"{ZONE}/trip_point_0_type": "passive\n",
    f"{ZONE}/trip_point_0_temp": "80000\n",
    f"{ZONE}/trip_point_1_type": "critical\n",
    f"{ZONE}/trip_point_1_temp": "40000\n",
    FIRMWARE: "0\n",
}


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine_state, "SYSFS", tmp_path)
    return tmp_path


def fill(sysfs: Path, files: Mapping[str, str | bytes]) -> None:
    """Write files, for whichever CPU this runs on."""
    for name, content in files.items():
        for cpu in range(256) if "{}" in name else [0]:
            path = sysfs / name.format(cpu)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_a_board_tells_all(sysfs: Path) -> None:
    fill(sysfs, BOARD)
    state = read_state()
    assert state == {
        "cpu": state["cpu"],
        "governor": "ondemand",
        "mhz": 1500,
        "least_mhz": 600,
        "most_mhz": 1500,
        "highest_mhz": 1500,
        "zones": [{"name": "cpu-thermal", "celsius": 61.234, "passive": 80}],
        "throttled": 3,
        "firmware": 0,
    }
    assert signs(state) == []
    assert not says_nothing(state)
    text = described(state)
    assert "at 1500 MHz of 600 to 1500 MHz" in text
    assert "cpu-thermal 61.2 °C" in text
    assert "3 times because of heat" in text
    assert "firmware says nothing (0x0)" in text


def silent() -> bool:
    state = read_state()
    nothing = says_nothing(state) and signs(state) == doubts(state) == []
    return nothing and described(state).startswith("the machine says nothing")


def test_what_is_absent_is_unknown(sysfs: Path) -> None:
    assert silent()


def test_what_is_refused_is_unknown(sysfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object, **options: object) -> str:
        raise PermissionError("no")

    fill(sysfs, BOARD)
    monkeypatch.setattr(Path, "read_text", refused)
    assert silent()


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe", b"<unknown>\0", b"-5 5", b"\0" * 9])
def test_garbage_is_unknown(sysfs: Path, content: bytes) -> None:
    fill(sysfs, dict.fromkeys(BOARD, content))
    state = read_state()
    assert state["mhz"] is state["firmware"] is state["throttled"] is None
    assert state["zones"] == signs(state) == []
    described(state)
    doubts(state)


def test_directories_in_their_places_are_unknown(sysfs: Path) -> None:
    for name in BOARD:
        (sysfs / name.format(0)).mkdir(parents=True)
    assert silent()


def test_negative_counts_are_unknown(sysfs: Path) -> None:
    count = f"{CPU}/thermal_throttle/core_throttle_count"
    fill(sysfs, {FIRMWARE: "-1", count: "-1", f"{CPU}/cpufreq/scaling_cur_freq": "0"})
    assert silent()


@pytest.mark.parametrize(
    ("changed", "hot"),
    [
        ({f"{ZONE}/temp": "80000"}, True),
        ({f"{ZONE}/temp": "79999"}, False),
        ({f"{ZONE}/temp": "85000", f"{ZONE}/policy": "user_space"}, False),
        ({f"{ZONE}/temp": "85000", f"{ZONE}/mode": "disabled"}, False),
        ({f"{ZONE}/temp": "85000", f"{ZONE}/trip_point_0_temp": "0"}, False),
        ({f"{ZONE}/temp": "85000", f"{ZONE}/trip_point_0_temp": "what"}, False),
        ({f"{ZONE}/temp": "85000", f"{ZONE}/mode": "", f"{ZONE}/policy": ""}, True),
    ],
)
def test_hot_is_where_the_kernel_slows_it_down(
    sysfs: Path, changed: dict[str, str], hot: bool
) -> None:
    fill(sysfs, {**BOARD, **changed})
    found = signs(read_state())
    assert bool(found) == hot
    assert all("cpu-thermal is at 8" in sign and "from 80.0 °C on" in sign for sign in found)


def test_after_a_pause_it_is_to_be_cooler_than_that(sysfs: Path) -> None:
    fill(sysfs, {**BOARD, f"{ZONE}/temp": "78000"})
    assert not signs(read_state())
    assert signs(read_state(), margin=3)


@pytest.mark.parametrize(
    ("flags", "sign", "doubt"),
    [
        ("1", "undervoltage", ""),
        ("0x6", "frequency capped, throttled", ""),
        ("8", "soft temperature limit", ""),
        ("50000", "", "undervoltage, throttled"),
        ("50005", "undervoltage, throttled", "undervoltage, throttled"),
    ],
)
def test_flags_of_a_raspberry_pi(sysfs: Path, flags: str, sign: str, doubt: str) -> None:
    fill(sysfs, {FIRMWARE: flags})
    state = read_state()
    assert signs(state) == ([f"its firmware says: {sign}"] if sign else [])
    assert bool(doubts(state)) == bool(doubt)
    assert doubt in " ".join(doubts(state))
    assert any("power supply" in remedy for remedy in remedies(state)) == (int(flags, 16) & 1)


def test_a_governor_that_holds_the_clock_low(sysfs: Path) -> None:
    low = {f"{CPU}/cpufreq/scaling_governor": "powersave"}
    low |= {f"{CPU}/cpufreq/scaling_cur_freq": "600000"}
    fill(sysfs, {**BOARD, **low})
    (doubt,) = doubts(read_state())
    assert "is powersave at 600 MHz of 600 to 1500 MHz" in doubt
    assert "`cpupower frequency-set -g performance`" in doubt
    assert doubt in diagnose()["problems"]


def test_a_frequency_that_is_capped(sysfs: Path) -> None:
    capped = {f"{CPU}/cpufreq/scaling_governor": "performance"}
    fill(sysfs, {**BOARD, **capped})
    assert doubts(read_state()) == []
    fill(sysfs, {f"{CPU}/cpufreq/scaling_max_freq": "1000000"})
    (doubt,) = doubts(read_state())
    assert "of 600 to 1000 MHz that are allowed, of 1500 MHz that it can" in doubt
    assert not any("cpupower" in remedy for remedy in remedies(read_state()))


def test_a_clock_takes_little_time() -> None:
    clock = Clock()
    clock()
    started = time.perf_counter()
    assert clock() > 0
    assert time.perf_counter() - started < 1  # a millisecond where nothing disturbs
    assert set(observe()) == {"clock", "state"}


class Waking(Clock):
    """Of a core that has slept, and for so many passes is slow each time."""

    def __init__(self, slow: int) -> None:
        super().__init__()
        self.slow, self.passes = slow, 0

    def __call__(self) -> float:
        self.passes = 0
        return super().__call__()

    def _pass(self) -> float:
        self.passes += 1
        time.sleep(1e-3)
        return 2.0 if self.passes <= self.slow else 1.0


def test_a_core_gets_time_to_wake() -> None:
    clock = Waking(4)
    assert clock() == 1
    assert clock() == 1
    assert clock.passes == 5  # no longer than it needs
    clock.slow = 1000
    assert clock() == 2
