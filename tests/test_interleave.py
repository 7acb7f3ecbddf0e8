"""Engines take turns."""

from __future__ import annotations

from functools import partial

from sparse_tvm.interleave import interleave


def test_engines_take_turns_of_one_block() -> None:
    ran: list[str] = []
    runs = {name: partial(ran.append, name) for name in "ab"}
    times = interleave(runs, duration=3e-9, block=1e-9)
    assert "".join(ran) == "aabb" * 3  # of each pair, the first run is not counted
    assert [len(seconds) for seconds in times.values()] == [3, 3]
