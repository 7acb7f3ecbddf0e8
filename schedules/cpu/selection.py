"""Kernels whose results are as long as the data wants them: non-zeros, boxes, different rows.

A result has room for all; ``count`` says how much of it counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.lane_tiles import Buffer, Expr, argument, local, prim_func, scalar

_INDEX = "int64"


def select_nonzero(shape: Sequence[Expr], dtype: str) -> tirx.PrimFunc:
    """Build the kernel x of ``shape`` -> positions ``[size]``, count ``[1]``."""
    size = prod(shape)
    with prim_func() as result:
        x = argument("x", shape, dtype)
        positions = argument("positions", (size,), _INDEX)
        count = argument("count", (1,), _INDEX)
        x = T.decl_buffer((size,), dtype, data=x.data)
        found = _counter()
        with T.serial(0, size) as i:
            # Without a branch: what is not to stay is overwritten.
            T.buffer_store(positions, T.Cast(_INDEX, i), [found[0]])
            _add(found, T.Cast(_INDEX, x[i] if dtype == "bool" else x[i] != tirx.const(0, dtype)))
        T.buffer_store(count, found[0], [0])
    return result["func"]


def hold_size(least: int, reader: str) -> tirx.PrimFunc:
    """Build the kernel size ``[1]`` -> the same, which raises where that is less than ``least``."""
    with prim_func() as result:
        size = argument("size", (1,), _INDEX)
        held = argument("held", (1,), _INDEX)
        message = f"{reader}: the tensor that it reads, whose size depends on the inputs, has fewer"
        with T.Assert(size[0] >= least, f"{message} than {least} elements there", "InputError"):
            T.buffer_store(held, size[0], [0])
    return result["func"]


def suppress_boxes(
    batch: Expr, classes: Expr, boxes: Expr, most: Expr, centred: bool
) -> tirx.PrimFunc:
    """Build the kernel that :class:`~sparse_tvm.operators.SuppressBoxes` tells of.

    The boxes of a class are a heap, the best on top: taken off one by one, each stays if no better
    one overlaps it, until there are enough.
    """
    with prim_func() as result:
        corners = argument("boxes", (batch, boxes, 4))
        scores = argument("scores", (batch, classes, boxes))
        limit = argument("limit", (1,), _INDEX)
        overlap = argument("overlap", (1,))
        least = argument("least", (1,))
        kept = argument("kept", (batch * classes * most, 3), _INDEX)
        count = argument("count", (1,), _INDEX)
        counts = T.alloc_buffer((batch * classes,), _INDEX)
        with T.parallel(0, batch * classes) as job:
            image, kind = scalar(job // classes, _INDEX), scalar(job % classes, _INDEX)
            heap = _Heap(T.alloc_buffer((boxes,), _INDEX), scores, image, kind)
            with T.serial(0, boxes) as i:
                heap.append_if(T.Cast(_INDEX, i), scores[image, kind, i] > least[0])
            heap.order()
            taken = _counter()
            wanted = scalar(tirx.min(limit[0], most), _INDEX)
            with T.While(tirx.all(heap.size[0] > 0, taken[0] < wanted)):
                best = heap.pop()
                free, better = _counter(1), _counter()
                with T.While(tirx.all(free[0] == 1, better[0] < taken[0])):
                    other = scalar(kept[job * most + better[0], 2], _INDEX)
                    apart = _apart(corners, image, best, other, overlap[0], centred)
                    T.buffer_store(free, T.Cast(_INDEX, apart), [0])
                    _add(better, 1)
                with T.If(free[0] == 1), T.Then():
                    for column, value in enumerate((image, kind, best)):
                        T.buffer_store(kept, value, [job * most + taken[0], column])
                    _add(taken, 1)
            T.buffer_store(counts, taken[0], [job])
        total = _counter()
        with T.serial(0, batch * classes) as job, T.serial(0, counts[job]) as i:
            for column in range(3):
                T.buffer_store(kept, kept[job * most + i, column], [total[0], column])
            _add(total, 1)
        T.buffer_store(count, total[0], [0])
    return result["func"]


class _Heap:
    """Boxes of a class, of which the first has the best score: of equal ones, the first."""

    def __init__(self, memory: Buffer, scores: Buffer, image: Expr, kind: Expr) -> None:
        self.size = _counter()
        self._boxes, self._scores, self._of = memory, scores, (image, kind)

    def append_if(self, box: Expr, condition: Expr) -> None:
        """Add a box, in no order yet."""
        T.buffer_store(self._boxes, box, [self.size[0]])
        _add(self.size, T.Cast(_INDEX, condition))

    def order(self) -> None:
        """Make a heap of what was added."""
        half = scalar(self.size[0] // 2, _INDEX)
        with T.serial(0, half) as i:
            self._sink(half - 1 - i)

    def pop(self) -> Expr:
        """Take the best box off."""
        best = scalar(self._boxes[0], _INDEX)
        _add(self.size, -1)
        T.buffer_store(self._boxes, self._boxes[self.size[0]], [0])
        self._sink(0)
        return best

    def _sink(self, start: Expr) -> None:
        """Move a box down, past all that are better."""
        boxes, size = self._boxes, self.size
        place, child = _counter(start), _counter(2 * start + 1)
        box = scalar(boxes[place[0]], _INDEX)
        with T.While(child[0] < size[0]):
            second = tirx.min(child[0] + 1, size[0] - 1)
            better = scalar(self._before(boxes[second], boxes[child[0]]), _INDEX)
            _add(child, better)
            with T.If(self._before(boxes[child[0]], box)):
                with T.Then():
                    T.buffer_store(boxes, boxes[child[0]], [place[0]])
                    T.buffer_store(place, child[0], [0])
                    T.buffer_store(child, 2 * child[0] + 1, [0])
                with T.Else():
                    T.buffer_store(child, size[0], [0])
        T.buffer_store(boxes, box, [place[0]])

    def _before(self, one: Expr, other: Expr) -> Expr:
        a, b = (self._scores[(*self._of, box)] for box in (one, other))
        return tirx.any(a > b, tirx.all(a == b, one < other))


def _apart(
    boxes: Buffer, image: Expr, one: Expr, other: Expr, overlap: Expr, centred: bool
) -> Expr:
    """Whether two boxes share no more than a part of what they cover together."""
    spans = [_spans(boxes, image, box, centred) for box in (one, other)]
    sides = [
        scalar(tirx.min(a[1], b[1]) - tirx.max(a[0], b[0]), "float32")
        for a, b in zip(*spans, strict=True)
    ]
    shared = scalar(sides[0] * sides[1], "float32")
    areas = [
        scalar((span[0][1] - span[0][0]) * (span[1][1] - span[1][0]), "float32") for span in spans
    ]
    covered = scalar(areas[0] + areas[1] - shared, "float32")
    zero = T.float32(0)
    none = tirx.any(sides[0] <= zero, sides[1] <= zero, covered <= zero)
    return tirx.any(none, areas[0] <= zero, areas[1] <= zero, shared / covered <= overlap)


def _spans(boxes: Buffer, image: Expr, box: Expr, centred: bool) -> list[tuple[Expr, Expr]]:
    """From where to where a box reaches, in both directions."""
    numbers = [scalar(boxes[image, box, i], "float32") for i in range(4)]
    if centred:
        half = [side * T.float32(0.5) for side in numbers[2:]]
        return [(c - h, c + h) for c, h in zip(numbers[:2], half, strict=True)]
    pairs = [(numbers[0], numbers[2]), (numbers[1], numbers[3])]
    return [(tirx.min(a, b), tirx.max(a, b)) for a, b in pairs]


def unique_rows(rows: Expr, size: Expr, dtype: str, ascending: bool) -> tirx.PrimFunc:
    """Build the kernel that :class:`~sparse_tvm.operators.UniqueRows` tells of.

    Rows are sorted by merging, which leaves equal ones in order; neighbours are then compared.
    """
    with prim_func() as result:
        x = argument("x", (rows, size), dtype)
        first, inverse, counts = (
            argument(name, (rows,), _INDEX) for name in ("first", "inverse", "counts")
        )
        count = argument("count", (1,), _INDEX)
        order, number = (T.alloc_buffer((rows,), _INDEX) for _ in range(2))
        _merge_sort(x, order, number, rows, size)
        groups = _counter()
        with T.serial(0, rows) as i:
            here = scalar(order[i], _INDEX)
            before = scalar(order[tirx.max(i - 1, 0)], _INDEX)
            with T.If(tirx.any(i == 0, _compare(x, before, here, size) != 0)), T.Then():
                T.buffer_store(first, here, [groups[0]])
                _add(groups, 1)
            T.buffer_store(inverse, groups[0] - 1, [here])
        if not ascending:
            _by_appearance(first, inverse, number, rows)
        with T.serial(0, rows) as i:
            T.buffer_store(counts, tirx.const(0, _INDEX), [i])
        with T.serial(0, rows) as i:
            T.buffer_store(counts, counts[inverse[i]] + 1, [inverse[i]])
        T.buffer_store(count, groups[0], [0])
    return result["func"]


def _merge_sort(x: Buffer, order: Buffer, spare: Buffer, rows: Expr, size: Expr) -> None:
    """Put the rows' numbers in order, bottom up, through a spare buffer."""
    with T.serial(0, rows) as i:
        T.buffer_store(order, T.Cast(_INDEX, i), [i])
    width = _counter(1)
    with T.While(width[0] < rows):
        with T.serial(0, (rows + 2 * width[0] - 1) // (2 * width[0])) as pair:
            start = scalar(pair * 2 * width[0], _INDEX)
            middle = scalar(tirx.min(start + width[0], rows), _INDEX)
            end = scalar(tirx.min(start + 2 * width[0], rows), _INDEX)
            left, right = _counter(start), _counter(middle)
            with T.serial(0, end - start) as i:
                go_left = _counter(T.Cast(_INDEX, left[0] < middle))
                with T.If(tirx.all(left[0] < middle, right[0] < end)), T.Then():
                    sign = _compare(x, order[left[0]], order[right[0]], size)
                    T.buffer_store(go_left, T.Cast(_INDEX, sign <= 0), [0])
                with T.If(go_left[0] == 1):
                    with T.Then():
                        T.buffer_store(spare, order[left[0]], [start + i])
                        _add(left, 1)
                    with T.Else():
                        T.buffer_store(spare, order[right[0]], [start + i])
                        _add(right, 1)
        with T.serial(0, rows) as i:
            T.buffer_store(order, spare[i], [i])
        T.buffer_store(width, width[0] * 2, [0])


def _compare(x: Buffer, one: Expr, other: Expr, size: Expr) -> Expr:
    """-1, 0 or 1: how the first elements of two rows that differ compare."""
    one, other = scalar(one, _INDEX), scalar(other, _INDEX)
    sign, column = _counter(), _counter()
    with T.While(tirx.all(sign[0] == 0, column[0] < size)):
        a, b = (x[row, column[0]] for row in (one, other))
        T.buffer_store(sign, T.Cast(_INDEX, a > b) - T.Cast(_INDEX, a < b), [0])
        _add(column, 1)
    return sign[0]


def _by_appearance(first: Buffer, inverse: Buffer, number: Buffer, rows: Expr) -> None:
    """Number the groups anew, in the order of their first rows."""
    groups = _counter()
    with T.serial(0, rows) as i, T.If(first[inverse[i]] == i), T.Then():
        T.buffer_store(number, groups[0], [inverse[i]])
        _add(groups, 1)
    with T.serial(0, rows) as i:
        T.buffer_store(inverse, number[inverse[i]], [i])
    with T.serial(0, rows) as i:  # backwards, so that the first row comes last and stays
        row = rows - 1 - i
        T.buffer_store(first, T.Cast(_INDEX, row), [inverse[row]])


def _counter(start: Expr = 0) -> Buffer:
    cell = local(1, _INDEX)
    T.buffer_store(cell, T.Cast(_INDEX, start), [0])
    return cell


def _add(counter: Buffer, amount: Expr) -> None:
    T.buffer_store(counter, counter[0] + amount, [0])
