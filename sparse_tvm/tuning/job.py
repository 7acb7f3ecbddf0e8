"""What a worker is told to do."""

from __future__ import annotations

from typing import Any, TypedDict


class Job(TypedDict):
    """A candidate to measure.

    ``call`` is the operator with the layout, as the codec writes it; ``weight`` a ``.npy`` file of
    the matrix ``[N, K]``; ``leading`` the activations' other extents, null where they are free;
    ``copies`` of the weight take turns; ``seconds`` is how long each timing may take.
    """

    backend: str
    target: str
    operator: str
    call: dict[str, Any]
    leading: list[int | None]
    weight: str
    tokens: list[int]
    threads: list[int]
    copies: int
    seconds: float
