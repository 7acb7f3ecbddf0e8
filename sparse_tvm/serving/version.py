"""One loaded version of a model: its queue and its supervised worker processes."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

import numpy as np

from sparse_tvm.errors import SparseTvmError
from sparse_tvm.random_inputs import random_inputs
from sparse_tvm.serving import logs
from sparse_tvm.serving.batching import Layout, Tensors
from sparse_tvm.serving.channel import NoRoom
from sparse_tvm.serving.limits import Limits, limits_of
from sparse_tvm.serving.metrics import Metrics
from sparse_tvm.serving.options import Options
from sparse_tvm.serving.private_copy import PrivateCopy
from sparse_tvm.serving.process import RunFailed, WorkerDied, WorkerProcess
from sparse_tvm.serving.queueing import Queue, Request
from sparse_tvm.serving.refusal import Kind, Refusal
from sparse_tvm.serving.text_model import TextModel, load_text_model, tokenizer_of
from sparse_tvm.spec import TensorSpec

_ATTEMPTS = 2
_LONGEST_PAUSE = 10.0
_SOUND_SECONDS = 30.0
"""A worker that lived this long was sound; the next one starts without a pause."""

_SAME = 1e-4
"""By how much a joined run may differ from runs one by one, relative to the largest output."""


class LoadFailed(Exception):
    """A version cannot be served; the message says why."""


class Version:
    """A version of a model, from its first worker to its last request.

    Parameters
    ----------
    model, version : str
        Its names in the protocol.
    path : Path
        The artifact.

    Attributes
    ----------
    text : TextModel | None
        What turns text into its inputs, if it takes text.
    trouble : str
        Why the last worker could not be started; empty once one is.
    """

    def __init__(
        self, model: str, version: str, path: Path, options: Options, metrics: Metrics
    ) -> None:
        self.model = model
        self.version = version
        self.path = path
        self.inputs: list[TensorSpec] = []
        self.outputs: list[TensorSpec] = []
        self.layout = Layout((), (), None, None, None)
        self.limits = Limits()
        self._options = options
        self._metrics = metrics
        self._queue_seconds = metrics.queue_seconds.labels(model)
        self._run_seconds = metrics.run_seconds.labels(model)
        self._batch_rows = metrics.batch_rows.labels(model)
        self._queue: Queue | None = None
        self.text: TextModel | None = None
        self.trouble = ""
        self._artifact: PrivateCopy | None = None
        self._owned: set[WorkerProcess] = set()
        self._workers: list[WorkerProcess] = []
        self._slots: list[asyncio.Task[None]] = []
        self._leases = 0
        self._unused = asyncio.Event()
        self._unused.set()

    @property
    def ready(self) -> bool:
        """Whether a warm worker is there."""
        return bool(self._workers)

    @property
    def pids(self) -> list[int]:
        """The ids of the worker processes."""
        return [worker.pid for worker in self._workers]

    async def start(self) -> None:
        """Start all workers; return when all of them are warm.

        Raises
        ------
        LoadFailed
            With the reason. Nothing of the version is left then, nor after a cancellation.
        """
        try:
            await self._start()
        except BaseException as error:
            await self._end()
            if isinstance(error, LoadFailed) or not isinstance(error, Exception):
                raise
            if not isinstance(error, (SparseTvmError, RunFailed, WorkerDied, NoRoom, OSError)):
                logs.exception("version failed in an unexpected way", error)
            raise LoadFailed(_reason(error)) from error

    async def _start(self) -> None:
        self._artifact = await asyncio.to_thread(PrivateCopy, self.path)
        first = self._spawn(verify=True)
        try:
            await self._introduce(first)
        except WorkerDied:
            status = await self._dismiss(first)
            raise LoadFailed(f"its process ended with status {status}") from None
        options = self._options
        self._queue = Queue(self.layout, options.max_queue, options.max_batch, options.max_delay)
        self._slots.append(asyncio.create_task(self._keep(first)))
        others = [asyncio.Event() for _ in range(options.workers - 1)]
        self._slots.extend(asyncio.create_task(self._keep(None, tried)) for tried in others)
        await asyncio.gather(*(tried.wait() for tried in others))
        self._metrics.waiting.labels(self.model).set_function(self._waiting)
        self._metrics.workers.labels(self.model).set_function(lambda: len(self._workers))

    async def infer(
        self, arrays: Mapping[str, np.ndarray], sizes: Mapping[str, int], timeout: float
    ) -> dict[str, np.ndarray]:
        """Return the outputs for inputs that fit the model's specs.

        Raises
        ------
        Refusal
            When the queue is full, the time is up, or the model fails on these inputs.
        """
        if self._queue is None:
            raise Refusal(Kind.UNAVAILABLE, f"model {self.model!r} is loading", retry_after=1)
        request = Request(Tensors(tuple(arrays[spec.name] for spec in self.inputs), sizes))
        self._queue.put(request)
        late = Refusal(Kind.TIMEOUT, f"no result within {timeout:g} s")
        end = asyncio.get_running_loop().call_later(timeout, _set_exception, request, late)
        try:
            outputs = await request.result
        finally:
            end.cancel()
        return {spec.name: output for spec, output in zip(self.outputs, outputs, strict=True)}

    def result_bytes(self, sizes: Mapping[str, int]) -> int:
        """Return how many bytes the outputs take for these sizes of symbolic dimensions.

        Dimensions that are not among them count as 1.
        """
        return sum(
            np.dtype(spec.dtype).itemsize
            * math.prod(sizes.get(dim, 1) if isinstance(dim, str) else dim for dim in spec.shape)
            for spec in self.outputs
        )

    @contextmanager
    def lease(self) -> Iterator[Version]:
        """Keep the version loaded while a request uses it."""
        self._leases += 1
        self._unused.clear()
        try:
            yield self
        finally:
            self._leases -= 1
            if not self._leases:
                self._unused.set()

    async def stop(self) -> None:
        """Wait for the last request and end the workers."""
        try:
            await self._unused.wait()
        finally:
            await self._end()

    async def _end(self) -> None:
        """End all workers, whatever they do, and give everything back."""
        for slot in self._slots:
            slot.cancel()
        await asyncio.gather(*self._slots, return_exceptions=True)
        await asyncio.gather(*(worker.close() for worker in list(self._owned)))
        self._owned.clear()
        if self._artifact is not None:
            self._artifact.close()
            self._artifact = None

    def _waiting(self) -> int:
        return len(self._queue) if self._queue is not None else 0

    def _spawn(self, *, verify: bool = False) -> WorkerProcess:
        """Start a worker; it belongs to this version until :meth:`_dismiss`."""
        assert self._artifact is not None
        used = Counter(worker.device for worker in self._owned)
        device = min(self._options.devices, key=lambda device: used[device], default=None)
        worker = WorkerProcess(
            self.path,
            self._artifact,
            self._options.threads_per_worker,
            device,
            huge_pages=self._options.huge_pages,
            verify=verify,
        )
        self._owned.add(worker)
        return worker

    async def _dismiss(self, worker: WorkerProcess) -> int:
        status = await worker.close()
        self._owned.discard(worker)
        return status

    async def _introduce(self, worker: WorkerProcess) -> None:
        """Learn the model's specs from its first worker, and see which requests may join."""
        ready = await worker.ready()
        self.inputs = [TensorSpec.from_json(entry) for entry in ready["inputs"]]
        self.outputs = [TensorSpec.from_json(entry) for entry in ready["outputs"]]
        tokenizer = tokenizer_of(self.path)
        self.limits = limits_of(self.inputs, ready["bounds"], tokenizer)
        self.text = await asyncio.to_thread(
            load_text_model, tokenizer, self.inputs, self.outputs, self.limits
        )
        layout = Layout.of(self.inputs, self.outputs)
        if self._options.max_batch == 1:
            layout = layout.without_batching()
        self.layout = await self._verified(layout, worker)
        logs.info(
            "model loaded",
            model=self.model,
            version=self.version,
            path=str(self.path),
            load_seconds=round(ready["load_seconds"], 3),
            warm_up_seconds=round(ready["warm_up_seconds"], 3),
            joined_along=self.layout.batch,
            padded_along=self.layout.sequence,
        )

    async def _verified(self, layout: Layout, worker: WorkerProcess) -> Layout:
        """Return the freest layout whose joined runs give what runs one by one give."""
        for candidate in (layout, layout.without_padding(), layout.without_batching()):
            if candidate.batch is None or await self._joins_correctly(candidate, worker):
                return candidate
            logs.warning(
                "joined requests give other results",
                model=self.model,
                version=self.version,
                padded_along=candidate.sequence,
            )
        return layout.without_batching()

    async def _joins_correctly(self, layout: Layout, worker: WorkerProcess) -> bool:
        requests = [
            _sample(self.inputs, layout, rows, length)
            for rows, length in ((1, 3), (2, 7 if layout.sequence else 3))
        ]
        try:
            alone = [(await self._run(layout, [request], worker))[0] for request in requests]
            joined = await self._run(layout, requests, worker)
        except RunFailed:
            return False
        return all(
            _close(one, other)
            for ones, others in zip(alone, joined, strict=True)
            for one, other in zip(ones, others, strict=True)
        )

    async def _keep(self, worker: WorkerProcess | None, tried: asyncio.Event | None = None) -> None:
        """Supervise one worker for ever: whatever ends it, start another, at growing intervals.

        `tried` is set when the first one is warm, or has failed.
        """
        pause = 0.0
        while True:
            started = monotonic()
            try:
                if worker is None:
                    worker = self._spawn()
                    await worker.ready()
                self.trouble = ""
                if tried is not None:
                    tried.set()
                await self._employ(worker)
            except Exception as error:
                self._note_failure(error)
            if tried is not None:
                tried.set()
            if worker is not None:
                await self._note_end(worker)
                worker = None
            pause = 0.0 if monotonic() - started > _SOUND_SECONDS else min(_LONGEST_PAUSE, pause)
            await asyncio.sleep(pause)
            pause = 2 * pause or 0.1

    def _note_failure(self, error: Exception) -> None:
        self.trouble = _reason(error)
        self._metrics.start_failures.labels(self.model).inc()
        logs.warning(
            "worker cannot be started",
            model=self.model,
            version=self.version,
            reason=self.trouble,
        )

    async def _note_end(self, worker: WorkerProcess) -> None:
        status = await self._dismiss(worker)
        self._metrics.restarts.labels(self.model).inc()
        logs.warning(
            "worker died", model=self.model, version=self.version, pid=worker.pid, status=status
        )

    async def _employ(self, worker: WorkerProcess) -> None:
        """Give batches to a worker until it dies."""
        if worker.died.is_set():
            return
        self._workers.append(worker)
        serving = asyncio.create_task(self._serve(worker))
        death = asyncio.create_task(worker.died.wait())
        try:
            await asyncio.wait({serving, death}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._workers.remove(worker)
            serving.cancel()
            death.cancel()
            await asyncio.gather(serving, death, return_exceptions=True)

    async def _serve(self, worker: WorkerProcess) -> None:
        assert self._queue is not None
        while not worker.died.is_set():
            batch = await self._queue.take()
            try:
                await self._answer(batch, worker)
            except WorkerDied:
                worker.kill()
                self._retry(batch)
                return
            except BaseException:
                self._retry(batch)
                raise

    async def _answer(self, batch: Sequence[Request], worker: WorkerProcess) -> None:
        """Run a batch and answer its requests; if it fails, each gets a run of its own."""
        assert self._queue is not None
        started = monotonic()
        for request in batch:
            self._queue_seconds.observe(started - request.enqueued)
        try:
            results = await self._run(self.layout, [r.tensors for r in batch], worker)
        except NoRoom as error:
            for request in batch:
                _set_exception(request, Refusal(Kind.UNAVAILABLE, str(error), retry_after=1))
            return
        except RunFailed as error:
            if len(batch) > 1:
                self._queue.put_back([request for request in batch if not request.result.done()])
                return
            kind = Kind.INVALID if error.invalid else Kind.FAILED
            _set_exception(batch[0], Refusal(kind, str(error)))
            return
        for request, result in zip(batch, results, strict=True):
            if not request.result.done():
                request.result.set_result(result)
        each = (monotonic() - started) / len(batch) / max(1, len(self._workers))
        self._queue.seconds_per_request += 0.1 * (each - self._queue.seconds_per_request)

    async def _run(
        self, layout: Layout, requests: Sequence[Tensors], worker: WorkerProcess
    ) -> list[list[np.ndarray]]:
        outputs, seconds = await worker.run(
            layout.shapes(requests),
            lambda places: layout.fill(requests, places),
            self._options.timeout,
        )
        self._run_seconds.observe(seconds)
        self._batch_rows.observe(sum(map(layout.rows, requests)))
        return layout.split(requests, outputs)

    def _retry(self, batch: Sequence[Request]) -> None:
        """Queue the requests of a lost run again, but not those that have lost two."""
        assert self._queue is not None
        again = []
        for request in batch:
            request.attempts += 1
            if request.attempts >= _ATTEMPTS:
                _set_exception(request, Refusal(Kind.FAILED, "the model's process died on it"))
            elif not request.result.done():
                again.append(request)
        self._queue.put_back(again)


def _reason(error: Exception) -> str:
    """Return why a version or a worker failed, in one line."""
    if isinstance(error, WorkerDied):
        return "its process ended before it was ready"
    if isinstance(error, (SparseTvmError, RunFailed, NoRoom)):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _set_exception(request: Request, error: Exception) -> None:
    if not request.result.done():
        request.result.set_exception(error)


def _sample(inputs: Sequence[TensorSpec], layout: Layout, rows: int, length: int) -> Tensors:
    """Return random inputs of these sizes; symbolic dimensions that are not joined are 3."""
    symbols = {dim for spec in inputs for dim in spec.shape if isinstance(dim, str)}
    sizes = dict.fromkeys(symbols, 3)
    if layout.batch:
        sizes[layout.batch] = rows
    if layout.sequence:
        sizes[layout.sequence] = length
    return Tensors(tuple(random_inputs(inputs, seed=length, sizes=sizes).values()), sizes)


def _close(one: np.ndarray, other: np.ndarray) -> bool:
    if one.shape != other.shape:
        return False
    scale = max(1.0, float(np.abs(one).max(initial=0.0)))
    return bool(np.allclose(one, other, rtol=0, atol=_SAME * scale, equal_nan=True))
