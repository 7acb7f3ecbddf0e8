"""Everything that needs a GPU, in one call: the native tests, then the speed of layers.

    python scripts/cuda_device.py [--predict] [--seconds 300]

First small models of every layout and many shapes are compiled, run on ``cuda:0`` and compared
with ONNX Runtime; then layers are timed, with their weights dense, in blocks and 2:4, beside
PyTorch's (cuBLAS) where it is installed. Layers are timed inside of artifacts, with inputs on the
device, by the wall clock over many calls. ``--predict`` prints what the cost model says instead,
and needs no device; ``--seconds`` ends the timings early.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import sparse_tvm
from sparse_tvm.backends import get_backend
from sparse_tvm.cuda_device import capability_of
from sparse_tvm.errors import DeviceError, SparseTvmError
from sparse_tvm.operators import PRECISIONS, Dense, Layout
from sparse_tvm.schedules.cuda.families.sparse import SparseDenseFamily
from sparse_tvm.sparsity.masks import prune_array
from sparse_tvm.sparsity.statistics import AssumedWeight
from sparse_tvm.targets.cuda import CUDA_TARGETS, CudaTarget

FORMS = {
    "dense": (0.0, "dense", (1, 1)),
    "2:4": (0.5, "2:4", (1, 4)),
    "32x32 75 %": (0.75, "bsr", (32, 32)),
    "32x32 90 %": (0.9, "bsr", (32, 32)),
    "64x64 90 %": (0.9, "bsr", (64, 64)),
    "unstructured 90 %": (0.9, "csr", (1, 1)),
    "unstructured 95 %": (0.95, "csr", (1, 1)),
    "unstructured 98 %": (0.98, "csr", (1, 1)),
}
"""Sparsity, format and block of the weights that are compared."""

LAYERS = ((768, 768), (3072, 768), (768, 3072), (4096, 4096))
TOKENS = (16, 128, 1024, 4096)
CHECKED = ((1, 16, 8), (5, 40, 72), (33, 200, 136), (128, 768, 768), (300, 264, 520))


def one_layer(w: np.ndarray, tokens: int) -> onnx.ModelProto:
    """``gelu(x w^T + b)`` as an ONNX model."""
    arrays = {"w": w.T, "b": np.linspace(-1, 1, len(w))}
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["product"]),
            helper.make_node("Add", ["product", "b"], ["sum"]),
            helper.make_node("Gelu", ["sum"], ["y"]),
        ],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [tokens, w.shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [tokens, len(w)])],
        [
            numpy_helper.from_array(np.ascontiguousarray(a, np.float32), n)
            for n, a in arrays.items()
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def weight(n: int, k: int, form: str) -> np.ndarray:
    """A random weight of a form."""
    sparsity, format, block = FORMS[form]
    w = np.random.default_rng([n, k]).standard_normal((n, k)).astype(np.float32) * k**-0.5
    structure = "2:4" if format == "2:4" else "{}x{}".format(*block)
    return prune_array(w, sparsity, structure) if sparsity else w


def compiled(
    n: int,
    k: int,
    tokens: int,
    form: str,
    target: str,
    path: Path,
    verify: bool,
    precision: str = "fp16",
):
    """An artifact of one layer; its report and verification are the result's."""
    _, format, block = FORMS[form]
    rule = {"bsr": [f"=bsr:{block[0]}x{block[1]}"], "csr": ["=csr"]}.get(format, [])
    return sparse_tvm.compile(
        one_layer(weight(n, k, form), tokens),
        path,
        target=target,
        layer_rules=rule,
        verify=verify,
        precision=precision,
    )


