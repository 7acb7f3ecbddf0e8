"""Times linear layers in every precision and form, beside ONNX Runtime, in one interleaved run.

Prints the layer of 768 to 768 with its weights in the second cache, and the 72 layers of BERT-base
one after another, whose weights come from the last cache or memory: medians in microseconds, and
in milliseconds. Kernels' outputs are compared with NumPy before they are timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import onnx
import onnxruntime
import tvm
import typer
from kernel_timing import random_weight, simd_of
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from sparse_tvm.backends import get_backend
from sparse_tvm.cli.console import stdout_console
from sparse_tvm.cli.tables import plain_table
from sparse_tvm.cpu import allow_amx, cpu_model, use_threads
from sparse_tvm.families import Extents, Wish
from sparse_tvm.operators import Bias, Dense, Layout
from sparse_tvm.passes.formats import FormatOptions
from sparse_tvm.passes.layout_choice import choose
from sparse_tvm.schedules.cpu.intrinsics import FAST_MATH
from sparse_tvm.schedules.cpu.lane_tiles import Tiles
from sparse_tvm.schedules.cpu.low_precision import quantise
from sparse_tvm.schedules.cpu.precision import BF16, INT8
from sparse_tvm.schedules.cpu.precision import PRECISIONS as LINES_OF
from sparse_tvm.schedules.cpu.simd import LANES
from sparse_tvm.schedules.x86.families.dots import X86DotFamily
from sparse_tvm.schedules.x86.units import AMX_FEATURES
from sparse_tvm.sparsity.blocks import parse_block
from sparse_tvm.sparsity.statistics import MeasuredWeight
from sparse_tvm.targets import Target, get_target

HIDDEN, INTERMEDIATE, LAYERS = 768, 3072, 12
SHAPES = [*[(HIDDEN, HIDDEN)] * 4, (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)]
TOKENS = 128
SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Form:
    """A precision and a way to store weights; ``structure`` as prune takes it.

    ``wish`` and ``family`` choose among the layouts that the backend offers; without, predicted
    cost does.
    """

    title: str
    structure: str
    precision: str
    family: str | None = None
    wish: Wish | None = None

    def sparsities(self) -> Sequence[float]:
        return SPARSITIES[:1] if self.structure == "dense" else SPARSITIES[1:]

    def layout(self, op: Dense, w: np.ndarray, target: Target, tokens: int) -> Layout:
        backend, weight = get_backend("cpu"), MeasuredWeight(w)
        if self.family is None:
            options = FormatOptions(format="auto" if self.wish is None else self.wish.format)
            return choose(op, weight, options, backend, target, [tokens]).layout
        family = backend.family(self.family)
        found = family.candidates(op, weight, target, self.wish)
        exact = [each for each in found if self.wish.block in (None, each.block)]
        return min(exact, key=lambda each: family.cost(op, each, weight, tokens, target))


def forms(target: Target) -> list[Form]:
    """Every form that the target has."""
    usual = ["fp32", "fp16"] if has_halves(target) else ["fp32"]
    structures = ("dense", "unstructured", "4x1")
    found = [Form(name, structure, name) for name in usual for structure in structures]

    def of(family: str, precision: str, title: str, blocks: Sequence[str]) -> list[Form]:
        wishes = {"dense": Wish("dense"), "unstructured": Wish("csr")}
        wishes |= {block: Wish("bsr", parse_block(block)) for block in blocks}
        return [
            Form(f"{precision} {title}", structure, precision, family, wish)
            for structure, wish in wishes.items()
        ]

    if target.has(*AMX_FEATURES):
        found += of("tiles", "int8", "AMX", ("16x4", "32x4", "16x64"))
        found += of("tiles", "bf16", "AMX", ("16x2", "32x2", "16x32"))
    for precision, blocks in ((INT8, ("1x4", "4x4")), (BF16, ("1x2", "4x2"))):
        if dot := X86DotFamily().dot(target, precision):
            found += of("dot", precision.name, dot.name, blocks)
    return found


def has_halves(target: Target) -> bool:
    """Whether kernels read weights of float16."""
    layer = Dense(layer="", matrix=(64, 64))
    return get_backend("cpu").in_precision(layer, "fp16", target)[1] is None


class Timed:
    """A kernel on one or more weights of one shape, called in turn."""

    def __init__(self, form: Form, w: np.ndarray, tokens: int, target: Target, copies: int = 1):
        (n, k), tiles, rng = w.shape, -(-tokens // LANES), np.random.default_rng(1)
        op = Dense(layer="layer", matrix=(n, k), epilogue=(Bias(),))
        op, _ = get_backend("cpu").in_precision(op, form.precision, target)
        op = replace(op, layout=form.layout(op, w, target, tokens))
        self.layout = op.stored
        backend = get_backend("cpu")
        weight = list(backend.weighted_family(op.stored).pack(op, w, op.stored, target).values())
        x = rng.standard_normal((1, tiles, k, LANES), np.float32)
        lines = _in_precision(x, op.types.input, target)
        bias = rng.standard_normal(n, np.float32)
        operands = [Extents(array.shape, str(array.dtype)) for array in (lines, *weight, bias)]
        if backend.weighted_family(op.stored).counts_rows:
            operands.append(Extents((tokens,), "int64", numbers=True))
        kernel = backend.family_for(op, target).build(
            op, operands, Extents((1, tiles, n, LANES)), target
        )
        self._kernel = _compiled(kernel.function, target)
        self._y = tvm.runtime.tensor(np.zeros((1, tiles, n, LANES), np.float32))
        first, last = tvm.runtime.tensor(lines), tvm.runtime.tensor(bias)
        self._arguments = [
            [first, *map(tvm.runtime.tensor, weight), last, self._y] for _ in range(copies)
        ]
        self()
        expected = np.einsum("ltkm,nk->ltnm", x, w, optimize=True) + bias[:, None]
        found, expected = (
            each.swapaxes(2, 3).reshape(-1, n)[:tokens] for each in (self._y.numpy(), expected)
        )
        error = np.abs(found - expected).max() / np.abs(expected).max()
        if error > 0.04:
            raise SystemExit(f"{form.title} {form.structure}: error {error:.2g}")

    def __call__(self) -> None:
        for arguments in self._arguments:
            self._kernel(*arguments)


def _compiled(function: Any, target: Target) -> Callable[..., None]:
    context = tvm.transform.PassContext(opt_level=3, config=FAST_MATH)
    with tvm.target.Target(target.tvm_target()), context:
        return tvm.compile(function.with_attr("global_symbol", "kernel")).jit()["kernel"]


def _in_precision(x: np.ndarray, dtype: str, target: Target) -> np.ndarray:
    """An activation as the layer reads it."""
    if dtype not in LINES_OF:
        return x
    _, tiles, features, _ = x.shape
    precision, extents = LINES_OF[dtype], Tiles(1, tiles)
    y = tvm.runtime.tensor(np.zeros((1, tiles, precision.lines(features), LANES), np.int32))
    function = quantise(extents, features, precision, simd_of(target))
    _compiled(function, target)(tvm.runtime.tensor(x), y)
    return y.numpy()


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
