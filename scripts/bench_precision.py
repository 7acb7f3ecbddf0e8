"""Times linear layers in every precision and form, beside ONNX Runtime, in one interleaved run.

Prints the layer of 768 to 768 with its weights in the second cache, and the 72 layers of BERT-base
one after another, whose weights come from the last cache or memory: medians in microseconds, and
in milliseconds. Kernels' outputs are compared with NumPy before they are timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import onnx
import onnxruntime
import typer
from kernel_timing import random_weight, simd_of
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from sparse_tvm.backends import get_backend
from sparse_tvm.cli.console import stdout_console
from sparse_tvm.cli.tables import plain_table
from sparse_tvm.cpu import allow_amx, cpu_model
from sparse_tvm.machine_limits import use_threads
from sparse_tvm.operators import Bias, Dense
from sparse_tvm.passes.formats import FormatOptions
from sparse_tvm.passes.layout_choice import choose
from sparse_tvm.schedules.cpu import word_weights
from sparse_tvm.schedules.cpu.block_arrays import split_arrays
from sparse_tvm.schedules.cpu.dot_matmul import dot_matmul
from sparse_tvm.schedules.cpu.lane_tiles import Tiles
from sparse_tvm.schedules.cpu.low_matmul import LowMatmul
from sparse_tvm.schedules.cpu.low_precision import BF16, INT8, ZERO_POINT, Precision, quantise
from sparse_tvm.schedules.cpu.matmul import matmul
from sparse_tvm.schedules.cpu.simd import LANES
from sparse_tvm.schedules.x86.instructions import DOTS, Amx, Dot
from sparse_tvm.schedules.x86.tile_matmul import TileLayout, tile_matmul
from sparse_tvm.sparsity.quantise import as_words
from sparse_tvm.sparsity.statistics import MeasuredWeight
from sparse_tvm.targets import Target, get_target

HIDDEN, INTERMEDIATE, LAYERS = 768, 3072, 12
SHAPES = [*[(HIDDEN, HIDDEN)] * 4, (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)]
SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Form:
    """A precision and a way to store weights; ``structure`` as prune takes it."""

    title: str
    structure: str
    kernel: Callable[[np.ndarray, int, Target], tuple[object, list[np.ndarray], list[np.ndarray]]]
    dense: bool = False

    def sparsities(self) -> Sequence[float]:
        return SPARSITIES[:1] if self.dense else SPARSITIES[1:]


def float_form(w: np.ndarray, tokens: int, target: Target, format: str = "auto") -> tuple:
    n, k = w.shape
    options = FormatOptions(format, (4, 1) if format == "bsr" else None)
    op = Dense(layer="layer", matrix=(n, k), epilogue=(Bias(),))
    layout = choose(op, MeasuredWeight(w), options, get_backend("cpu"), target).layout
    function = matmul(Tiles(1, tokens // LANES), n, k, layout, op.epilogue, simd_of(target))
    return function, list(split_arrays(w, layout).values()), []


def tile_form(precision: Precision, form: str, height: int) -> Callable[..., tuple]:
    def kernel(w: np.ndarray, tokens: int, target: Target) -> tuple:
        elements, of_rows = word_weights.rounded(w, precision)
        words = as_words(elements)
        if form == "expand":
            weight = word_weights.expanded_tiles(elements, height)
        elif form == "dense":
            weight = word_weights.dense_tiles(words, height)
        elif form == "skip":
            weight = word_weights.skipped_tiles(words, height)
        else:
            weight = word_weights.gathered_tiles(words, height)
        problem = LowMatmul(Tiles(1, tokens // LANES), *w.shape, precision, ("bias",))
        layout = TileLayout(form, height)
        function = tile_matmul(problem, layout, simd_of(target), Amx())
        return function, list(weight.values()), list(of_rows.values())

    return kernel


def dot_form(dot: Dot, rows: int, sparse: bool) -> Callable[..., tuple]:
    def kernel(w: np.ndarray, tokens: int, target: Target) -> tuple:
        zero_point = 0 if dot.signed else ZERO_POINT
        elements, of_rows = word_weights.rounded(w, INT8, dot.largest_weight, zero_point)
        pack = word_weights.sparse_rows if sparse else word_weights.dense_rows
        weight = pack(as_words(elements), rows)
        problem = LowMatmul(Tiles(1, tokens // LANES), *w.shape, INT8, ("bias",))
        function = dot_matmul(problem, rows, sparse, dot)
        return function, list(weight.values()), list(of_rows.values())

    return kernel


def forms(target: Target) -> list[Form]:
    found = [
        Form("fp32", "dense", float_form, dense=True),
        Form("fp32", "unstructured", float_form),
        Form("fp32", "4x1", float_form),
    ]
    if target.has(*Amx.features):
        for precision in (INT8, BF16):
            title = f"{precision.name} AMX"
            unit = precision.unit
            found += [
                Form(title, "dense", tile_form(precision, "dense", 2), dense=True),
                Form(title, "unstructured", tile_form(precision, "expand", 2)),
                Form(title, f"16x{unit}", tile_form(precision, "gather", 1)),
                Form(title, f"32x{unit}", tile_form(precision, "gather", 2)),
                Form(title, f"16x{16 * unit}", tile_form(precision, "skip", 1)),
            ]
    for dot in DOTS:
        if target.has(*dot.features):
            title = f"int8 {dot.name}"
            found += [
                Form(title, "dense", dot_form(dot, 6 if dot.lanes == 16 else 2, False), dense=True),
                Form(title, "unstructured", dot_form(dot, 1, True)),
                Form(title, "1x4", dot_form(dot, 1, True)),
                Form(title, "4x4", dot_form(dot, 4, True)),
            ]
    return found


class Timed:
    """A kernel on one or more weights of one shape, called in turn."""

    def __init__(self, form: Form, w: np.ndarray, tokens: int, target: Target, copies: int = 1):
        import tvm

        from sparse_tvm.schedules.cpu.intrinsics import FAST_MATH

        n, k = w.shape
        tiles, rng = tokens // LANES, np.random.default_rng(1)
        function, weight, of_rows = form.kernel(w, tokens, target)
        context = tvm.transform.PassContext(opt_level=3, config=FAST_MATH)
        with tvm.target.Target(target.tvm_target()), context:
            self._kernel = tvm.compile(function.with_attr("global_symbol", "kernel")).jit()[
                "kernel"
            ]
            x = rng.standard_normal((1, tiles, k, LANES), np.float32)
            lines = x
            if not form.title.startswith("fp32"):
                precision = INT8 if "int8" in form.title else BF16
                rounding = quantise(Tiles(1, tiles), k, precision, simd_of(target))
                rounding = rounding.with_attr("global_symbol", "kernel")
                lines = np.zeros(precision.shape(Tiles(1, tiles), k), np.int32)
                y = tvm.runtime.tensor(lines)
                tvm.compile(rounding).jit()["kernel"](tvm.runtime.tensor(x), y)
                lines = y.numpy()
        bias = rng.standard_normal(n, np.float32)
        self._y = tvm.runtime.tensor(np.zeros((1, tiles, n, LANES), np.float32))
        shared = [tvm.runtime.tensor(array) for array in [*of_rows, bias]]
        first = tvm.runtime.tensor(lines)
        self._arguments = [
            [first, *map(tvm.runtime.tensor, weight), *shared, self._y] for _ in range(copies)
        ]
        self()
        expected = np.einsum("ltkm,nk->ltnm", x, w, optimize=True) + bias[:, None]
        error = np.abs(self._y.numpy() - expected).max() / np.abs(expected).max()
        if error > 0.04:
            raise SystemExit(f"{form.title} {form.structure}: error {error:.2g}")

    def __call__(self) -> None:
        for arguments in self._arguments:
            self._kernel(*arguments)


class OnnxRuntime:
    """The same layers, dense, in one session; ``kind`` is fp32, integer or dynamic."""

    def __init__(self, kind: str, shapes: Sequence[tuple[int, int]], tokens: int, threads: int):
        rng = np.random.default_rng(0)
        nodes, weights, inputs, outputs = [], [], [], {}
        for i, (n, k) in enumerate(shapes):
            w = rng.standard_normal((k, n)).astype(np.float32)
            x = f"x{k}"
            if kind == "integer":
                w = rng.integers(-127, 128, (k, n)).astype(np.int8)
                nodes.append(helper.make_node("MatMulInteger", [x, f"w{i}"], [f"y{i}"]))
            else:
                nodes.append(helper.make_node("MatMul", [x, f"w{i}"], [f"y{i}"]))
            weights.append(numpy_helper.from_array(w, f"w{i}"))
            dtype = TensorProto.INT32 if kind == "integer" else TensorProto.FLOAT
            outputs[f"y{i}"] = helper.make_tensor_value_info(f"y{i}", dtype, [tokens, n])
        dtype = TensorProto.UINT8 if kind == "integer" else TensorProto.FLOAT
        self._feeds = {}
        for k in sorted({k for _, k in shapes}):
            inputs.append(helper.make_tensor_value_info(f"x{k}", dtype, [tokens, k]))
            values = rng.integers(0, 255, (tokens, k)).astype(np.uint8)
            if kind != "integer":
                values = rng.standard_normal((tokens, k)).astype(np.float32)
            self._feeds[f"x{k}"] = values
        graph = helper.make_graph(nodes, "layers", inputs, list(outputs.values()), weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        if kind == "dynamic":
            model = _quantised(model)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self()

    def __call__(self) -> None:
        self._session.run(None, self._feeds)


def _quantised(model: onnx.ModelProto) -> onnx.ModelProto:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quantised.onnx"
        quantize_dynamic(model, path, per_channel=True, weight_type=QuantType.QInt8)
        return onnx.load(path)


def medians(calls: dict[object, Callable[[], None]], seconds: float) -> dict[object, float]:
    """Median seconds of each call, in turns of a few until the time is over."""
    samples: dict[object, list[float]] = {key: [] for key in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, samples.values())) < 10:
        for key, call in calls.items():
            call()
            for _ in range(5):
                begin = time.perf_counter()
                call()
                samples[key].append(time.perf_counter() - begin)
    return {key: float(np.median(values)) for key, values in samples.items()}


def table(
    title: str, results: dict[object, float], unit: float, references: dict[str, float]
) -> None:
    columns = [f"{sparsity:.0%}" for sparsity in SPARSITIES]
    shown = plain_table(title, *columns, numbers=columns)
    for name, seconds in references.items():
        shown.add_row(name, f"{seconds * unit:.1f}", *[""] * (len(columns) - 1))
    for form in dict.fromkeys(form for form, _ in results):
        cells = [
            f"{results[form, sparsity] * unit:.1f}" if (form, sparsity) in results else ""
            for sparsity in SPARSITIES
        ]
        shown.add_row(f"{form.title} {form.structure}", *cells)
    stdout_console().print(shown)


def main(
    target: Annotated[str, typer.Option(help="As sparse-tvm compile --target.")] = "native",
    threads: Annotated[int, typer.Option(help="Of every engine.")] = 1,
    tokens: Annotated[int, typer.Option(help="A multiple of 16.")] = 128,
    seconds: Annotated[float, typer.Option(help="Of timing, per table.")] = 15.0,
    only: Annotated[str, typer.Option(help="Forms whose title contains this.")] = "",
    tables: Annotated[str, typer.Option(help="near, cold, or both.")] = "near,cold",
) -> None:
    """Time every form on this machine."""
    chosen = get_target(target)
    allow_amx()
    use_threads(threads)
    print(f"{cpu_model()}, target {chosen.name}, {threads} threads, {tokens} tokens")
    wanted = [form for form in forms(chosen) if only in f"{form.title} {form.structure}"]
    cases = [(form, sparsity) for form in wanted for sparsity in form.sparsities()]
    for name in tables.split(","):
        shapes = SHAPES * LAYERS if name == "cold" else SHAPES[:1]
        engines = {
            f"ONNX Runtime {kind}": OnnxRuntime(kind, shapes, tokens, threads)
            for kind in ("fp32", "integer", "dynamic")
        }
        if name == "cold":
            cases = [case for case in cases if case[1] in (0.0, 0.9)]
        counts = {shape: shapes.count(shape) for shape in shapes}
        calls: dict[object, Callable[[], None]] = dict(engines)
        for form, sparsity in cases:
            kernels = [
                Timed(form, _weight(shape, sparsity, form.structure), tokens, chosen, count)
                for shape, count in counts.items()
            ]
            calls[form, sparsity] = lambda kernels=kernels: [kernel() for kernel in kernels]
        results = medians(calls, seconds)
        references = {key: results.pop(key) for key in engines}
        title = "72 layers, cold, ms" if name == "cold" else "768 to 768, us"
        table(title, results, 1e3 if name == "cold" else 1e6, references)


def _weight(shape: tuple[int, int], sparsity: float, structure: str) -> np.ndarray:
    return random_weight(shape, sparsity, structure)


if __name__ == "__main__":
    typer.run(main)
