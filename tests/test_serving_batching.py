from __future__ import annotations

import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_tvm.spec import TensorSpec

pytest.importorskip("prometheus_client")

from sparse_tvm.serving.batching import Layout, Tensors
from sparse_tvm.serving.queueing import Queue, Request
from sparse_tvm.serving.refusal import Kind, Refusal

IDS = TensorSpec("input_ids", "int64", ("batch", "sequence"))
MASK = TensorSpec("attention_mask", "int64", ("batch", "sequence"))
HIDDEN = TensorSpec("hidden", "float32", ("batch", "sequence", 4))
POOLED = TensorSpec("pooled", "float32", ("batch", 4))
FIXED = TensorSpec("x", "float32", (1, 8))
TEXT = Layout.of([IDS, MASK], [HIDDEN, POOLED])


def text(length: int, rows: int = 1, mask: int = 1) -> Tensors:
    ids = np.full((rows, length), length, np.int64)
    return Tensors((ids, np.full_like(ids, mask)), {"batch": rows, "sequence": length})


@pytest.mark.parametrize(
    ("inputs", "outputs", "batch", "sequence"),
    [
        ([IDS, MASK], [HIDDEN, POOLED], "batch", "sequence"),
        ([IDS], [HIDDEN], "batch", None),
        ([FIXED], [FIXED], None, None),
        ([IDS, MASK], [TensorSpec("n", "int64", ())], None, None),
        ([IDS, MASK], [TensorSpec("y", "float32", ("sequence", "batch"))], None, None),
        ([IDS, MASK], [TensorSpec("y", "float32", ("batch", "2*sequence"))], "batch", None),
        ([TensorSpec("x", "float32", ("n", "n"))], [HIDDEN], None, None),
    ],
)
def test_axes_follow_from_the_names_of_dimensions(inputs, outputs, batch, sequence) -> None:
    layout = Layout.of(inputs, outputs)
    assert (layout.batch, layout.sequence) == (batch, sequence)


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 20)), min_size=1, max_size=6))
def test_joined_requests_come_apart_again(sizes: list[tuple[int, int]]) -> None:
    requests = [text(length, rows) for rows, length in sizes]
    shapes = TEXT.shapes(requests)
    places = [np.full(shape, -1, dtype) for dtype, shape in shapes]
    TEXT.fill(requests, places)
    ids, mask = places
    assert (ids >= 0).all()
    assert mask.sum() == sum(rows * length for rows, length in sizes)
    hidden = np.repeat(ids[:, :, None], 4, axis=2).astype(np.float32)
    outputs = TEXT.split(requests, [hidden, hidden[:, 0]])
    for (rows, length), (own, pooled) in zip(sizes, outputs, strict=True):
        np.testing.assert_array_equal(own, np.full((rows, length, 4), length, np.float32))
        np.testing.assert_array_equal(pooled, np.full((rows, 4), length, np.float32))


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 500)), min_size=1, max_size=40))
def test_batches_stay_within_rows_and_padding(sizes: list[tuple[int, int]]) -> None:
    requests = [text(length, rows) for rows, length in sizes]
    chosen = TEXT.choose(requests, 8)
    assert chosen[0] == 0
    assert len(set(chosen)) == len(chosen)
    rows = sum(sizes[index][0] for index in chosen)
    tokens = sum(sizes[index][0] * sizes[index][1] for index in chosen)
    assert rows <= 8
    assert rows * max(sizes[index][1] for index in chosen) <= 1.25 * tokens


def test_requests_of_like_length_join_first() -> None:
    assert TEXT.choose([text(10), text(500), text(11), text(10), text(3)], 3) == [0, 3, 2]


def test_rows_without_any_position_are_never_padded() -> None:
    assert TEXT.choose([text(5), text(5, mask=0), text(5)], 8) == [0, 2]
    assert TEXT.choose([text(5, mask=0), text(5)], 8) == [0]


def test_without_a_mask_only_equal_lengths_join() -> None:
    layout = Layout.of([IDS], [HIDDEN])
    requests = [Tensors(t.arrays[:1], t.sizes) for t in (text(5), text(6), text(5, rows=2))]
    assert layout.choose(requests, 8) == [0, 2]


def test_fixed_shapes_run_alone() -> None:
    layout = Layout.of([FIXED], [FIXED])
    request = Tensors((np.ones((1, 8), np.float32),))
    assert layout.choose([request, request], 8) == [0]
    [place] = [np.zeros(shape, dtype) for dtype, shape in layout.shapes([request])]
    layout.fill([request], [place])
    assert (place == 1).all()


def test_queue_hands_out_batches_in_order_and_forgets_who_left() -> None:
    async def scenario() -> None:
        queue = Queue(TEXT, max_requests=4, max_rows=2, max_delay=0)
        requests = [Request(text(5)) for _ in range(4)]
        for request in requests:
            queue.put(request)
        with pytest.raises(Refusal) as refused:
            queue.put(Request(text(5)))
        assert refused.value.kind is Kind.BUSY
        assert refused.value.retry_after >= 1
        requests[1].result.cancel()
        await asyncio.sleep(0)
        assert len(queue) == 3
        assert await queue.take() == [requests[0], requests[2]]
        queue.put_back([requests[2], requests[0]])
        assert [await queue.take() for _ in range(3)] == [
            [requests[2]],
            [requests[0]],
            [requests[3]],
        ]

    asyncio.run(scenario())


def test_queue_waits_for_a_batch_to_fill_but_not_longer_than_asked() -> None:
    async def scenario() -> None:
        queue = Queue(TEXT, max_requests=9, max_rows=2, max_delay=0.2)
        loop = asyncio.get_running_loop()
        queue.put(Request(text(5)))
        loop.call_later(0.05, lambda: queue.put(Request(text(5))))
        started = loop.time()
        assert len(await queue.take()) == 2
        assert loop.time() - started < 0.15
        queue.put(Request(text(5)))
        started = loop.time()
        assert len(await queue.take()) == 1
        assert 0.15 < loop.time() - started < 0.5

    asyncio.run(scenario())
