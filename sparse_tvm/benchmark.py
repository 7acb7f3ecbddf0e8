"""Measure a compiled model: latency, throughput, memory, load time, time per kernel.

With ``against``, the model's own framework, or another compiled model, is measured in the same run,
and outputs are compared.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from sparse_tvm.artifact import is_artifact
from sparse_tvm.cpu import cpu_model
from sparse_tvm.errors import ModelError, OptionError
from sparse_tvm.interleave import interleave, time_runs
from sparse_tvm.machine_limits import measured_limits
from sparse_tvm.profiling import Profile, profile_model
from sparse_tvm.random_inputs import chosen_sizes, random_inputs
from sparse_tvm.runtime import Model, load

if TYPE_CHECKING:
    from sparse_tvm.frontends.input_shapes import InputShapes
    from sparse_tvm.reference import ReferenceModel

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_NOISY = 1.5
_Loaded = TypeVar("_Loaded")


@dataclass(frozen=True)
class Timing:
    """What one engine needs for one model.

    Times are in seconds. `load_seconds` includes the engine's libraries unless they were loaded
    before. `peak_memory_bytes` is what the process's resident memory grew by while the engine
    loaded and ran the model.
    """

    engine: str
    runs: int
    p50: float
    p90: float
    p99: float
    mean: float
    throughput: float
    load_seconds: float
    peak_memory_bytes: int

    @property
    def is_noisy(self) -> bool:
        """Whether one run in ten took so much longer than most that the machine was disturbed."""
        return self.p90 > _NOISY * self.p50


@dataclass(frozen=True)
class BenchResult:
    """What :func:`bench` measured; `to_dict` gives it as JSON types."""

    path: str
    cpu: str
    threads: int
    model: Timing
    reference: Timing | None
    speedup: float | None
    max_abs_diff: dict[str, float] | None
    profile: Profile | None
    shapes: dict[str, tuple[int, ...]]
    device: str

    def to_dict(self) -> dict[str, Any]:
        """Return the result as nested dictionaries and lists."""
        return asdict(self)


def bench(
    path: str | os.PathLike[str],
    against: Any = None,
    *,
    allow_pickle: bool = False,
    threads: int | None = None,
    device: str | None = None,
    huge_pages: bool = False,
    warmup: float = 1.0,
    duration: float = 5.0,
    inputs: Mapping[str, np.ndarray] | None = None,
    shapes: InputShapes | None = None,
    sizes: Mapping[str, int] | None = None,
    profile: bool = False,
    progress: Callable[[str], None] = lambda phase: None,
) -> BenchResult:
    """Measure a compiled model, and the framework it came from beside it.

    Parameters
    ----------
    path : path
        The compiled model.
    against : path | model | None
        The model to run in its own framework (ONNX Runtime for ONNX), or another compiled one, on
        as many threads, interleaved with ours.
    allow_pickle : bool
        As for :func:`sparse_tvm.compile`.
    threads, device, huge_pages : int | None, str | None, bool
        As for :func:`sparse_tvm.load`.
    warmup, duration : float
        Seconds of uncounted and of counted runs, per engine.
    inputs : Mapping[str, np.ndarray] | None
        Inputs by name; random ones by default.
    shapes : InputShapes | None
        Shapes of random inputs by name; by default one example, and 128 tokens.
    sizes : Mapping[str, int] | None
        Sizes of symbolic dimensions by name, instead.
    profile : bool
        Also time every kernel, and measure this machine's limits for their rooflines.
    progress : callable
        Told of each phase as it starts.

    Raises
    ------
    ArtifactError, InputError, OptionError
        As :func:`sparse_tvm.load` and :meth:`sparse_tvm.runtime.Model.run`.
    ModelError
        When its framework cannot load `against`, or it has other inputs or outputs.
    """
    for name, value in (("warmup", warmup), ("duration", duration)):
        if value < 0:
            raise OptionError(f"{name} must not be negative, is {value:g} s")
    progress("load and warm up")
    ours = _Engine(
        "sparse-tvm", lambda: load(path, threads=threads, device=device, huge_pages=huge_pages)
    )
    model = ours.loaded
    chosen = chosen_sizes(model.inputs, model.bounds, shapes or {}, sizes or {})
    feed = random_inputs(model.inputs, sizes=chosen) if inputs is None else inputs
    ours.warm_up(lambda: model.run(feed), warmup)
    engines: list[_Engine[Any]] = [ours]
    differences = None
    if against is not None:
        progress("load and warm up the reference")
        shapes = {name: values.shape for name, values in feed.items()}
        opened = _opened(against, allow_pickle, shapes, model.threads, huge_pages)
        reference, differences = _reference_engine(*opened, model, feed, warmup)
        engines.append(reference)
    progress("measure")
    times = interleave({engine.name: engine.run for engine in engines}, duration=duration)
    timings = [engine.timing(times[engine.name]) for engine in engines]
    if profile:
        progress("profile")
    return BenchResult(
        path=os.fspath(path),
        cpu=cpu_model(),
        threads=model.threads,
        model=timings[0],
        reference=timings[1] if against is not None else None,
        speedup=timings[1].p50 / timings[0].p50 if against is not None else None,
        max_abs_diff=differences,
        profile=_profile(model, feed) if profile else None,
        shapes={name: np.shape(values) for name, values in feed.items()},
        device=model.device if model.hardware is None else f"{model.device}, {model.hardware}",
    )


def _profile(model: Model, feed: Mapping[str, np.ndarray]) -> Profile:
    if model.device != "cpu":
        return profile_model(model, feed)
    limits = measured_limits(model.manifest["target"]["name"], model.threads)
    return profile_model(model, feed, limits=limits)


class _Engine(Generic[_Loaded]):
    """A model in an engine, with the time and memory that loading and running it takes."""

    def __init__(self, name: str, load: Callable[[], _Loaded]) -> None:
        self.name = name
        self._memory_before = _reset_peak_memory()
        start = time.perf_counter()
        self.loaded = load()
        self._load_seconds = time.perf_counter() - start

    def warm_up(self, run: Callable[[], Any], duration: float) -> None:
        self.run = run
        time_runs(run, duration)
        self._peak_memory = max(0, _memory("VmHWM") - self._memory_before)

    def timing(self, times: Sequence[float]) -> Timing:
        p50, p90, p99 = np.percentile(times, [50, 90, 99])
        return Timing(
            engine=self.name,
            runs=len(times),
            p50=float(p50),
            p90=float(p90),
            p99=float(p99),
            mean=float(np.mean(times)),
            throughput=len(times) / sum(times),
            load_seconds=self._load_seconds,
            peak_memory_bytes=self._peak_memory,
        )


def _opened(
    against: Any,
    allow_pickle: bool,
    shapes: InputShapes,
    threads: int,
    huge_pages: bool,
) -> tuple[str, Callable[[], ReferenceModel]]:
    """The name of a model in its framework, or of another compiled one, and what loads it."""
    if isinstance(against, str | os.PathLike) and is_artifact(against):
        from sparse_tvm.compiled_reference import CompiledReference

        return os.fspath(against), lambda: CompiledReference(against, threads, huge_pages)
    from sparse_tvm.frontends.detect import open_source
    from sparse_tvm.frontends.source import SourceOptions

    source = open_source(against, SourceOptions(allow_pickle=allow_pickle, input_shapes=shapes))
    return source.name, lambda: source.reference(threads)


def _reference_engine(
    name: str,
    load: Callable[[], ReferenceModel],
    model: Model,
    feed: Mapping[str, np.ndarray],
    warmup: float,
) -> tuple[_Engine[Any], dict[str, float]]:
    """Return the model to compare with, loaded, and how its outputs differ from ours."""
    engine = _Engine("reference", load)
    engine.name = engine.loaded.engine
    reference = engine.loaded
    outputs = [spec.name for spec in model.outputs]
    for what, theirs, mine in (
        ("inputs", reference.inputs, [spec.name for spec in model.inputs]),
        ("outputs", reference.outputs, outputs),
    ):
        if set(theirs) != set(mine):
            raise ModelError(
                f"{name} is another model than {model.path}: its {what} are "
                f"{', '.join(theirs)}, not {', '.join(mine)}",
                hint="give --against the model that was compiled",
            )
    engine.warm_up(lambda: reference.run(feed, outputs), warmup)
    return engine, reference.max_abs_differences(feed, model.run(feed))


def _reset_peak_memory() -> int:
    """Start a new record of the process's peak resident memory; return what it uses now."""
    with suppress(OSError):  # where that is forbidden, an earlier peak may stand
        _CLEAR_REFS.write_text(_RESET_PEAK)
    return _memory("VmRSS")


def _memory(field: str) -> int:
    """Return a size in bytes from /proc/self/status."""
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
