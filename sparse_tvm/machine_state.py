"""How fast a machine's clock is, and what the machine says of it and of its heat.

What it says is read from Linux's sysfs. Any file may be missing, be refused or hold anything: then
that is unknown. A :class:`Clock` needs nobody's permission. Runs on boards too, so it needs nothing
but NumPy.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import numpy as np

_T = TypeVar("_T")

SYSFS = Path("/sys")
_FIRMWARE = "devices/platform/soc*/soc*:firmware/get_throttled"  # of a Raspberry Pi
_FIRMWARE_FLAGS = ("undervoltage", "frequency capped", "throttled", "soft temperature limit")
_UNDERVOLTAGE = 1
_SINCE_BOOT = 16
"""The bit from which on the flags tell what happened since the machine was started."""

_PERFORMANCE = "performance"


class Zone(TypedDict):
    """Where a temperature is measured, and at which one the kernel slows the machine down."""

    name: str
    celsius: float
    passive: float | None


class State(TypedDict):
    """What a machine says of one of its CPUs; None where that is unknown.

    ``mhz`` is the clock's frequency, ``least_mhz`` and ``most_mhz`` are what it may be now, and
    ``highest_mhz`` is what the CPU is made for. ``throttled`` counts how often heat has slowed the
    core down, ``firmware`` are a Raspberry Pi's flags.
    """

    cpu: int
    governor: str | None
    mhz: float | None
    least_mhz: float | None
    most_mhz: float | None
    highest_mhz: float | None
    zones: list[Zone]
    throttled: int | None
    firmware: int | None


def read_state() -> State:
    """Read what the machine says of the CPU that this thread is on."""
    number = _this_cpu()
    cpu = SYSFS / f"devices/system/cpu/cpu{number}"
    frequency = cpu / "cpufreq"
    return {
        "cpu": number,
        "governor": _read(frequency / "scaling_governor", _word),
        "mhz": _read(frequency / "scaling_cur_freq", _mhz),
        "least_mhz": _read(frequency / "scaling_min_freq", _mhz),
        "most_mhz": _read(frequency / "scaling_max_freq", _mhz),
        "highest_mhz": _read(frequency / "cpuinfo_max_freq", _mhz),
        "zones": _zones(),
        "throttled": _read(cpu / "thermal_throttle/core_throttle_count", _natural),
        "firmware": next((_read(path, _hexadecimal) for path in SYSFS.glob(_FIRMWARE)), None),
    }


def says_nothing(state: State) -> bool:
    """Whether all is unknown."""
    return all(value in (None, []) for name, value in state.items() if name != "cpu")


def signs(state: State, margin: float = 0.0) -> list[str]:
    """Why the machine is slowed down at this moment, as it says itself, or so many °C below."""
    found = [
        f"{zone['name']} is at {zone['celsius']:.1f} °C, and slowed down from "
        f"{zone['passive']:.1f} °C on"
        for zone in state["zones"]
        if zone["passive"] is not None and zone["celsius"] >= zone["passive"] - margin
    ]
    if now := _flags(state["firmware"] or 0):
        found.append(f"its firmware says: {', '.join(now)}")
    return found


def doubts(state: State) -> list[str]:
    """Why its clock may be low, or may move, whatever runs on it: sentences."""
    found, governor = [], state["governor"]
    if governor not in (None, _PERFORMANCE):
        found.append(
            f"the governor of CPU {state['cpu']} is {governor}{_frequency(state)}: its clock may "
            f"move or stay low, which `{USE_PERFORMANCE}` prevents"
        )
    elif (state["most_mhz"] or math.inf) < (state["highest_mhz"] or 0):
        found.append(f"CPU {state['cpu']} may not be as fast as it can:{_frequency(state)}")
    if past := _flags((state["firmware"] or 0) >> _SINCE_BOOT):
        found.append(f"since the machine was started its firmware has seen: {', '.join(past)}")
    return found


def described(state: State) -> str:
    """All that is known."""
    found = []
    if frequency := _frequency(state):
        found.append(f"CPU {state['cpu']}{frequency}")
    if state["governor"] is not None:
        found.append(f"governor {state['governor']}")
    for zone in state["zones"]:
        limit = f" (slowed down from {zone['passive']:.1f} on)" if zone["passive"] else ""
        found.append(f"{zone['name']} {zone['celsius']:.1f} °C{limit}")
    if state["throttled"] is not None:
        found.append(f"slowed down {state['throttled']} times because of heat")
    if state["firmware"] is not None:
        flags = ", ".join(_flags(state["firmware"])) or "nothing"
        found.append(f"firmware says {flags} (0x{state['firmware']:x})")
    return ", ".join(found) or "the machine says nothing of its frequency and its temperature"


def remedies(state: State) -> list[str]:
    """What may help a machine that is slowed down."""
    found = ["cool it"]
    if (state["firmware"] or 0) & _UNDERVOLTAGE:
        found.append("give it a stronger power supply")
    if state["governor"] != _PERFORMANCE:
        found.append(f"`{USE_PERFORMANCE}`")
    return found


USE_PERFORMANCE = f"cpupower frequency-set -g {_PERFORMANCE}"


class Clock:
    """The time of a fixed number of cycles.

    Sums of which each needs the one before it, in the first cache: neither memory nor another
    thread on the same core changes how many cycles that takes. The fastest of many passes counts,
    so one that is interrupted does not.
    """

    _VALUES, _CALLS = 1024, 20
    _SECONDS, _PATIENCE = 1e-3, 0.1
    """How long it looks, and at most: until it is about as fast as it was, which takes a core a
    while that has slept, or that shares its power with others that worked until now."""

    _ABOUT = 1.2

    def __init__(self) -> None:
        self._values = np.full(self._VALUES, 0.5)
        self._sums = np.empty_like(self._values)
        self._best = 0.0

    def __call__(self) -> float:
        """Seconds of a pass; what matters is how they change."""
        started, seconds = time.perf_counter(), math.inf
        while True:
            seconds = min(seconds, self._pass())
            passed = time.perf_counter() - started
            near = seconds <= self._best * self._ABOUT
            if passed > (self._SECONDS if near else self._PATIENCE):
                break
        self._best = min(self._best or seconds, seconds)
        return seconds

    def _pass(self) -> float:
        started = time.perf_counter()
        for _ in range(self._CALLS):
            np.add.accumulate(self._values, out=self._sums)
        return time.perf_counter() - started


clock = Clock()
"""This process's."""


