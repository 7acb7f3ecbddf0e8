"""TVM's side of the runtime: its libraries, the virtual machine and its threads.

Only ``libtvm_ffi`` and ``libtvm_runtime`` are loaded, never ``tvm`` or its compiler.
"""

from __future__ import annotations

import ctypes
import os
import queue
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sparse_tvm.devices import Device
from sparse_tvm.errors import ArtifactError, InputError

ONE_BY_ONE = "one_by_one"
"""A program's second function, where ``main`` launches kernels as graphs: this one calls each."""

WEIGHTS_APART = "weights_apart"
"""A program's function that takes the weights one by one, where ``main`` takes them as a tuple."""

STRAIGHT = "straight"
"""A library's function that is all kernels of the program in turn, where there is nothing else.

It takes inputs, outputs, a workspace and the table of the addresses of weights and constants, and
returns how many bytes the workspace has to have if it has fewer; else it has run, and returns 0."""

CONSTANTS = "constants"
"""A function of the machine beside `STRAIGHT`: the program's own tensors, in the table's order."""

_BOUND = "bound"

_CAPTURES = 3
"""How often to try to capture graphs."""

_SHARE_ALL_CORES = -3

_KEPT = 3
_WORKERS_END = 1.0
"""Seconds to wait for a thread's workers; 20 ms are usual."""

_TVM = "0.27.0.post1"
_INSTALL = f"pip install apache-tvm=={_TVM}"
_BUNDLED = Path(__file__).with_name("lib")
"""TVM's libraries in the light distribution, see ``scripts/build_runtime.py``."""

_SPIN_COUNT = 5000
"""Yields of an idle worker before it sleeps: about 2 ms, where TVM's default takes 170 ms of
CPU time from everybody else after each run. Waking a sleeping worker costs 50 us."""


@cache
def runtime() -> Any:
    """Load TVM's runtime and return the module ``tvm_ffi``.

    If ``tvm`` is loaded already, its libraries are the same files and are not loaded twice.

    Raises
    ------
    ArtifactError
        When apache-tvm, or what it needs, is not installed.
    """
    # Pinned workers of two models, or of two processes, would all sit on the first cores.
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", str(_SPIN_COUNT))
    try:
        with _torch_hidden():
            import tvm_ffi
    except ImportError as error:
        raise ArtifactError(f"TVM's runtime cannot be loaded: {error}", hint=_INSTALL) from error
    library = tvm_library("libtvm_runtime.so")
    if library is None:
        raise ArtifactError("TVM's runtime is not installed", hint=_INSTALL)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    tvm_ffi.register_error("InputError", InputError)  # as kernels raise it
    return tvm_ffi


def tvm_library(name: str) -> Path | None:
    """Where one of TVM's libraries is: in the installed apache-tvm, or beside this file."""
    spec = find_spec("tvm")
    found = [] if spec is None else spec.submodule_search_locations or ()
    places = [Path(place) / "lib" for place in found] or [_BUNDLED]
    return next((place / name for place in places if (place / name).exists()), None)


