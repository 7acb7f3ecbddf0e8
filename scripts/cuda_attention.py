"""Attention on a GPU: checked against ONNX Runtime, and timed beside PyTorch's.

    python scripts/cuda_attention.py [--seconds 60]

One attention after another reads the one before as its queries, so that the difference of a long
and a short chain is the kernel's own time, without launches or conversions at the ends. PyTorch's
is ``scaled_dot_product_attention`` in float16 over views of the same layout.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from cuda_device import layer_seconds
from onnx import TensorProto, helper, numpy_helper

import sparse_tvm
from sparse_tvm.cuda_device import capability_of
from sparse_tvm.targets.cuda import CUDA_TARGETS

CASES = (
    (1, 12, 128, 64),
    (16, 12, 128, 64),
    (256, 12, 128, 64),
    (16, 12, 512, 64),
    (8, 32, 512, 128),
)
"""Batch, heads, rows and features of a head."""

SHORT, LONG = 1, 9


def chain(batch: int, heads: int, rows: int, size: int, length: int) -> onnx.ModelProto:
    """So many attentions over one input, as ONNX."""
    split, merged = [batch, rows, heads, size], [batch, rows, heads * size]
    arrays = {
        "split": np.array(split),
        "merged": np.array(merged),
        "scale": np.array(size**-0.5, np.float32),
    }
    nodes = [
        helper.make_node("Reshape", ["x", "split"], ["rows"]),
        helper.make_node("Transpose", ["rows"], ["v"], perm=[0, 2, 1, 3]),
        helper.make_node("Transpose", ["rows"], ["k"], perm=[0, 2, 3, 1]),
    ]
    q = "x"
    for i in range(length):
        y = "y" if i == length - 1 else f"y{i}"
        nodes += [
            helper.make_node("Reshape", [q, "split"], [f"rows{i}"]),
            helper.make_node("Transpose", [f"rows{i}"], [f"q{i}"], perm=[0, 2, 1, 3]),
            helper.make_node("MatMul", [f"q{i}", "k"], [f"product{i}"]),
            helper.make_node("Mul", [f"product{i}", "scale"], [f"scores{i}"]),
            helper.make_node("Softmax", [f"scores{i}"], [f"weights{i}"], axis=-1),
            helper.make_node("MatMul", [f"weights{i}", "v"], [f"heads{i}"]),
            helper.make_node("Transpose", [f"heads{i}"], [f"last{i}"], perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", [f"last{i}", "merged"], [y]),
        ]
        q = y
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, merged)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, merged)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def kernel_seconds(case: tuple[int, int, int, int], target: str, path: Path, repeats: int) -> float:
    """Seconds of one attention inside of a chain."""
    seconds = []
    for length in (SHORT, LONG):
        sparse_tvm.compile(chain(*case, length), path, target=target, verify=length == SHORT)
        seconds.append(layer_seconds(path, repeats))
    return (seconds[1] - seconds[0]) / (LONG - SHORT)


def torch_seconds(batch: int, heads: int, rows: int, size: int, repeats: int) -> float | None:
    """Seconds of PyTorch's attention; None without PyTorch on a GPU."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    x = torch.randn(batch, rows, heads, size, dtype=torch.float16, device="cuda").transpose(1, 2)
    attend = torch.nn.functional.scaled_dot_product_attention
    for _ in range(3):
        attend(x, x, x)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        attend(x, x, x)
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats


def rows(target: str, deadline: float, cases=CASES, repeats: int = 50) -> Iterator[str]:
    """The table of measured seconds."""
    yield "| batch | heads | rows | features | attention | PyTorch |"
    yield "|---" * 6 + "|"
    with tempfile.TemporaryDirectory() as directory:
        for case in cases:
            if time.perf_counter() > deadline:
                return
            ours = kernel_seconds(case, target, Path(directory) / "attention.so", repeats)
            cells = [
                f"{s * 1e6:.1f} us" if s else "" for s in (ours, torch_seconds(*case, repeats))
            ]
            yield f"| {' | '.join(map(str, case))} | {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="when timings end")
    options = parser.parse_args()
    capability = capability_of(0)
    target = max(
        (t for t in CUDA_TARGETS[:-1] if t.gpu.capability <= capability),
        key=lambda t: t.gpu.capability,
    )
    for row in rows(target.name, time.perf_counter() + options.seconds):
        print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