def observe() -> dict[str, Any]:
    """This machine's ``clock``, seconds of a pass, and its ``state``."""
    return {"clock": clock(), "state": read_state()}


def _zones() -> list[Zone]:
    """The temperatures by which the kernel itself slows a machine down."""
    found: list[Zone] = []
    for zone in sorted(SYSFS.glob("class/thermal/thermal_zone*")):
        celsius = _read(zone / "temp", _celsius)
        # Others' trip points are for a program that does as it likes.
        ours = _read(zone / "policy", _word) != "user_space"
        if celsius is None or not ours or _read(zone / "mode", _word) == "disabled":
            continue
        limits = [
            limit
            for kind in sorted(zone.glob("trip_point_*_type"))
            if _read(kind, _word) == "passive"
            and (limit := _read(kind.with_name(kind.name[: -len("type")] + "temp"), _celsius))
            and limit > 0  # otherwise it is not set
        ]
        name = _read(zone / "type", _word) or zone.name
        found.append({"name": name, "celsius": celsius, "passive": min(limits, default=None)})
    return found


def _frequency(state: State) -> str:
    """In words, with a space before them; nothing if it is unknown."""
    now, least, most = state["mhz"], state["least_mhz"], state["most_mhz"]
    words = "" if now is None else f" at {now:.0f} MHz"
    if least is not None and most is not None:
        words += f" of {least:.0f} to {most:.0f} MHz that are allowed"
    highest = state["highest_mhz"]
    if most is not None and highest is not None and most < highest:
        words += f", of {highest:.0f} MHz that it can"
    return words


def _flags(firmware: int) -> list[str]:
    return [name for bit, name in enumerate(_FIRMWARE_FLAGS) if firmware >> bit & 1]


def _read(path: Path, parse: Callable[[str], _T]) -> _T | None:
    """What a file says; None if that is unknown."""
    try:
        return parse(path.read_text(encoding="utf-8").strip())
    except (OSError, ValueError):  # of which UnicodeDecodeError is one
        return None


def _word(text: str) -> str:
    if not text or not text.isprintable():
        raise ValueError(text)
    return text


def _natural(text: str, base: int = 10) -> int:
    number = int(text, base)
    if number < 0:
        raise ValueError(text)
    return number


def _hexadecimal(text: str) -> int:
    return _natural(text, 16)


def _mhz(text: str) -> float:
    """From kHz, of which drivers that do not know say 0."""
    khz = int(text)
    if khz <= 0:
        raise ValueError(text)
    return khz / 1e3


def _celsius(text: str) -> float:
    """From thousandths of a degree."""
    return int(text) / 1e3


def _this_cpu() -> int:
    try:
        return max(0, int(ctypes.CDLL(None).sched_getcpu()))
    except (AttributeError, OSError, TypeError):  # not with every C library
        return 0
