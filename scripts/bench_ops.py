"""Time single operators against ONNX Runtime: those that have no kernel of ours in transformers.

Ours is the sum over the kernels that the program calls; ONNX Runtime's is a run with inputs and
outputs bound to its own memory. Both engines take turns, as :mod:`sparse_tvm.interleave` explains.
"""

from __future__ import annotations

import statistics
import tempfile
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
from sparse_tvm.interleave import interleave
from sparse_tvm.random_inputs import random_inputs


def weight(*shape: int) -> np.ndarray:
    scale = np.float32(np.prod(shape[1:]) ** -0.5)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32) * scale


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def conv(
    image: tuple[int, int, int], out: int, kernel: int, stride: int = 1, group: int = 1
) -> tuple[str, dict[str, np.ndarray]]:
    channels, height, width = image
    pads = [kernel // 2] * 4
    graph = f"""(float[1, {channels}, {height}, {width}] x) => (float[N] y) {{
        y = Conv<pads = {pads}, strides = [{stride}, {stride}], group = {group}>(x, w, b) }}"""
    return graph, {"w": weight(out, channels // group, kernel, kernel), "b": weight(out)}


def matmul(a: str, b: str, node: str = "y = MatMul(a, b)") -> str:
    return f"(float[{a}] a, float[{b}] b) => (float[N] y) {{ {node} }}"


def unary(shape: str, nodes: str) -> str:
    return f"(float[{shape}] x) => (float[N] y) {{ {nodes} }}"


NUMBERS = ("ours", "ONNX Runtime", "gain")
NORM = {"g": weight(768), "b": weight(768)}
OPS: dict[str, str | tuple[str, dict[str, np.ndarray]]] = {
    "softmax 1x12x128x128": unary("1, 12, 128, 128", "y = Softmax<axis = -1>(x)"),
    "softmax 1x12x384x384": unary("1, 12, 384, 384", "y = Softmax<axis = -1>(x)"),
    "softmax 1x8x50x77": unary("1, 8, 50, 77", "y = Softmax<axis = -1>(x)"),
    "softmax 64x1000": unary("64, 1000", "y = Softmax<axis = -1>(x)"),
    "softmax axis 1, 1x21x128x128": unary("1, 21, 128, 128", "y = Softmax<axis = 1>(x)"),
    "log-softmax 128x30522": unary("128, 30522", "y = LogSoftmax<axis = -1>(x)"),
    "layer norm 128x768": (unary("1, 128, 768", "y = LayerNormalization(x, g, b)"), NORM),
    "layer norm 197x770": (
        unary("1, 197, 770", "y = LayerNormalization(x, g, b)"),
        {"g": weight(770), "b": weight(770)},
    ),
    "rms norm 128x768": (
        unary(
            "1, 128, 768",
            "s = Mul(x, x) m = ReduceMean<axes = [-1]>(s) e = Add(m, eps) r = Sqrt(e)"
            " n = Div(x, r) y = Mul(n, g)",
        ),
        {"g": weight(768), "eps": np.float32(1e-6)},
    ),
    "group norm 32, 1x320x32x32": (
        unary(
            "1, 320, 32, 32",
            "r = Reshape(x, a) n = InstanceNormalization(r, g, h) y = Reshape(n, b)",
        ),
        {
            "a": ints(1, 32, -1),
            "b": ints(1, 320, 32, 32),
            "g": np.ones(32, np.float32),
            "h": np.zeros(32, np.float32),
        },
    ),
    "mean last 1536x128": unary("1536, 128", "y = ReduceMean<axes = [1]>(x)"),
    "mean tokens 1x128x768": unary("1, 128, 768", "y = ReduceMean<axes = [1]>(x)"),
    "max last 128x3000": unary("128, 3000", "y = ReduceMax<axes = [1]>(x)"),
    "sum all 1x768x1024": unary("768, 1024", "y = ReduceSum<keepdims = 0>(x)"),
    "sum axis 1, 64x21x1000": (
        unary("64, 21, 1000", "y = ReduceSum<keepdims = 0>(x, a)"),
        {"a": ints(1)},
    ),
    "sum axes 0 and 2, 32x64x777": (
        unary("32, 64, 777", "y = ReduceSum<keepdims = 0>(x, a)"),
        {"a": ints(0, 2)},
    ),
    "argmax 128x30522": unary("128, 30522", "i = ArgMax<axis = 1>(x) y = Cast<to = 1>(i)"),
    "argmax axis 1, 1x21x256x256": unary(
        "1, 21, 256, 256", "i = ArgMax<axis = 1>(x) y = Cast<to = 1>(i)"
    ),
    "transpose heads 128x12x64": unary("1, 128, 12, 64", "y = Transpose<perm = [0, 2, 1, 3]>(x)"),
    "transpose keys 128x12x64": unary("1, 128, 12, 64", "y = Transpose<perm = [0, 2, 3, 1]>(x)"),
    "transpose 768x1024": unary("768, 1024", "y = Transpose<perm = [1, 0]>(x)"),
    "gather 128 of 30522x768": (
        "(int64[1, 128] i) => (float[N] y) { y = Gather(w, i) }",
        {"w": weight(30522, 768)},
    ),
    "gelu 128x3072": (
        unary(
            "128, 3072",
            "s = Div(x, r) e = Erf(s) o = Add(e, one) m = Mul(x, o) y = Mul(m, half)",
        ),
        {"r": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5)},
    ),
    "chain 128x770": (
        unary("128, 770", "a = Mul(x, g) c = Add(a, b) d = Tanh(c) e = Mul(d, x) y = Add(e, d)"),
        {"g": weight(770), "b": weight(770)},
    ),
    "add broadcast 1x64x56x56": (
        unary("1, 64, 56, 56", "a = Add(x, b) y = Relu(a)"),
        {"b": weight(64, 1, 1)},
    ),
    "matmul QK 12x128x64x128": matmul("12, 128, 64", "12, 64, 128"),
    "matmul QK^T 12x128x64x128": matmul(
        "12, 128, 64", "12, 128, 64", "t = Transpose<perm = [0, 2, 1]>(b) y = MatMul(a, t)"
    ),
    "matmul PV 12x128x128x64": matmul("12, 128, 128", "12, 128, 64"),
    "matmul PV heads last 128x12x64": matmul(
        "1, 12, 128, 128",
        "1, 128, 12, 64",
        "t = Transpose<perm = [0, 2, 1, 3]>(b) y = MatMul(a, t)",
    ),
    "matmul 12x77x64x77": matmul("12, 77, 64", "12, 64, 77"),
    "matmul 512x512x512": matmul("512, 512", "512, 512"),
    "matmul one row 1x768x768": matmul("1, 768", "768, 768"),
    "softmax axis 1, 8x19x33x35": unary("8, 19, 33, 35", "y = Softmax<axis = 1>(x)"),
    "concat channels 64x56x57 and 32x56x57": (
        "(float[1, 64, 56, 57] a, float[1, 32, 56, 57] b) => (float[N] y)"
        " { y = Concat<axis = 1>(a, b) }"
    ),
    "concat 2x 1x128x768": (
        "(float[1, 128, 768] a, float[1, 128, 768] b) => (float[N] y)"
        " { y = Concat<axis = -1>(a, b) }"
    ),
    "split 128x2304": unary(
        "1, 128, 2304", "p, q, r = Split<axis = -1>(x) s = Add(p, q) y = Add(s, r)"
    ),
    "where mask 12x128x128": (
        "(float[12, 128, 128] x, bool[1, 128, 128] m) => (float[N] y) { y = Where(m, x, k) }",
        {"k": np.float32(-1e9)},
    ),
    "max pool 3x3/2 64x112x112": unary(
        "1, 64, 112, 112",
        "y = MaxPool<kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]>(x)",
    ),
    "average pool 2x2/2 128x56x56": unary(
        "1, 128, 56, 56", "y = AveragePool<kernel_shape = [2, 2], strides = [2, 2]>(x)"
    ),
    "global pool 2048x7x7": unary("1, 2048, 7, 7", "y = GlobalAveragePool(x)"),
    "max pool 3x3 padded 192x28x28": unary(
        "1, 192, 28, 28", "y = MaxPool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x)"
    ),
    "average pool 3x3 padded 192x35x35": unary(
        "1, 192, 35, 35", "y = AveragePool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x)"
    ),
    "max pool 5/2 1x64x4000": unary(
        "1, 64, 4000", "y = MaxPool<kernel_shape = [5], strides = [2], pads = [2, 2]>(x)"
    ),
    "resize nearest x2 64x56x56": (
        unary(
            "1, 64, 56, 56",
            'y = Resize<mode = "nearest", coordinate_transformation_mode = "asymmetric",'
            ' nearest_mode = "floor">(x, , s)',
        ),
        {"s": np.float32([1, 1, 2, 2])},
    ),
    "resize linear x2 64x56x56": (
        unary("1, 64, 56, 56", 'y = Resize<mode = "linear">(x, , s)'),
        {"s": np.float32([1, 1, 2, 2])},
    ),
    "resize linear to 97x97 64x33x33": (
        unary(
            "1, 64, 33, 33",
            'y = Resize<mode = "linear", coordinate_transformation_mode = "align_corners">'
            "(x, , , s)",
        ),
        {"s": ints(1, 64, 97, 97)},
    ),
    "pad 64x56x56": (
        unary("1, 64, 56, 56", "y = Pad(x, p)"),
        {"p": ints(0, 0, 1, 1, 0, 0, 1, 1)},
    ),
    "conv transpose 2x2/2 128x28x28 to 64": (
        """(float[1, 128, 28, 28] x) => (float[N] y) {
            y = ConvTranspose<strides = [2, 2]>(x, w, b) }""",
        {"w": weight(128, 64, 2, 2), "b": weight(64)},
    ),
    "conv transpose 4x4/2 64x32x32 to 32": (
        """(float[1, 64, 32, 32] x) => (float[N] y) {
            y = ConvTranspose<strides = [2, 2], pads = [1, 1, 1, 1]>(x, w, b) }""",
        {"w": weight(64, 32, 4, 4), "b": weight(32)},
    ),
    "conv 1x1 256x56x56 to 64": conv((256, 56, 56), 64, 1),
    "conv 3x3 64x56x56": conv((64, 56, 56), 64, 3),
    "conv 3x3 512x7x7": conv((512, 7, 7), 512, 3),
    "conv 3x3/2 128x56x56": conv((128, 56, 56), 128, 3, 2),
    "conv 7x7/2 3x224x224 to 64": conv((3, 224, 224), 64, 7, 2),
    "conv 16x16/16 3x224x224 to 768": (
        """(float[1, 3, 224, 224] x) => (float[N] y) {
            y = Conv<strides = [16, 16]>(x, w, b) }""",
        {"w": weight(768, 3, 16, 16), "b": weight(768)},
    ),
    "depthwise 3x3 144x56x56": conv((144, 56, 56), 144, 3, 1, 144),
    "depthwise 3x3/2 144x56x56": conv((144, 56, 56), 144, 3, 2, 144),
    "depthwise 3x3 960x7x7": conv((960, 7, 7), 960, 3, 1, 960),
}


def build(graph: str, tensors: dict[str, np.ndarray]) -> onnx.ModelProto:
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {graph}')
    for name, array in tensors.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def reference(model: onnx.ModelProto, inputs: dict[str, np.ndarray], threads: int):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    binding = session.io_binding()
    for name, array in inputs.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    for output in session.get_outputs():
        binding.bind_output(output.name)
    return session, binding


def measure(name: str, directory: Path, threads: int, duration: float) -> tuple[float, float]:
    """Median seconds of ours and of ONNX Runtime's."""
    case = OPS[name]
    graph, tensors = (case, {}) if isinstance(case, str) else case
    model = build(graph, tensors)
    path = directory / f"{abs(hash(name))}.so"
    sparse_tvm.compile(model, path, threads=threads)
    ours = sparse_tvm.load(path)
    inputs = random_inputs(ours.inputs)
    session, binding = reference(model, inputs, threads)
    kernel_times: list[float] = []

    def run_ours() -> None:
        (calls,) = ours.trace(inputs)
        kernel_times.append(sum(call.seconds for call in calls if "vm." not in call.function))

    times = interleave(
        {"ours": run_ours, "reference": lambda: session.run_with_iobinding(binding)},
        duration=duration,
    )
    return statistics.median(kernel_times), statistics.median(times["reference"])


def main(
    pattern: Annotated[str, typer.Argument(help="Only operators with this in their name.")] = "",
    threads: int = 1,
    duration: Annotated[float, typer.Option(help="Seconds per engine and operator.")] = 0.5,
) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for name in filter(lambda name: pattern in name, OPS):
            ours, theirs = measure(name, Path(directory), threads, duration)
            rows.append(
                (name, f"{ours * 1e6:.0f} us", f"{theirs * 1e6:.0f} us", f"{theirs / ours:.2f}x")
            )
    table = plain_table("operator", *NUMBERS, numbers=NUMBERS)
    for row in rows:
        table.add_row(*row)
    stdout_console().print(table)


if __name__ == "__main__":
    typer.run(main)
