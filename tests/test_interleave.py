"""Engines take turns."""

from __future__ import annotations

from functools import partial
from itertools import groupby

import pytest

from sparse_tvm.interleave import interleave


@pytest.mark.parametrize(("duration", "block", "turns"), [(0.025, 0.01, 3), (0.01, 0.5, 1)])
def test_engines_take_turns_of_one_block(duration: float, block: float, turns: int) -> None:
    ran: list[str] = []
    runs = {name: partial(ran.append, name) for name in "ab"}
    times = interleave(runs, duration=duration, block=block)
    assert [name for name, _ in groupby(ran)] == list("ab") * turns
    # The first run of each turn does not count.
    assert {name: len(found) + turns for name, found in times.items()} == {
        name: ran.count(name) for name in "ab"
    }