@contextmanager
def _torch_hidden() -> Iterator[None]:
    """Keep tvm_ffi from importing torch, seconds of load time, when nobody has imported it."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


class Library:
    """The code of one artifact, loaded once per file however many models use it.

    The dynamic linker recognises a library by its name first: loading a file that was compiled
    again under the same name would give the old code. So it is loaded through its descriptor,
    which stays open, and thereby unique, for as long as the library is in use.
    """

    @classmethod
    def of(cls, descriptor: int) -> Library:
        """Return the library in the open file `descriptor`, which the caller may close."""
        status = os.fstat(descriptor)
        identity = (status.st_dev, status.st_ino)
        with _loading:
            library = _loaded.get(identity)
            if library is None:
                library = _loaded[identity] = cls(os.dup(descriptor))
            return library

    def __init__(self, descriptor: int) -> None:
        load = runtime().get_global_func("ffi.Module.load_from_file.so")
        self.descriptor = descriptor
        try:
            self.module = load(f"/proc/self/fd/{descriptor}", "so")
        except BaseException:
            os.close(descriptor)
            raise

    def __del__(self) -> None:
        if hasattr(self, "module"):
            del self.module
            os.close(self.descriptor)


_loaded: weakref.WeakValueDictionary[tuple[int, int], Library] = weakref.WeakValueDictionary()
_loading = threading.Lock()
_machines: weakref.WeakSet[VirtualMachine] = weakref.WeakSet()


class VirtualMachine:
    """One program ready to run, on an exact number of threads, one call at a time.

    TVM keeps a pool of workers for every *calling* thread and fixes its size when that thread
    first uses it. Calls that need workers are handed over to a thread that belongs to this
    machine: otherwise a server with forty request threads would own forty pools, and whichever
    model came first on a thread would decide how many workers the others get. Nor may the main
    thread have workers: they do not survive a fork, and TVM would wait for them for ever when the
    forked process ends. Only calls on one thread, in the main thread, are made where they are
    (handing over costs 20 to 60 us, as much as one thread's work in a small model).

    In a forked process a thread of the machine's own is started again.

    Parameters
    ----------
    library : Library
        The code; kept alive.
    threads : int
        How many threads parallel regions use, the calling one included.
    device : Device
        Where the program runs.
    """

    def __init__(self, library: Library, threads: int, device: Device) -> None:
        self._threads, self._device = threads, device
        self.without_threads()
        machine = _instance(library, device)
        self._main, self._one_by_one = machine["main"], _one_by_one(machine)
        self._captures = 0 if self._one_by_one is None else _CAPTURES
        self.refused = ""
        self._weights: Sequence[Any] = ()
        self._machine: Any = machine
        self._library: Library | None = library  # released after what runs its code
        _machines.add(self)

    def without_threads(self) -> None:
        """Start with neither locks held nor a thread, as no thread but one survives a fork."""
        self._running = threading.Lock()
        self._creating = threading.Lock()
        self._own_thread: _OwnThread | None = None

    def bind(self, weights: Sequence[Any]) -> bool:
        """Bind the weights, for calls to leave them out; False where the program cannot."""
        if not self._machine.implements_function(WEIGHTS_APART):
            return False
        self._weights, self._main = weights, _with_weights(self._machine, weights)
        return True

    def straight(self) -> tuple[Callable[..., int], Sequence[Any]] | None:
        """The program as one function of its library, where it has one, and its constants."""
        assert self._library is not None
        module = self._library.module
        if not module.implements_function(STRAIGHT, query_imports=True):
            return None
        return module.get_function(STRAIGHT, query_imports=True), self._machine[CONSTANTS]()

    def main(self, *args: Any) -> Any:
        """Run the program once; to be called by :meth:`call`.

        Graphs are captured by the first run. Where that fails, the run goes on without them, as
        another library may have used the device meanwhile, which CUDA forbids; after several
        failures nothing is captured any more, with a warning.
        """
        if not self._captures:
            return self._main(*args)
        try:
            result = self._main(*args)
        except Exception as error:  # TVM raises whatever fits
            self._captures -= 1
            if not self._captures:
                self.without_graphs(str(error).partition("\n")[0])
                warnings.warn(f"no CUDA graph: {self.refused}", RuntimeWarning, stacklevel=2)
            assert self._one_by_one is not None
            return self._one_by_one(*args)
        self._captures = 0
        return result

    def without_graphs(self, reason: str) -> None:
        """Launch kernels one by one from now on, for a reason."""
        if self._one_by_one is not None:
            self._main, self._captures, self.refused = self._one_by_one, 0, reason

    @property
    def has_graphs(self) -> bool:
        """Whether kernels are launched as graphs."""
        return self._one_by_one is not None and self._main is not self._one_by_one

    def close(self) -> None:
        """Give back the program and what it keeps on its device; nothing may be called then."""
        self._main = self._one_by_one = self._machine = None
        self._weights = ()
        self._library = None

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return ``function(*args)``, called on a thread with the right pool, and alone."""
        if not self._device.is_host:
            return self._alone(function, *args)
        may_have_workers = self._threads == 1 or not _forks
        in_main_thread = threading.get_ident() == _main_thread
        if in_main_thread and may_have_workers and _set_pool(self._threads):
            with self._running:
                return function(*args)
        with self._creating:
            if self._own_thread is None:
                self._own_thread = _OwnThread(self._threads)
        return self._own_thread.call(self._alone, function, *args)

    def instrumented(self, callback: Callable[..., None]) -> Any:
        """Return another instance of the program that reports each call that it makes.

        `callback` gets the called function, its name, whether the call is about to happen (else
        it has just happened), its result and its arguments.
        """
        assert self._library is not None
        machine = _instance(self._library, self._device)
        machine["set_instrument"](runtime().convert_func(callback))
        if self._weights:
            return _with_weights(machine, self._weights)
        return _one_by_one(machine) or machine["main"]

    def _alone(self, function: Callable[..., Any], *args: Any) -> Any:
        # Held by the thread that runs, not by the one that waits: that one may be interrupted.
        with self._running:
            return function(*args)


_forks = True


def never_forks() -> None:
    """Let models run on several threads in the main thread, of a process that will not fork.

    A child of it would hang when it ends.
    """
    global _forks
    _forks = False


class MemoryBound:
    """Bounds what TVM's allocator keeps for a model that sees many shapes.

    The allocator keeps every buffer it ever made, by size, so each new shape adds a set of its
    own. When the shapes seen need together more than `_KEPT` times what the largest alone needs,
    all idle buffers go back to the system.
    """

    def __init__(self) -> None:
        self._sizes: dict[tuple[tuple[int, ...], ...], int] = {}

    def __contains__(self, shapes: tuple[tuple[int, ...], ...]) -> bool:
        """Whether nothing has to be noted before a run of these shapes."""
        return shapes in self._sizes

    def before_run(self, shapes: tuple[tuple[int, ...], ...], size_of: Callable[[], int]) -> None:
        """Note that inputs of `shapes`, of as many bytes in all as `size_of` tells, come next."""
        if shapes in self._sizes:
            return
        size = size_of()
        if self._sizes and size + sum(self._sizes.values()) > _KEPT * max(
            size, *self._sizes.values()
        ):
            runtime().get_global_func("vm.builtin.memory_manager.clear")()
            self._sizes.clear()
        self._sizes[shapes] = size


def _instance(library: Library, device: Device) -> Any:
    machine = library.module["vm_load_executable"]()
    machine["vm_initialization"](*device.machine_arguments())
    return machine


def _with_weights(machine: Any, weights: Sequence[Any]) -> Any:
    """The program with its last arguments bound."""
    machine["save_function"](WEIGHTS_APART, _BOUND, True, *weights)
    return machine[_BOUND]


def _one_by_one(machine: Any) -> Any:
    """The program without graphs, where it has any."""
    return machine[ONE_BY_ONE] if machine.implements_function(ONE_BY_ONE) else None


def _set_pool(threads: int) -> bool:
    """Make the calling thread's pool use `threads` threads; return False if it is too small."""
    configure, size = _pool_functions()
    # The list's length sets the size of a new pool; its cores matter only to those who ask for
    # pinning with TVM_BIND_THREADS=1.
    if _pool.threads == threads and size() == threads:
        return True
    configure(_SHARE_ALL_CORES, threads, [str(core) for core in range(threads)])
    _pool.threads = threads
    return bool(size() == threads)


@cache
def _pool_functions() -> tuple[Callable[..., Any], Callable[..., Any]]:
    get = runtime().get_global_func
    return get("runtime.config_threadpool"), get("runtime.NumThreads")


class _Pool(threading.local):
    """How many threads the calling thread's pool was last told to use."""

    threads = 0


_pool = _Pool()
_main_thread = threading.main_thread().ident


def _after_fork() -> None:
    """Forget, in a forked process, locks that other threads held, and threads."""
    global _loading, _main_thread
    _loading, _main_thread = threading.Lock(), threading.get_ident()
    for machine in list(_machines):
        machine.without_threads()


os.register_at_fork(after_in_child=_after_fork)


class _OwnThread:
    """A thread with a pool of its own that makes calls for others, one after the other."""

    def __init__(self, threads: int) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        thread = threading.Thread(target=_serve, args=(self._jobs,), name="sparse-tvm", daemon=True)
        thread.start()
        weakref.finalize(self, _stop, self._jobs, thread)
        self.call(_set_pool, threads)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        job = _Job(function, args)
        self._jobs.put(job)
        return job.result()


class _Job:
    """One call on its way through another thread."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._function = function
        self._args = args
        self._value: Any = None
        self._error: BaseException | None = None
        self._done = threading.Lock()
        self._done.acquire()

    def run(self) -> None:
        try:
            self._value = self._function(*self._args)
        except BaseException as error:
            self._error = error
        finally:
            self._done.release()

    def result(self) -> Any:
        self._done.acquire()
        if self._error is not None:
            raise self._error
        return self._value


def _serve(jobs: queue.SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        job.run()
        del job  # what the call referred to must not live until the next one


def _stop(jobs: queue.SimpleQueue[_Job | None], thread: threading.Thread) -> None:
    """End the thread, and with it its workers, before the interpreter goes away."""
    jobs.put(None)
    if thread is threading.current_thread():
        return
    thread.join()
    # Python is done with it then; the operating system once the workers have been joined.
    task = Path(f"/proc/self/task/{thread.native_id}")
    deadline = time.monotonic() + _WORKERS_END
    while task.exists() and time.monotonic() < deadline:
        time.sleep(0.0005)


def installed_version() -> str:
    """Return the version of the installed apache-tvm, or of the library that came with us."""
    try:
        return metadata.version("apache-tvm")
    except metadata.PackageNotFoundError:
        return _TVM
