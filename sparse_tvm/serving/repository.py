"""Which models are served, and in which version.

A source is a file, served under its name without the suffix, or a directory in Triton's layout::

    repository/
        minilm/
            1/model.so
            2/model.so

The highest version that loads is the one that serves. A new one takes over when all its workers
are warm; the old one answers what it has accepted and ends. One that does not load changes
nothing but the reason shown in the index.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

from sparse_tvm.errors import ArtifactError, OptionError
from sparse_tvm.serving import logs
from sparse_tvm.serving.metrics import Metrics
from sparse_tvm.serving.options import Options
from sparse_tvm.serving.protocol import quoted
from sparse_tvm.serving.refusal import Kind, Refusal
from sparse_tvm.serving.text_model import tokenizer_of
from sparse_tvm.serving.version import LoadFailed, Version

FILE_NAME = "model.so"
_RETRY_AFTER = 2
_VERSION = re.compile("[0-9]{1,18}")

_FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 120.0


class Identity(NamedTuple):
    """What tells one version from another: times are in ns."""

    version: str
    inode: int
    modified: int
    size: int
    tokenizer_modified: int


class Failure:
    """Why a version cannot be loaded, and when to try again: at growing intervals.

    Parameters
    ----------
    reason : str
        For operators.
    before : Failure | None
        The failure of the attempt before.
    """

    def __init__(self, reason: str, before: Failure | None) -> None:
        self.reason = reason
        self._pause: float = (
            _FIRST_PAUSE if before is None else min(2 * before._pause, _LONGEST_PAUSE)
        )
        self._again = monotonic() + self._pause

    @property
    def is_due(self) -> bool:
        """Whether it is time to try again."""
        return monotonic() >= self._again


@dataclass
class Entry:
    """One model name: where its versions come from, and the one that serves."""

    name: str
    source: Path
    wanted: bool = True
    current: Version | None = None
    identity: Identity | None = None
    failures: dict[Identity, Failure] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def reasons(self) -> str:
        """Why versions cannot be loaded."""
        return "; ".join(failure.reason for failure in self.failures.values())

    def candidates(self) -> list[tuple[Identity, Path]]:
        """Return the versions on disk, the newest first."""
        if not self.source.is_dir():
            versions = [("1", self.source)]
        else:
            names = (path.name for path in self.source.iterdir() if _VERSION.fullmatch(path.name))
            ordered = sorted(names, key=int, reverse=True)
            versions = [(name, self.source / name / FILE_NAME) for name in ordered]
        return [
            (identity, path)
            for name, path in versions
            if (identity := _identity(name, path)) is not None
        ]


class Repository:
    """The models of one server.

    Parameters
    ----------
    sources : sequence of Path
        Artifacts, or directories of models.
    """

    def __init__(self, sources: Sequence[Path], options: Options, metrics: Metrics) -> None:
        self._directories = [source for source in sources if source.is_dir()]
        self._options = options
        self._metrics = metrics
        self._entries: dict[str, Entry] = {}
        self._complaints: dict[Path, str] = {}
        self._unspeakable: set[str] = set()
        self._operations: set[asyncio.Task[None]] = set()
        self._retiring: set[asyncio.Task[None]] = set()
        self._poller: asyncio.Task[None] | None = None
        for source in sources:
            if source.is_dir():
                self._discover(source)
            else:
                self._add(source.stem, source)
        metrics.watch_memory(self._processes)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    @property
    def ready(self) -> bool:
        """Whether every model that should be served is."""
        wanted = [entry for entry in self._entries.values() if entry.wanted]
        return all(entry.current is not None and entry.current.ready for entry in wanted)

    @property
    def troubles(self) -> str:
        """Why models that should be served are not, as far as it is known."""
        reasons = {
            entry.name: entry.reasons if entry.current is None else entry.current.trouble
            for entry in self._entries.values()
            if entry.wanted and (entry.current is None or not entry.current.ready)
        }
        return "; ".join(f"{name}: {why or 'no worker is ready'}" for name, why in reasons.items())

    async def start(self) -> None:
        """Load everything, and from then on look for new versions.

        Raises
        ------
        ArtifactError
            When a model given as a file cannot be loaded.
        """
        names = list(self._entries)
        results = await asyncio.gather(*(self.load(name) for name in names), return_exceptions=True)
        for name, result in zip(names, results, strict=True):
            if isinstance(result, Refusal) and self._entries[name].source.is_file():
                raise ArtifactError(result.message)
            if isinstance(result, BaseException) and not isinstance(result, Refusal):
                raise result
        if self._options.poll:
            self._poller = asyncio.create_task(self._poll())

    @contextmanager
    def use(self, name: str, version: str = "") -> Iterator[Version]:
        """Find a loaded version and keep it loaded while it is in use.

        Raises
        ------
        Refusal
            When it is unknown, or not loaded.
        """
        entry = self._entry(name)
        current = entry.current
        if current is None:
            reasons = entry.reasons or "it is not loaded"
            retry_after = _RETRY_AFTER if entry.wanted else None
            raise Refusal(Kind.UNAVAILABLE, f"model {name!r}: {reasons}", retry_after=retry_after)
        if version not in ("", current.version):
            raise Refusal(
                Kind.NOT_FOUND,
                f"model {name!r} serves version {current.version}, not {quoted(version)}",
            )
        with current.lease():
            yield current

    async def load(self, name: str) -> None:
        """Load the newest version of a model, unless it is the one that serves.

        Raises
        ------
        Refusal
            When it is unknown, or its newest version cannot be loaded.
        """
        self._discover_all()
        entry = self._entry(name)
        entry.wanted = True
        await self._whole(self._load(entry))

    async def unload(self, name: str) -> None:
        """Stop serving a model until it is loaded again; requests it has accepted are answered."""
        entry = self._entry(name)
        entry.wanted = False
        await self._whole(self._unload(entry))

    async def _whole(self, operation: Coroutine[Any, Any, None]) -> None:
        """Let an operation go on when the client that asked for it goes away."""
        task = asyncio.create_task(operation)
        self._operations.add(task)
        task.add_done_callback(self._forget)
        await asyncio.shield(task)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._operations.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, Refusal):
            logs.exception("operation on a model failed", error)

    async def _load(self, entry: Entry) -> None:
        async with entry.lock:
            entry.failures.clear()
            await self._update(entry)
            if entry.failures:
                raise Refusal(Kind.INVALID, entry.reasons)
            if entry.current is None:
                raise Refusal(Kind.INVALID, f"{entry.source} holds no N/{FILE_NAME}")

    async def _unload(self, entry: Entry) -> None:
        async with entry.lock:
            old, entry.current, entry.identity = entry.current, None, None
            if old is not None:
                logs.info("model unloaded", model=entry.name, version=old.version)
                await old.stop()
                self._metrics.forget(entry.name)

    def index(self) -> list[dict[str, str]]:
        """Return every version: name, version, state, and the reason where it does not serve."""
        self._discover_all()
        rows = []
        for entry in self._entries.values():
            if entry.current is not None:
                state = "READY" if entry.current.ready else "LOADING"
                rows.append(_row(entry.name, entry.current.version, state, entry.current.trouble))
            for identity, failure in entry.failures.items():
                rows.append(_row(entry.name, identity.version, "UNAVAILABLE", failure.reason))
            if entry.current is None and not entry.failures:
                state = "LOADING" if entry.wanted else "UNAVAILABLE"
                rows.append(_row(entry.name, "", state, "" if entry.wanted else "unloaded"))
        return rows

    def names(self) -> list[str]:
        """Return the names of the models that are loaded."""
        return [entry.name for entry in self._entries.values() if entry.current is not None]

    async def stop(self) -> None:
        """Answer what was accepted and end all workers."""
        operations = [*self._operations, *([self._poller] if self._poller is not None else [])]
        for operation in operations:
            operation.cancel()
        await asyncio.gather(*operations, return_exceptions=True)
        current = [entry.current for entry in self._entries.values() if entry.current is not None]
        await asyncio.gather(*(version.stop() for version in current), *self._retiring)

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise Refusal(Kind.NOT_FOUND, f"there is no model {quoted(name)}")
        return self._entries[name]

    def _add(self, name: str, source: Path) -> None:
        if name in self._entries:
            raise OptionError(
                f"{source} and {self._entries[name].source} are both called {name!r}",
                hint="rename one of them",
            )
        self._entries[name] = Entry(name, source)

    def _discover_all(self) -> None:
        for directory in self._directories:
            try:
                self._discover(directory)
                self._complaints.pop(directory, None)
            except (OSError, OptionError) as error:
                if self._complaints.get(directory) != str(error):
                    self._complaints[directory] = str(error)
                    logs.warning("cannot look for models", reason=str(error))

    def _discover(self, directory: Path) -> None:
        for path in sorted(directory.iterdir()):
            if path.name in self._entries or path.name in self._unspeakable:
                continue
            if any(path.glob(f"[0-9]*/{FILE_NAME}")):
                if _is_text(path.name):
                    self._add(path.name, path)
                else:
                    self._unspeakable.add(path.name)
                    logs.warning("a directory's name is not UTF-8; not served", name=repr(path))

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self._options.poll)
            try:
                self._discover_all()
                for entry in list(self._entries.values()):
                    await self._look(entry)
            except Exception as error:  # nothing may end the looking
                logs.exception("cannot look for new versions", error)

    async def _look(self, entry: Entry) -> None:
        try:
            if entry.wanted:
                async with entry.lock:
                    await self._update(entry)
        except Refusal as refusal:
            logs.warning("cannot look for new versions", model=entry.name, reason=refusal.message)

    async def _update(self, entry: Entry) -> None:
        """Make the newest version that loads the current one."""
        try:
            candidates = entry.candidates()
        except OSError as error:
            raise Refusal(Kind.UNAVAILABLE, f"cannot look for versions: {error}") from error
        present = {identity for identity, _ in candidates}
        entry.failures = {key: why for key, why in entry.failures.items() if key in present}
        for identity, path in candidates:
            if identity == entry.identity:
                return
            if identity in entry.failures and not entry.failures[identity].is_due:
                continue
            new = Version(entry.name, identity.version, path, self._options, self._metrics)
            try:
                self._check_place(entry, path)
                await new.start()
            except LoadFailed as error:
                self._note_failure(entry, identity, str(error))
                continue
            entry.failures.pop(identity, None)
            self._replace(entry, new, identity)
            return

    def _check_place(self, entry: Entry, path: Path) -> None:
        """Refuse links that lead out of a directory of models: whose files are these?"""
        for directory in self._directories:
            if entry.source.is_relative_to(directory):
                root, real = directory.resolve(), path.resolve()
                if not real.is_relative_to(root):
                    raise LoadFailed(f"{path} is a link to {real}, outside {directory}")

    def _note_failure(self, entry: Entry, identity: Identity, reason: str) -> None:
        """Keep the reason; what the system lacked today it may have tomorrow, so try again."""
        before = entry.failures.get(identity)
        entry.failures[identity] = Failure(reason, before)
        if before is None or before.reason != reason:
            logs.warning(
                "version cannot be loaded",
                model=entry.name,
                version=identity.version,
                reason=reason,
            )

    def _replace(self, entry: Entry, new: Version, identity: Identity) -> None:
        old, entry.current, entry.identity = entry.current, new, identity
        if old is not None:
            logs.info("version replaced", model=entry.name, old=old.version, new=new.version)
            task = asyncio.create_task(old.stop())
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    def _processes(self) -> Iterator[tuple[str, int]]:
        for entry in self._entries.values():
            if entry.current is not None:
                for pid in entry.current.pids:
                    yield entry.name, pid


def _identity(version: str, path: Path) -> Identity | None:
    try:
        status = path.stat()
    except OSError:
        return None
    try:
        tokenizer = tokenizer_of(path).stat().st_mtime_ns
    except OSError:
        tokenizer = 0
    return Identity(version, status.st_ino, status.st_mtime_ns, status.st_size, tokenizer)


def _is_text(name: str) -> bool:
    """Whether a file's name can be said in a request."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _row(name: str, version: str, state: str, reason: str) -> dict[str, str]:
    return {"name": name, "version": version, "state": state, "reason": reason}
