"""Time LSTM and GRU, dense and pruned, with weights of float32 and float16, against ONNX Runtime.

One network of 512 inputs and 512 units goes over 64 steps. ONNX Runtime runs the same weights, with
their zeros; all variants and ONNX Runtime take turns, as :mod:`sparse_tvm.interleave` explains.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import onnx
import onnxruntime
import typer
from onnx import helper, numpy_helper

import sparse_tvm
from sparse_tvm.cli.console import stdout_console
from sparse_tvm.cli.tables import plain_table
from sparse_tvm.cpu import cpu_model
from sparse_tvm.interleave import interleave
from sparse_tvm.sparsity.masks import prune_array

GATES = {"LSTM": 4, "GRU": 3}
VARIANTS = {
    "dense": (0.0, "unstructured"),
    "80 %": (0.8, "unstructured"),
    "90 %": (0.9, "unstructured"),
    "90 % 4x1": (0.9, "4x1"),
    "90 % 16x1": (0.9, "16x1"),
}
TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2}


def network(
    kind: str, hidden: int, steps: int, batch: int, sparsity: float, structure: str
) -> onnx.ModelProto:
    """One network in forward direction, pruned by magnitude."""
    generator, rows = np.random.default_rng(0), GATES[kind] * hidden

    def weight(name: str) -> onnx.TensorProto:
        w = generator.standard_normal((rows, hidden)).astype(np.float32)
        w = prune_array(w, sparsity, structure) if sparsity else w
        scale = np.float32((1 - sparsity) ** -0.5 * hidden**-0.5)
        return numpy_helper.from_array((w * scale)[None], name)

    bias = generator.standard_normal((1, 2 * rows)).astype(np.float32)
    after = {"linear_before_reset": 1} if kind == "GRU" else {}  # as PyTorch and Keras have it
    node = helper.make_node(kind, ["x", "w", "r", "b"], ["y"], hidden_size=hidden, **after)
    graph = helper.make_graph(
        [node],
        "recurrent",
        [helper.make_tensor_value_info("x", 1, [steps, batch, hidden])],
        [helper.make_tensor_value_info("y", 1, [steps, 1, batch, hidden])],
        [weight("w"), weight("r"), numpy_helper.from_array(bias, "b")],
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def session(model: onnx.ModelProto, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def main(
    artifacts: Annotated[Path, typer.Argument(help="Where artifacts are kept for later runs.")],
    hidden: int = 512,
    steps: int = 64,
    batch: int = 1,
    threads: int = 1,
    duration: Annotated[float, typer.Option(help="Seconds per engine and network.")] = 0.5,
    compile_only: bool = False,
) -> None:
    artifacts.mkdir(parents=True, exist_ok=True)
    x = np.random.default_rng(1).standard_normal((steps, batch, hidden)).astype(np.float32)
    columns = ("float32", "float16", "ONNX Runtime", "times faster")
    table = plain_table("network", "weights", *columns, "kernels", numbers=columns)
    for kind in GATES:
        for name, pruning in VARIANTS.items():
            model = network(kind, hidden, steps, batch, *pruning)
            file = f"{kind}_{name}_{hidden}_{steps}_{batch}".replace(" ", "")
            paths = {each: artifacts / f"{file}_{each}.so" for each in TOLERANCES}
            for precision, path in paths.items():
                if not path.exists():
                    sparse_tvm.compile(model, path, precision=precision)
            if compile_only:
                continue
            theirs = session(model, threads)
            (expected,) = theirs.run(None, {"x": x})
            runs = {"theirs": partial(theirs.run, None, {"x": x})}
            for precision, path in paths.items():
                ours = sparse_tvm.load(path, threads=threads)
                (found,) = ours.run({"x": x}).values()
                difference = np.abs(found - expected).max()
                assert difference <= TOLERANCES[precision], (kind, name, precision, difference)
                runs[precision] = partial(ours.run, {"x": x})
            kernels = ", ".join(layer["kernel"] for layer in ours.manifest["layers"])
            times = {key: median(t) for key, t in interleave(runs, duration=duration).items()}
            cells = [f"{1e3 * times[key]:.2f}" for key in (*TOLERANCES, "theirs")]
            table.add_row(kind, name, *cells, f"{times['theirs'] / times['fp32']:.2f}", kernels)
    stdout_console().print(
        f"{cpu_model()}, {threads} threads; {steps} steps of {batch} sequences, hidden {hidden}; ms"
    )
    stdout_console().print(table)


if __name__ == "__main__":
    typer.run(main)
