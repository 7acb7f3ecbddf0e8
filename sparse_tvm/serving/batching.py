"""How requests of one model join into one run, and how its outputs come apart again.

Everything follows from the names of symbolic dimensions in the model's specs. Requests join along
the first axis when all inputs and outputs share its name. Where the model has an attention mask,
requests of different lengths are padded to the longest: padding is masked, so it changes results
by rounding only. Without a mask, only requests of equal lengths join.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from sparse_tvm.spec import TensorSpec

_MAX_PADDED = 1.25
"""A padded batch may take this many times the tokens of its requests: beyond, padding costs more
than a run of their own."""


@dataclass(frozen=True)
class Tensors:
    """The inputs of one request.

    Parameters
    ----------
    arrays : tuple[np.ndarray, ...]
        In the model's order, checked against its specs.
    sizes : Mapping[str, int]
        What the symbolic dimensions stand for.
    """

    arrays: tuple[np.ndarray, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """Which axes of a model's tensors requests join along.

    Parameters
    ----------
    inputs, outputs : tuple[TensorSpec, ...]
        The model's specs.
    batch : str | None
        The symbolic dimension along which requests are put one after the other.
    sequence : str | None
        The symbolic dimension along which they are padded.
    mask : int | None
        The input that says which positions count.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch: str | None
    sequence: str | None
    mask: int | None

    @classmethod
    def of(cls, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Layout:
        """Return the freest layout that the names of the dimensions allow."""
        batch = _batch_symbol([*inputs, *outputs])
        sequence, mask = _sequence_symbol(inputs, outputs, batch) if batch else (None, None)
        return cls(tuple(inputs), tuple(outputs), batch, sequence, mask)

    def without_padding(self) -> Layout:
        """Return the layout in which only requests of equal lengths join."""
        return replace(self, sequence=None, mask=None)

    def without_batching(self) -> Layout:
        """Return the layout in which every request runs alone."""
        return replace(self, batch=None, sequence=None, mask=None)

    def rows(self, tensors: Tensors) -> int:
        """Return how many rows of a batch a request takes."""
        return tensors.sizes[self.batch] if self.batch else 1

    def choose(self, waiting: Iterable[Tensors], max_rows: int) -> list[int]:
        """Return which of the waiting requests run next, together with the first.

        Those of nearly equal length are taken first, and none that would cost more by padding
        than it saves.
        """
        requests = iter(waiting)
        first = next(requests)
        chosen = [0]
        rows = self.rows(first)
        if self.batch is None or rows >= max_rows:
            return chosen
        length = self._length(first)
        mates = [
            (abs(self._length(other) - length), index, other)
            for index, other in enumerate(requests, 1)
            if self._join(first, other)
        ]
        longest, tokens = length, rows * length
        for _, index, other in sorted(mates, key=lambda mate: mate[:2]):
            more, its = self.rows(other), self._length(other)
            padded = (rows + more) * max(longest, its)
            if rows + more > max_rows or padded > _MAX_PADDED * (tokens + more * its):
                continue
            chosen.append(index)
            rows, longest, tokens = rows + more, max(longest, its), tokens + more * its
            if rows == max_rows:
                break
        return chosen

    def shapes(self, requests: Sequence[Tensors]) -> list[tuple[str, list[int]]]:
        """Return dtype and shape of every input of the joined run."""
        sizes = dict(requests[0].sizes)
        if self.batch:
            sizes[self.batch] = sum(map(self.rows, requests))
        if self.sequence:
            sizes[self.sequence] = max(map(self._length, requests))
        return [
            (spec.dtype, [sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape])
            for spec in self.inputs
        ]

    def fill(self, requests: Sequence[Tensors], places: Sequence[np.ndarray]) -> None:
        """Write the inputs of all requests into `places`, arrays of :meth:`shapes`."""
        for index, (spec, place) in enumerate(zip(self.inputs, places, strict=True)):
            if self.sequence in spec.shape and len(requests) > 1:
                place.fill(0)
            row = 0
            for request in requests:
                array = request.arrays[index]
                if self.batch is None:
                    np.copyto(place, array)
                    break
                part = (slice(row, row + len(array)), *map(slice, array.shape[1:]))
                place[part] = array
                row += len(array)

    def split(
        self, requests: Sequence[Tensors], outputs: Sequence[np.ndarray]
    ) -> list[list[np.ndarray]]:
        """Return every request's own outputs, as copies."""
        results: list[list[np.ndarray]] = []
        row = 0
        for request in requests:
            rows = self.rows(request)
            results.append(
                [
                    output[self._part(spec, request, row, row + rows)].copy()
                    for spec, output in zip(self.outputs, outputs, strict=True)
                ]
            )
            row += rows
        return results

    def _part(self, spec: TensorSpec, request: Tensors, start: int, stop: int) -> tuple[slice, ...]:
        if self.batch is None:
            return ()
        lengths = [
            slice(self._length(request)) if dim == self.sequence else slice(None)
            for dim in spec.shape[1:]
        ]
        return (slice(start, stop), *lengths)

    def _length(self, request: Tensors) -> int:
        return request.sizes[self.sequence] if self.sequence else 1

    def _join(self, one: Tensors, other: Tensors) -> bool:
        """Whether two requests differ in nothing but what is joined or padded."""
        free = {self.batch, self.sequence}
        if any(size != other.sizes[name] for name, size in one.sizes.items() if name not in free):
            return False
        return self.mask is None or (self._maskable(one) and self._maskable(other))

    def _maskable(self, request: Tensors) -> bool:
        """Whether every row has a position that counts; else padding would change its result."""
        return self.mask is not None and bool(request.arrays[self.mask].any(axis=1).all())


def _batch_symbol(specs: Sequence[TensorSpec]) -> str | None:
    first = {spec.shape[0] if spec.shape else None for spec in specs}
    symbol = first.pop()
    again = any(symbol in spec.shape[1:] for spec in specs)
    return symbol if not first and isinstance(symbol, str) and not again else None


def _sequence_symbol(
    inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], batch: str
) -> tuple[str | None, int | None]:
    """Return the dimension to pad and the index of the mask, where both are beyond doubt."""
    symbols = {dim for spec in inputs for dim in spec.shape[1:] if isinstance(dim, str)}
    derived = {dim for spec in outputs for dim in spec.shape[1:] if isinstance(dim, str)} - symbols
    if len(symbols) == 1 and not derived:
        symbol = symbols.pop()
        for index, spec in enumerate(inputs):
            if "mask" in spec.name.lower() and spec.shape == (batch, symbol):
                return symbol, index
    return None, None
