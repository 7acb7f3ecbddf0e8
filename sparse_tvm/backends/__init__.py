"""The backends: one for each kind of device that models are compiled for.

Another package offers a backend by the entry point group ``sparse_tvm.backends``, whose entries
name functions without arguments that return a :class:`~sparse_tvm.backends.base.Backend`; or by
calling :func:`register`. Extra kernels for a backend that exists:
``get_backend("cpu").add(family)``.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

from sparse_tvm.backends.base import Backend, BackendTarget
from sparse_tvm.errors import TargetError

ENTRY_POINTS = "sparse_tvm.backends"

_registered: dict[str, Backend] = {}


def register(backend: Backend) -> None:
    """Add a backend.

    Raises
    ------
    ValueError
        When there is one of that name.
    """
    if backend.name in backends():
        raise ValueError(f"there is a backend {backend.name!r} already")
    _registered[backend.name] = backend


def unregister(name: str) -> None:
    """Take a backend that was registered away again."""
    _registered.pop(name, None)


def backends() -> dict[str, Backend]:
    """All backends by name, our own first."""
    return {**_built_in(), **_registered}


def get_backend(name: str) -> Backend:
    """The backend called ``name``.

    Raises
    ------
    TargetError
        When there is none.
    """
    if name not in backends():
        known = ", ".join(backends())
        raise TargetError(f"unknown backend {name!r}", hint=f"there are: {known}")
    return backends()[name]


def resolve_target(name: str) -> tuple[Backend, BackendTarget]:
    """The backend and the target that ``name`` stands for.

    Raises
    ------
    TargetError
        When no backend knows it, or ``native`` finds none that fits this machine.
    """
    for backend in backends().values():
        target = backend.find_target(name)
        if target is not None:
            return backend, target
    known = [target.name for backend in backends().values() for target in backend.targets]
    raise TargetError(f"unknown target {name!r}", hint=f"known targets: native, {', '.join(known)}")


@cache
def _built_in() -> dict[str, Backend]:
    from sparse_tvm.backends.cpu import CpuBackend
    from sparse_tvm.backends.cuda import CudaBackend

    made: list[Backend] = [CpuBackend(), CudaBackend()]
    made += [entry.load()() for entry in entry_points(group=ENTRY_POINTS)]
    return {backend.name: backend for backend in made}


__all__ = [
    "Backend",
    "BackendTarget",
    "backends",
    "get_backend",
    "register",
    "resolve_target",
    "unregister",
]
