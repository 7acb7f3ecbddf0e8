"""sparse-tvm: a compiler that makes pruned neural networks run faster.

>>> import sparse_tvm
>>> sparse_tvm.compile("pruned.onnx", "model.so")  # doctest: +SKIP
>>> model = sparse_tvm.load("model.so", threads=2)  # doctest: +SKIP
>>> outputs = model.run({"input_ids": ids})  # doctest: +SKIP

The names below are imported on first use, so that loading a compiled model never imports the
compiler, nor even the ``onnx`` package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparse_tvm import errors
from sparse_tvm.collection import without_collection

__version__: str

if TYPE_CHECKING:
    from sparse_tvm.benchmark import bench
    from sparse_tvm.compiler import compile, preview
    from sparse_tvm.inspection import inspect
    from sparse_tvm.planning.planner import plan
    from sparse_tvm.runtime import load
    from sparse_tvm.session import InferenceSession
    from sparse_tvm.sparsity.pruning import prune
    from sparse_tvm.tuning.tuner import tune

__all__ = [
    "InferenceSession",
    "__version__",
    "bench",
    "compile",
    "errors",
    "inspect",
    "load",
    "plan",
    "preview",
    "prune",
    "tune",
]

_HOMES = {
    "bench": "sparse_tvm.benchmark",
    "compile": "sparse_tvm.compiler",
    "InferenceSession": "sparse_tvm.session",
    "inspect": "sparse_tvm.inspection",
    "load": "sparse_tvm.runtime",
    "plan": "sparse_tvm.planning.planner",
    "preview": "sparse_tvm.compiler",
    "prune": "sparse_tvm.sparsity.pruning",
    "tune": "sparse_tvm.tuning.tuner",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with without_collection():
        value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def _version() -> str:
    from importlib import metadata  # slow to import, for a name that is rarely wanted

    from sparse_tvm.extras import installed_distribution

    distribution = installed_distribution()
    return metadata.version(distribution) if distribution else "0+unknown"  # a source tree


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
