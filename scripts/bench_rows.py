"""Time small networks for few rows of activations, against their dense form and ONNX Runtime.

Two networks of dense layers are pruned to several sparsities and compiled with a batch of any size,
so that one artifact serves all batches. At each batch size all variants, the dense form and ONNX
Runtime take turns, as :mod:`sparse_tvm.interleave` explains. A cell shows how much faster than the
dense form and than ONNX Runtime a variant is.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import onnxruntime
import typer
from onnx import numpy_helper, parser

import sparse_tvm
from sparse_tvm.cli.console import stdout_console
from sparse_tvm.cli.tables import plain_table
from sparse_tvm.cpu import cpu_model
from sparse_tvm.interleave import interleave
from sparse_tvm.sparsity.masks import prune_array

NETWORKS = {
    "512-2048-2048-100": (512, 2048, 2048, 100),
    "13 layers of 256": (256,) * 14,
}
SPARSITIES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95)
STRUCTURES = ("unstructured", "4x1")
BATCHES = (1, 2, 4, 8, 16, 32, 128)
BLOCK_S = 0.02
DENSE, REFERENCE = "dense form", "ONNX Runtime"
TOLERANCE = 1e-3


def weights_of(
    widths: tuple[int, ...], sparsity: float, structure: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weight and bias of each layer, pruned by magnitude."""
    generator = np.random.default_rng(0)
    layers = []
    for k, n in pairwise(widths):
        w = generator.standard_normal((n, k)).astype(np.float32) * np.float32((2 / k) ** 0.5)
        if sparsity:
            w = prune_array(w, sparsity, structure) * np.float32((1 - sparsity) ** -0.5)
        layers.append((w, generator.standard_normal(n).astype(np.float32)))
    return layers


def network(layers: list[tuple[np.ndarray, np.ndarray]]) -> onnx.ModelProto:
    """Dense layers with ReLU between them, for a batch of any size."""
    nodes, source = [], "x"
    for i in range(len(layers)):
        nodes.append(f"g{i} = Gemm<transB = 1>({source}, w{i}, b{i})")
        source = f"h{i}" if i < len(layers) - 1 else "y"
        nodes.append(f"{source} = {'Relu' if source != 'y' else 'Identity'}(g{i})")
    inputs, outputs = layers[0][0].shape[1], layers[-1][0].shape[0]
    model = parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> g (float[batch, {inputs}] x)'
        f" => (float[batch, {outputs}] y) {{ {' '.join(nodes)} }}"
    )
    for i, arrays in enumerate(layers):
        for name, array in zip("wb", arrays, strict=True):
            model.graph.initializer.append(numpy_helper.from_array(array, f"{name}{i}"))
    return model


def expected(layers: list[tuple[np.ndarray, np.ndarray]], x: np.ndarray) -> np.ndarray:
    """What the network computes, by NumPy."""
    for w, bias in layers[:-1]:
        x = np.maximum(x @ w.T + bias, 0)
    w, bias = layers[-1]
    return np.asarray(x @ w.T + bias)


def session(model: onnx.ModelProto, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def compiled(path: Path, model: onnx.ModelProto, threads: int, format: str) -> sparse_tvm.Model:
    """The artifact at ``path``, made if it is not there."""
    if not path.exists():
        sparse_tvm.compile(model, path, threads=threads, format=format)
    return sparse_tvm.load(path, threads=threads)


def measure(
    engines: dict[str, sparse_tvm.Model],
    reference: onnxruntime.InferenceSession,
    x: np.ndarray,
    duration: float,
) -> dict[str, float]:
    """Median seconds of each engine."""
    inputs = {"x": x}
    runs: dict[str, Callable[[], object]] = {
        name: partial(engine.run, inputs) for name, engine in engines.items()
    }
    runs[REFERENCE] = partial(reference.run, None, inputs)
    times = interleave(runs, duration=duration, block=BLOCK_S)
    return {name: statistics.median(found) for name, found in times.items()}


def main(
    artifacts: Annotated[Path, typer.Argument(help="Where artifacts are kept for later runs.")],
    threads: int = 1,
    duration: Annotated[float, typer.Option(help="Seconds per engine and batch size.")] = 0.2,
    compile_only: bool = False,
) -> None:
    artifacts.mkdir(parents=True, exist_ok=True)
    variants = {
        f"{sparsity:.0%} {structure}" if sparsity else "0%": (sparsity, structure)
        for structure in STRUCTURES
        for sparsity in SPARSITIES
    }
    stdout_console().print(f"{cpu_model()}, {threads} threads; times dense form, ONNX Runtime")
    for name, widths in NETWORKS.items():
        layers = {variant: weights_of(widths, *pruning) for variant, pruning in variants.items()}
        unpruned = network(layers["0%"])
        forms = {variant: (network(each), "auto") for variant, each in layers.items()}
        forms[DENSE] = unpruned, "dense"
        engines = {}
        for variant, (model, format) in forms.items():
            path = artifacts / f"{name} {variant}.so".replace(" ", "_")
            engines[variant] = compiled(path, model, threads, format)
        if compile_only:
            continue
        reference = session(unpruned, threads)
        columns = tuple(f"batch {batch}" for batch in BATCHES)
        cells: dict[str, list[str]] = {engine: [] for engine in (REFERENCE, DENSE, *variants)}
        for batch in BATCHES:
            generator = np.random.default_rng(batch)
            x = generator.standard_normal((batch, widths[0])).astype(np.float32)
            for variant, each in layers.items():
                wanted = expected(each, x)
                difference = np.abs(engines[variant].run({"x": x})["y"] - wanted).max()
                assert difference <= TOLERANCE * np.abs(wanted).max(), (variant, difference)
            times = measure(engines, reference, x, duration)
            for key in (REFERENCE, DENSE):
                cells[key].append(f"{times[key] * 1e6:.0f} us")
            for key in variants:
                dense, theirs = times[DENSE] / times[key], times[REFERENCE] / times[key]
                cells[key].append(f"{dense:.2f}, {theirs:.2f}")
        table = plain_table(name, *columns, numbers=columns)
        for key, row in cells.items():
            table.add_row(key, *row)
        stdout_console().print(table)


if __name__ == "__main__":
    typer.run(main)
