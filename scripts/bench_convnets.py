"""Convolutional networks against ONNX Runtime, OpenVINO and LiteRT, all interleaved in one process.

Dense engines run the unpruned model, ours the pruned ones too; ``best`` is the fastest of the
others in float32. Outputs are compared with ONNX Runtime's on the same model first. OpenVINO takes
part where it is installed; LiteRT (``ai-edge-litert``) where the network lies in the work directory
as a ``.tflite`` file with the same weights. So may networks that are not built here: ``NAME.onnx``
from ``input`` ``[1, 3, 224, 224]`` to ``logits``, such as exports of torchvision's. ``--quantised``
runs all of it in int8: models that ONNX Runtime's static quantisation makes, each output channel of
a weight with its own scale.
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

VARIANTS = ("0", "80", "90", "90:4x1")
"""Of networks that are not built here."""

TOLERANCE = 1e-3


LEAST_COSINE = 0.99
"""Of quantised models: steps that fall the other way move what comes after them."""


def in_bytes(model: Path) -> Path:
    """A model in int8 beside another, calibrated on random images."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = model.with_name(f"{model.stem}-int8.onnx")
    if path.exists():
        return path

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            rng = np.random.default_rng(1)
            images = (rng.standard_normal((1, 3, 224, 224)).astype(np.float32) for _ in range(2))
            self._feeds = ({"input": image} for image in images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._feeds, None)

    folded = model.with_name(f"{model.stem}-folded.onnx")
    quant_pre_process(model, folded, skip_symbolic_shape=True)
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(folded, path, Images(), per_channel=True, **types)
    return path


def prepare(
    network: str, directory: Path, variants: tuple[str, ...], in_int8: bool
) -> dict[str, Path]:
    """The ONNX files of a network by variant, and our artifacts beside them."""
    dense = directory / f"{network}.onnx"
    known = VARIANTS
    if network in NETWORKS:
        build, known = NETWORKS[network]
        if not dense.exists():
            onnx.save(build(), dense)
    elif not dense.exists():
        sys.exit(f"error: no {dense}; built here are {', '.join(NETWORKS)}")
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
        if in_int8:
            model = in_bytes(model)
        if not model.with_suffix(".so").exists():
            sparse_tvm.compile(model, model.with_suffix(".so"), verify=False)
        models[variant] = model
    return {"dense": in_bytes(dense) if in_int8 else dense, **models}


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


def compare(
    network: str, models: dict[str, Path], threads: int, duration: float, in_int8: bool
) -> list[str]:
    """Print one network's table; return what is wrong with outputs."""
    x = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    dense = models.pop("dense")
    engines = dense_engines(dense, threads)
    expected = engines["ONNX Runtime"](x)
    differs = _points_elsewhere if in_int8 else _differs
    wrong = [
        f"{network}: {name} differs" for name, run in engines.items() if differs(run(x), expected)
    ]
    others = list(engines)
    for variant, model in models.items():
        artifact = sparse_tvm.load(model.with_suffix(".so"), threads=threads)
        name = f"sparse-tvm {variant}"
        engines[name] = lambda x, artifact=artifact: artifact.run({"input": x})["logits"]
        if differs(engines[name](x), Reference(model, threads=1).run({"input": x})["logits"]):
            wrong.append(f"{network}: {name} differs")
    runs = {name: lambda run=run: run(x) for name, run in engines.items()}
    times = interleave(runs, duration=duration)
    medians = {name: statistics.median(values) for name, values in times.items()}
    best = min(medians[name] for name in others)
    called = f"{network} in int8" if in_int8 else network
    title = f"{called}, 1 x 3 x 224 x 224, threads: {threads}, {cpu_model()}"
    table = plain_table(title, "ms", "times the best", numbers=("ms", "times the best"))
    for name, seconds in medians.items():
        table.add_row(name, f"{seconds * 1e3:.2f}", f"{best / seconds:.2f}")
    stdout_console().print(table)
    return wrong


def _differs(output: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(output - expected).max() > TOLERANCE * max(1.0, np.abs(expected).max()))


def _points_elsewhere(output: np.ndarray, expected: np.ndarray) -> bool:
    lengths = np.linalg.norm(output) * np.linalg.norm(expected)
    return bool((output * expected).sum() < LEAST_COSINE * lengths)


def main(
    network: Annotated[list[str] | None, typer.Argument(help="Built here, or in WORKDIR.")] = None,
    threads: Annotated[list[int] | None, typer.Option(help="Numbers of threads.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help="SPARSITY%[:STRUCTURE].")] = None,
    duration: Annotated[float, typer.Option(help="Seconds per engine.")] = 1.5,
    workdir: Annotated[Path | None, typer.Option(help="Keeps models and artifacts.")] = None,
    quantised: Annotated[bool, typer.Option(help="All of it in int8.")] = False,
    only_prepare: Annotated[bool, typer.Option(help="Build and compile, time nothing.")] = False,
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        directory = workdir or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        wrong = []
        for name in network or NETWORKS:
            models = prepare(name, directory, tuple(variant or ()), quantised)
            for count in [] if only_prepare else threads or [1, 2]:
                wrong += compare(name, dict(models), count, duration, quantised)
    if wrong:
        sys.exit("\n".join(f"error: {failure}" for failure in wrong))


if __name__ == "__main__":
    typer.run(main)
