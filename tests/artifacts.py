"""A small compiled model for tests, built straight from Relax."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from sparse_tvm.artifact import write_artifact
from sparse_tvm.linker import Linker

TOKENS, FEATURES = 8, 64


@I.ir_module
class Small:
    @T.prim_func
    def epilogue(
        x: T.Buffer((TOKENS, FEATURES), "float32"),
        b: T.Buffer((FEATURES,), "float32"),
        y: T.Buffer((TOKENS, FEATURES), "float32"),
    ):
        T.func_attr({"tirx.noalias": True})
        for row in T.parallel(TOKENS):
            for i in T.vectorized(FEATURES):
                y[row, i] = T.max(x[row, i] + b[i], T.float32(0))

    @R.function
    def main(
        x: R.Tensor((TOKENS, FEATURES), "float32"),
        ids: R.Tensor((TOKENS,), "int64"),
        w: R.Tensor((FEATURES, FEATURES), "float32"),
        b: R.Tensor((FEATURES,), "float32"),
    ):
        R.func_attr({"num_input": 2})
        cls = Small
        with R.dataflow():
            product = R.matmul(x, w)
            y = R.call_tir(cls.epilogue, (product, b), R.Tensor((TOKENS, FEATURES), "float32"))
            R.output(y)
        return (y, ids, w)


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "w": rng.standard_normal((FEATURES, FEATURES), dtype=np.float32),
        "b": rng.standard_normal(FEATURES, dtype=np.float32),
    }


def inputs(seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((TOKENS, FEATURES), dtype=np.float32),
        "ids": rng.integers(0, 100, TOKENS),
    }


def expected(values: dict[str, np.ndarray], seed: int = 0) -> np.ndarray:
    w, b = weights(seed).values()
    return np.maximum(values["x"] @ w + b, 0)


def manifest(**changes: Any) -> dict[str, Any]:
    return {
        "versions": {"sparse_tvm": "0", "tvm": "0.27.0.post1", "tvm_ffi": "0.1.14.post1"},
        "backend": "cpu",
        "device": "cpu",
        "target": {
            "name": "x86-64-v3",
            "triple": "x86_64-linux-gnu",
            "cpu": "x86-64-v3",
            "features": ["avx2", "fma"],
            "vector_bits": 256,
        },
        "model": {"name": "small", "source": None, "kind": "test", "sha256": None},
        "threads": None,
        "layers": [],
        "notes": [],
        "totals": {"parameters": 0, "nonzeros": 0, "weight_bytes": 0},
        "compile": {"seconds": 0.0, "peak_memory_bytes": 0, "phases": []},
        "verification": None,
        "inputs": [
            {"name": "x", "dtype": "float32", "shape": [TOKENS, FEATURES]},
            {"name": "ids", "dtype": "int64", "shape": [TOKENS]},
        ],
        "outputs": [
            {"name": "y", "dtype": "float32", "shape": [TOKENS, FEATURES]},
            {"name": "same_ids", "dtype": "int64", "shape": [TOKENS]},
            {"name": "weight", "dtype": "float32", "shape": [FEATURES, FEATURES]},
        ],
        "kernels": {"epilogue": {"kind": "epilogue", "layers": ["encoder.bias"]}},
        **changes,
    }


@cache
def library(module: tvm.IRModule = Small) -> bytes:
    """Return the linked code of `module`."""
    target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"})
    executable = tvm.compile(relax.transform.BundleModelParams()(module), target=target)
    with TemporaryDirectory() as directory:
        path = Path(directory) / "library.so"
        executable.export_library(str(path), fcompile=Linker())
        return path.read_bytes()


def write(path: Path, seed: int = 0, **changes: Any) -> Path:
    """Write the small model, with random weights from `seed`, to `path`."""
    code = path.with_suffix(".elf")
    code.write_bytes(library())
    write_artifact(path, code, weights(seed), manifest(**changes))
    code.unlink()
    return path
