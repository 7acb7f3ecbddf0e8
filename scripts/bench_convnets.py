"""Convolutional networks against ONNX Runtime, OpenVINO and LiteRT, all interleaved in one process.

Dense engines run the unpruned model, ours the pruned ones too; ``best`` is the fastest of the
others in float32. Outputs are compared with ONNX Runtime's on the same model first. OpenVINO takes
part where it is installed; LiteRT (``ai-edge-litert``) where the network lies in the work directory
as a ``.tflite`` file with the same weights.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import typer

import sparse_tvm
from sparse_tvm.cli.console import stdout_console
from sparse_tvm.cli.tables import plain_table
from sparse_tvm.cpu import cpu_model
from sparse_tvm.interleave import interleave
from sparse_tvm.models.convnets import build_mobilenet_v2, build_resnet50
from sparse_tvm.reference import Reference

NETWORKS: dict[str, tuple[Callable[[], onnx.ModelProto], tuple[str, ...]]] = {
    "mobilenet_v2": (build_mobilenet_v2, ("0", "80", "90", "90:4x1")),
    "resnet50": (build_resnet50, ("0", "90", "90:4x1", "95:4x1")),
}
"""Builder and variants, ``SPARSITY%[:STRUCTURE]``, of each network."""

TOLERANCE = 1e-3


def prepare(network: str, directory: Path, variants: tuple[str, ...]) -> dict[str, Path]:
    """The ONNX files of a network by variant, and our artifacts beside them."""
    build, known = NETWORKS[network]
    dense = directory / f"{network}.onnx"
    if not dense.exists():
        onnx.save(build(), dense)
    models = {}
    for variant in variants or known:
        share, _, structure = variant.partition(":")
        model = directory / f"{network}-{variant.replace(':', '-')}.onnx"
        if not model.exists():
            if share == "0":
                model.write_bytes(dense.read_bytes())
            else:
                structure = structure or "unstructured"
                sparse_tvm.prune(dense, model, sparsity=float(share) / 100, structure=structure)
        if not model.with_suffix(".so").exists():
            sparse_tvm.compile(model, model.with_suffix(".so"), verify=False)
        models[variant] = model
    return {"dense": dense, **models}


def openvino_engine(model: Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    import openvino

    options = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = openvino.Core().compile_model(model, "CPU", options)
    return lambda x: np.asarray(compiled({0: x})[0])


def litert_engine(model: Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(model), num_threads=threads)
    interpreter.allocate_tensors()
    source, target = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    channels_last = list(source["shape"])[-1] == 3

    def run(x: np.ndarray) -> np.ndarray:
        value = np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if channels_last else x
        interpreter.set_tensor(source["index"], value)
        interpreter.invoke()
        return np.asarray(interpreter.get_tensor(target["index"]))

    return run


def dense_engines(model: Path, threads: int) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Every engine that runs the unpruned model."""
    reference = Reference(model, threads=threads)
    engines: dict[str, Any] = {"ONNX Runtime": lambda x: reference.run({"input": x})["logits"]}
    if find_spec("openvino"):
        engines["OpenVINO f32"] = openvino_engine(model, threads)
    tflite = model.with_suffix(".tflite")
    if find_spec("ai_edge_litert") and tflite.exists():
        engines["LiteRT"] = litert_engine(tflite, threads)
    return engines


def compare(network: str, models: dict[str, Path], threads: int, duration: float) -> list[str]:
    """Print one network's table; return what is wrong with outputs."""
    x = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    dense = models.pop("dense")
    engines = dense_engines(dense, threads)
    expected = engines["ONNX Runtime"](x)
    wrong = [
        f"{network}: {name} differs" for name, run in engines.items() if _differs(run(x), expected)
    ]
    others = list(engines)
    for variant, model in models.items():
        artifact = sparse_tvm.load(model.with_suffix(".so"), threads=threads)
        name = f"sparse-tvm {variant}"
        engines[name] = lambda x, artifact=artifact: artifact.run({"input": x})["logits"]
        if _differs(engines[name](x), Reference(model, threads=1).run({"input": x})["logits"]):
            wrong.append(f"{network}: {name} differs")
    runs = {name: lambda run=run: run(x) for name, run in engines.items()}
    times = interleave(runs, duration=duration)
    medians = {name: statistics.median(values) for name, values in times.items()}
    best = min(medians[name] for name in others)
    title = f"{network}, 1 x 3 x 224 x 224, threads: {threads}, {cpu_model()}"
    table = plain_table(title, "ms", "times the best", numbers=("ms", "times the best"))
    for name, seconds in medians.items():
        table.add_row(name, f"{seconds * 1e3:.2f}", f"{best / seconds:.2f}")
    stdout_console().print(table)
    return wrong


def _differs(output: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(output - expected).max() > TOLERANCE * max(1.0, np.abs(expected).max()))


def main(
    network: Annotated[list[str] | None, typer.Argument(help="Of those known; all.")] = None,
    threads: Annotated[list[int] | None, typer.Option(help="Numbers of threads.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help="SPARSITY%[:STRUCTURE].")] = None,
    duration: Annotated[float, typer.Option(help="Seconds per engine.")] = 1.5,
    workdir: Annotated[Path | None, typer.Option(help="Keeps models and artifacts.")] = None,
    only_prepare: Annotated[bool, typer.Option(help="Build and compile, time nothing.")] = False,
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        directory = workdir or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        wrong = []
        for name in network or NETWORKS:
            models = prepare(name, directory, tuple(variant or ()))
            for count in [] if only_prepare else threads or [1, 2]:
                wrong += compare(name, dict(models), count, duration)
    if wrong:
        sys.exit("\n".join(f"error: {failure}" for failure in wrong))


if __name__ == "__main__":
    typer.run(main)
