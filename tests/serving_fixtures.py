"""A small text encoder with symbolic sizes, to serve."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from artifacts import manifest

VOCABULARY, FEATURES = 100, 16


@cache
def _code() -> bytes:
    """Compile an embedding whose rows also see the mean of the positions that count."""
    import tvm
    from tvm import relax
    from tvm.script import ir as I
    from tvm.script import relax as R

    from sparse_tvm.linker import Linker

    @I.ir_module
    class Encoder:
        @R.function
        def main(
            input_ids: R.Tensor(("batch", "sequence"), "int64"),
            attention_mask: R.Tensor(("batch", "sequence"), "int64"),
            table: R.Tensor((VOCABULARY, FEATURES), "float32"),
        ):
            R.func_attr({"num_input": 2})
            with R.dataflow():
                embedded = R.take(table, input_ids, axis=0)
                mask = R.astype(R.expand_dims(attention_mask, axis=[2]), "float32")
                total = R.sum(embedded * mask, axis=[1], keepdims=True)
                hidden = embedded + total / R.sum(mask, axis=[1], keepdims=True)
                R.output(hidden)
            return hidden

    target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"})
    executable = tvm.compile(relax.transform.BundleModelParams()(Encoder), target=target)
    with TemporaryDirectory() as directory:
        path = Path(directory) / "library.so"
        executable.export_library(str(path), fcompile=Linker())
        return path.read_bytes()


def table(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((VOCABULARY, FEATURES), np.float32)


def expected(ids: np.ndarray, mask: np.ndarray, seed: int = 0) -> np.ndarray:
    embedded = table(seed)[ids]
    counted = mask[:, :, None].astype(np.float32)
    return embedded + (embedded * counted).sum(1, keepdims=True) / counted.sum(1, keepdims=True)


def write_encoder(path: Path, seed: int = 0, longest: int = 512) -> Path:
    """Write the encoder, with random weights from `seed`, to `path`, in one step."""
    from sparse_tvm.artifact import write_artifact

    path.parent.mkdir(parents=True, exist_ok=True)
    code = path.with_suffix(".elf")
    code.write_bytes(_code())
    ids = [
        {"name": name, "dtype": "int64", "shape": ["batch", "sequence"]}
        for name in ("input_ids", "attention_mask")
    ]
    ids[0]["range"] = [0, VOCABULARY]
    hidden = {"name": "hidden", "dtype": "float32", "shape": ["batch", "sequence", FEATURES]}
    write_artifact(
        path,
        code,
        {"table": table(seed)},
        manifest(inputs=ids, outputs=[hidden], bounds={"sequence": [1, longest]}),
    )
    code.unlink()
    return path


def infer_body(ids: Any, mask: Any = None) -> dict[str, Any]:
    """Return the JSON of an inference request to the encoder."""
    ids = np.asarray(ids)
    mask = np.ones_like(ids) if mask is None else np.asarray(mask)
    return {
        "inputs": [
            {
                "name": name,
                "datatype": "INT64",
                "shape": list(array.shape),
                "data": array.reshape(-1).tolist(),
            }
            for name, array in (("input_ids", ids), ("attention_mask", mask))
        ]
    }


def peak_bytes(pid: int) -> int:
    """Return the most memory that a process has ever had resident."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