def check(target: str, shapes=CHECKED) -> list[str]:
    """Compile and verify every form at every shape, at one in bf16; return what went wrong."""
    cases = [(shape, "fp16") for shape in shapes] + [(shapes[len(shapes) // 2], "bf16")]
    wrong = []
    with tempfile.TemporaryDirectory() as directory:
        for (tokens, n, k), precision in cases:
            for form in FORMS:
                where = f"{form} in {precision}, {n} x {k}, {tokens} tokens"
                path = Path(directory) / "layer.so"
                try:
                    result = compiled(n, k, tokens, form, target, path, True, precision)
                except SparseTvmError as error:
                    wrong.append(f"{where}: {error}")
                    continue
                if result.manifest["verification"] is None:
                    wrong.append(f"{where}: {result.manifest['unverified']}")
                found = result.manifest["verification"]
                print(f"{where}: {found and found['max_abs_diff']['y']}", flush=True)
    return wrong


def layer_seconds(path: Path, repeats: int = 50) -> float:
    """Seconds of a call with its input on the device."""
    with sparse_tvm.load(path) as model:
        (spec,) = model.inputs
        x = np.random.default_rng(0).standard_normal(spec.shape).astype(np.float32)
        model.run(x)
        (staged,), device, times = model._staged, model._device, []
        for _ in range(5):
            started = time.perf_counter()
            with device.submitting():
                for _ in range(repeats):
                    model._machine.main(staged.buffer.tensor, model._weights)
            device.wait()
            times.append((time.perf_counter() - started) / repeats)
        return median(times)


def torch_seconds(n: int, k: int, tokens: int, repeats: int = 50) -> float | None:
    """Seconds of PyTorch's layer in float16, without an activation; None without PyTorch."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    x = torch.randn(tokens, k, dtype=torch.float16, device="cuda")
    w = torch.randn(n, k, dtype=torch.float16, device="cuda")
    b = torch.randn(n, dtype=torch.float16, device="cuda")
    times = []
    for _ in range(6):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(repeats):
            torch.nn.functional.linear(x, w, b)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - started) / repeats)
    return median(times[1:])


def speed_rows(target: str, deadline: float) -> Iterator[str]:
    """The table of measured seconds."""
    yield f"| layer | tokens | PyTorch | {' | '.join(FORMS)} |"
    yield "|---" * (3 + len(FORMS)) + "|"
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "layer.so"
        for n, k in LAYERS:
            for tokens in TOKENS:
                if time.perf_counter() > deadline:
                    return
                cells = [torch_seconds(n, k, tokens)]
                for form in FORMS:
                    compiled(n, k, tokens, form, target, path, False)
                    cells.append(layer_seconds(path))
                shown = (f"{c * 1e6:.1f} us" if c is not None else "" for c in cells)
                yield f"| {n} x {k} | {tokens} | {' | '.join(shown)} |"


def predicted_seconds(n: int, k: int, tokens: int, form: str, target: CudaTarget) -> float:
    """What the cost model says of the fastest kernel for a form."""
    sparsity, format, block = FORMS[form]
    op = Dense(layer="", matrix=(n, k), types=PRECISIONS["fp16"])
    assumed = AssumedWeight((n, k), sparsity, block if format == "bsr" else (1, 1))
    return min(
        family.cost(op, Layout(family.name, format, block), assumed, tokens, target)
        for family in get_backend("cuda").accepting(op, target)
        if (format == "csr") == (family.name == SparseDenseFamily.name)
    )


def predicted_rows(target: CudaTarget) -> Iterator[str]:
    """The same table as the cost model has it: how many times faster than dense."""
    yield f"| layer | tokens | dense | {' | '.join(list(FORMS)[1:])} |"
    yield "|---" * (2 + len(FORMS)) + "|"
    for n, k in LAYERS:
        for tokens in TOKENS:
            seconds = [predicted_seconds(n, k, tokens, form, target) for form in FORMS]
            ratios = (f"{seconds[0] / each:.2f}" for each in seconds[1:])
            yield f"| {n} x {k} | {tokens} | {seconds[0] * 1e6:.1f} us | {' | '.join(ratios)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--predict", action="store_true", help="what the cost model says")
    parser.add_argument("--seconds", type=float, default=300, help="when timings end")
    options = parser.parse_args()
    if options.predict:
        for target in CUDA_TARGETS[:-1]:
            print(f"\n{target.gpu.device}\n")
            print(*predicted_rows(target), sep="\n")
        return 0
    try:
        capability = capability_of(0)
    except DeviceError as error:
        print(error)
        return 1
    target = max(
        (t for t in CUDA_TARGETS[:-1] if t.gpu.capability <= capability),
        key=lambda t: t.gpu.capability,
    )
    print(f"cuda:0 has compute capability {capability / 10}; target {target.name}")
    wrong = check(target.name)
    print("\n".join(wrong) or "all native tests pass", flush=True)
    for row in speed_rows(target.name, time.perf_counter() + options.seconds):
        print(row, flush=True)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
