"""Random small graphs of supported operators, drawn by Hypothesis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from hypothesis import assume
from hypothesis import strategies as st
from onnx import TensorProto, helper
from random_values import (
    FIXED,
    MOST_ELEMENTS,
    ONE,
    SIZES,
    Dim,
    Graph,
    NotApplicable,
    Value,
    fixed,
    is_fixed,
    plus,
    times,
)

# What adds nodes, each of one kind of operator.


def unary(g: Graph) -> None:
    x = g.value()
    op = g.pick("Relu", "Sigmoid", "Tanh", "Erf", "Neg", "Abs", "Softplus", "HardSwish", "Cos")
    g.add(g.node(op, x.name), x.shape)


def guarded(g: Graph) -> None:
    """Operators that need something of their input."""
    x = g.value()
    size = g.node("Abs", x.name)
    above = g.node("Add", size, g.store(0.5, np.float32))
    op = g.pick("Sqrt", "Log", "Reciprocal", "Exp", "Pow")
    if op == "Exp":
        above = g.node("Neg", above)
    power = [g.store(g.pick(0.5, 2.0, 3.0, 1.5), np.float32)] if op == "Pow" else []
    g.add(g.node(op, above, *power), x.shape)


def activation(g: Graph) -> None:
    """GELU or SiLU as exporters spell them."""
    x = g.value()
    if g.pick(True, False):
        g.add(g.node("Mul", x.name, g.node("Sigmoid", x.name)), x.shape)
        return
    scaled = g.node("Div", x.name, g.store(2**0.5, np.float32))
    one = g.node("Add", g.node("Erf", scaled), g.store(1.0, np.float32))
    half = g.node("Mul", x.name, g.store(0.5, np.float32))
    g.add(g.node("Mul", half, one), x.shape)


def binary(g: Graph) -> None:
    x, op = g.value(), g.pick("Add", "Sub", "Mul", "Max", "Min")
    other = g.value(lambda y: _broadcasts(x.shape, y.shape))
    pair = g.pick((x, other), (other, x))
    g.add(g.node(op, *(y.name for y in pair)), _broadcast(x.shape, other.shape))


def _broadcasts(left: list[Dim], right: list[Dim]) -> bool:
    pairs = zip(reversed(left), reversed(right), strict=False)
    return all(a == b or ONE in (a, b) for a, b in pairs)


def _broadcast(left: list[Dim], right: list[Dim]) -> list[Dim]:
    rank = max(len(left), len(right))
    left, right = ([ONE] * (rank - len(shape)) + shape for shape in (left, right))
    return [b if a == ONE else a for a, b in zip(left, right, strict=True)]


def with_constant(g: Graph) -> None:
    x, op = g.value(lambda y: y.rank > 0), g.pick("Add", "Sub", "Mul", "Div", "Max", "PRelu")
    count = g.number(0, x.rank)
    shape = [s[0] if is_fixed(s) and g.pick(True, True, False) else 1 for s in x.shape]
    shape = shape[x.rank - count :]
    array = np.random.default_rng(len(g.nodes)).uniform(0.5, 2, shape)
    if op == "PRelu" and len(shape) == 1 and x.rank > 1 and shape[0] != 1:
        raise NotApplicable
    g.add(g.node(op, x.name, g.store(array, np.float32)), x.shape)


def where(g: Graph) -> None:
    """Choose by one of the inputs, which is the same for both engines."""
    chooser = g.values[0]
    x = g.value(lambda y: _broadcasts(y.shape, chooser.shape))
    mask = g.node(g.pick("Greater", "Less"), chooser.name, g.store(0.1, np.float32))
    if g.pick(True, False):
        mask = g.node("Not", mask)
    other = g.store(g.pick(0.0, -3.0), np.float32)
    pair = g.pick((x.name, other), (other, x.name))
    g.add(g.node("Where", mask, *pair), _broadcast(x.shape, chooser.shape))


def dense(g: Graph) -> None:
    x = g.value(lambda y: y.rank > 0 and is_fixed(y.shape[-1]))
    out = g.pick(1, 4, 16, 33, 48)
    result = g.node("MatMul", x.name, g.weight(x.shape[-1][0], out))
    if g.pick(True, False):
        result = g.node("Add", result, g.weight(out))
    g.add(result, [*x.shape[:-1], fixed(out)])


def product(g: Graph) -> None:
    """Multiply a value with itself or another one, transposed."""
    x = g.value(lambda y: y.rank > 1)
    y = g.value(lambda y: y.rank == x.rank and y.shape[:-2] == x.shape[:-2])
    if x.shape[-1] == y.shape[-1]:
        turned = g.node("Transpose", y.name, perm=[*range(x.rank - 2), x.rank - 1, x.rank - 2])
        result, last = g.node("MatMul", x.name, turned), y.shape[-2]
    elif x.shape[-1] == y.shape[-2]:
        result, last = g.node("MatMul", x.name, y.name), y.shape[-1]
    else:
        raise NotApplicable
    g.add(g.node("Mul", result, g.store(0.2, np.float32)), [*x.shape[:-1], last])


def transpose(g: Graph) -> None:
    x = g.value(lambda y: y.rank > 1)
    order = g.draw(st.permutations(range(x.rank)))
    g.add(g.node("Transpose", x.name, perm=order), [x.shape[axis] for axis in order])


def merge_axes(g: Graph) -> None:
    x = g.value(lambda y: y.rank > 1)
    axis = g.number(0, x.rank - 2)
    wanted = [0 if i < axis else _number(s) for i, s in enumerate(x.shape)]
    wanted[axis : axis + 2] = [-1]
    shape = [*x.shape[:axis], times(*x.shape[axis : axis + 2]), *x.shape[axis + 2 :]]
    if wanted.count(-1) > 1:
        raise NotApplicable
    g.add(g.node("Reshape", x.name, g.store(wanted)), shape)


def split_axis(g: Graph) -> None:
    x = g.value()
    axis = g.axis(x, lambda size: is_fixed(size) and size[0] > 3)
    size = x.shape[axis][0]
    part = g.pick(*(d for d in range(1, size + 1) if size % d == 0))
    wanted = [0 if i < axis else _number(s) for i, s in enumerate(x.shape)]
    wanted[axis : axis + 1] = [size // part, part]
    if wanted.count(-1) > 1:
        raise NotApplicable
    shape = [*x.shape[:axis], fixed(size // part), fixed(part), *x.shape[axis + 1 :]]
    g.add(g.node("Reshape", x.name, g.store(wanted)), shape)


def _number(size: Dim) -> int:
    return size[0] if is_fixed(size) else -1


def flatten(g: Graph) -> None:
    x = g.value()
    axis = g.number(0, x.rank)
    shape = [times(ONE, *x.shape[:axis]), times(ONE, *x.shape[axis:])]
    g.add(g.node("Flatten", x.name, axis=axis), shape)


def reshape_by_shape(g: Graph) -> None:
    """Merge the last axes by sizes that are read from the tensor, as exporters do."""
    x = g.value(lambda y: y.rank > 2)
    sizes = g.node("Shape", x.name)
    lead = g.node("Slice", sizes, g.store([0]), g.store([x.rank - 2]))
    wanted = g.node("Concat", lead, g.store([-1]), axis=0)
    shape = [*x.shape[:-2], times(*x.shape[-2:])]
    g.add(g.node("Reshape", x.name, wanted), shape)


def unsqueeze(g: Graph) -> None:
    x = g.value()
    axis = g.number(0, x.rank)
    g.add(g.node("Unsqueeze", x.name, g.store([axis])), [*x.shape[:axis], ONE, *x.shape[axis:]])


def squeeze(g: Graph) -> None:
    x = g.value()
    axis = g.axis(x, lambda size: size == ONE)
    g.add(
        g.node("Squeeze", x.name, g.store([axis])), [s for i, s in enumerate(x.shape) if i != axis]
    )


def cut(g: Graph) -> None:
    x = g.value()
    axis = g.axis(x, lambda size: min(size) > 2)
    first, last, step = g.number(-3, 2), g.pick(3, -1, 2**62, 100), g.pick(1, 1, 2, -1)
    if step < 0:
        first, last = g.pick((-1, -(2**62)), (3, 0), (100, 1))
    extents = tuple(len(range(size)[slice(first, last, step)]) for size in x.shape[axis])
    if min(extents) < 1:
        raise NotApplicable
    bounds = (g.store([number]) for number in (first, last, axis, step))
    shape = [extents if i == axis else s for i, s in enumerate(x.shape)]
    g.add(g.node("Slice", x.name, *bounds), shape)


def concat(g: Graph) -> None:
    x = g.value(lambda y: y.rank > 0)
    axis = g.number(0, x.rank - 1)

    def fits(y: Value) -> bool:
        return y.rank == x.rank and all(
            i == axis or y.shape[i] == x.shape[i] for i in range(x.rank)
        )

    parts = [x, *(g.value(fits) for _ in range(g.number(1, 2)))]
    size = plus(*(part.shape[axis] for part in parts))
    shape = [size if i == axis else s for i, s in enumerate(x.shape)]
    g.add(g.node("Concat", *(part.name for part in parts), axis=axis), shape)


def split(g: Graph) -> None:
    x = g.value()
    axis = g.axis(x, lambda size: is_fixed(size) and size[0] > 1)
    size = x.shape[axis][0]
    first = g.number(1, size - 1)
    name = g.node("Split", x.name, g.store([first, size - first]), outputs=2, axis=axis)
    for output, part in ((name, first), (name[:-1] + "1", size - first)):
        g.add(output, [fixed(part) if i == axis else s for i, s in enumerate(x.shape)])


def rotate(g: Graph) -> None:
    """Turn the halves of the last axis, as rotary positions do."""
    x = g.value(lambda y: y.rank > 1 and is_fixed(y.shape[-1]) and y.shape[-1][0] % 2 == 0)
    size = x.shape[-1][0]
    names = g.store([0]), g.store([size // 2]), g.store([size]), g.store([x.rank - 1])
    low = g.node("Slice", x.name, names[0], names[1], names[3])
    high = g.node("Slice", x.name, names[1], names[2], names[3])
    cos, sin = g.weight(1, size // 2), g.weight(1, size // 2)
    real = g.node("Sub", g.node("Mul", low, cos), g.node("Mul", high, sin))
    imaginary = g.node("Add", g.node("Mul", low, sin), g.node("Mul", high, cos))
    g.add(g.node("Concat", real, imaginary, axis=x.rank - 1), x.shape)


def pad(g: Graph) -> None:
    x = g.value(lambda y: y.rank > 0)
    axis = g.number(0, x.rank - 1)
    before, after = g.number(0, 2), g.number(0, 2)
    mode = g.pick("constant", "edge", "reflect")
    if mode == "reflect" and min(x.shape[axis]) < 3:
        raise NotApplicable
    widths = [before if i == axis else 0 for i in range(x.rank)]
    widths += [after if i == axis else 0 for i in range(x.rank)]
    shape = [plus(s, fixed(before + after)) if i == axis else s for i, s in enumerate(x.shape)]
    fill = [g.store(g.pick(0.0, 1.5), np.float32)] if mode == "constant" else []
    g.add(g.node("Pad", x.name, g.store(widths), *fill, mode=mode), shape)


def tile(g: Graph) -> None:
    x = g.value(lambda y: y.rank > 0)
    repeats = [g.pick(1, 1, 2, 3) for _ in x.shape]
    g.add(
        g.node("Tile", x.name, g.store(repeats)),
        [times(s, fixed(r)) for s, r in zip(x.shape, repeats, strict=True)],
    )


def expand(g: Graph) -> None:
    """Broadcast to the shape of another value."""
    x = g.value()
    y = g.value(lambda y: _broadcasts(x.shape, y.shape))
    g.add(g.node("Expand", x.name, g.node("Shape", y.name)), _broadcast(x.shape, y.shape))


def gather(g: Graph) -> None:
    x = g.value(lambda y: y.rank > 0)
    axis = g.number(0, x.rank - 1)
    least = min(x.shape[axis])
    indices = np.array([g.number(-least, least - 1) for _ in range(g.number(1, 4))])
    indices = indices if g.pick(True, False) else indices.reshape(1, -1)
    middle = [fixed(size) for size in indices.shape]
    shape = [*x.shape[:axis], *middle, *x.shape[axis + 1 :]]
    g.add(g.node("Gather", x.name, g.store(indices), axis=axis), shape)


def softmax(g: Graph) -> None:
    x = g.value(lambda y: y.rank > 0)
    axis = g.number(-x.rank, x.rank - 1)
    g.add(g.node(g.pick("Softmax", "LogSoftmax"), x.name, axis=axis), x.shape)


def reduce(g: Graph) -> None:
    x = g.value(lambda y: y.rank > 0)
    op = g.pick("ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum", "ReduceL2")
    axes = sorted(g.draw(st.sets(st.integers(0, x.rank - 1), min_size=1)))
    keep = g.pick(0, 1)
    given_axes = (g.store(axes),) if op == "ReduceSum" else ()
    attributes = {} if op == "ReduceSum" else {"axes": axes}
    shape = [ONE if i in axes else s for i, s in enumerate(x.shape) if keep or i not in axes]
    g.add(g.node(op, x.name, *given_axes, keepdims=keep, **attributes), shape)


def layer_norm(g: Graph) -> None:
    x = g.value(lambda y: y.rank > 0 and is_fixed(y.shape[-1]) and y.shape[-1][0] > 1)
    size = x.shape[-1][0]
    names = g.weight(size), g.weight(size)
    g.add(g.node("LayerNormalization", x.name, *names, axis=-1, epsilon=1e-2), x.shape)


def cumulate(g: Graph) -> None:
    x = g.value(lambda y: y.rank > 0)
    axis = g.store(g.number(-x.rank, x.rank - 1))
    flags = {"exclusive": g.pick(0, 1), "reverse": g.pick(0, 1)}
    g.add(g.node("CumSum", x.name, axis, **flags), x.shape)


def _image(g: Graph, channels: Callable[[int], bool] = lambda _: True) -> Value:
    return g.value(lambda y: y.rank == 4 and is_fixed(y.shape[1]) and channels(y.shape[1][0]))


def convolution(g: Graph) -> None:
    x = _image(g)
    count, out = x.shape[1][0], g.pick(1, 4, 16)
    kernel, stride, edge = g.pick(1, 2, 3), g.pick(1, 2), g.pick(0, 1)
    group = count if g.pick(False, True) else 1
    out = count if group > 1 else out
    shape = _windows(x, kernel, stride, edge)
    w = g.weight(out, count // group, kernel, kernel)
    attributes = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [edge] * 4}
    result = g.node("Conv", x.name, w, g.weight(out), group=group, **attributes)
    g.add(result, [x.shape[0], fixed(out), *shape])


def _windows(x: Value, kernel: int, stride: int, edge: int) -> list[Dim]:
    sizes = [tuple((s + 2 * edge - kernel) // stride + 1 for s in size) for size in x.shape[2:]]
    if min(map(min, sizes)) < 1 or edge >= kernel:
        raise NotApplicable
    return sizes


def pool(g: Graph) -> None:
    x = _image(g)
    op, kernel, stride, edge = g.pick("MaxPool", "AveragePool"), g.pick(2, 3), g.pick(1, 2), 0
    edge = g.pick(0, 1)
    shape = _windows(x, kernel, stride, edge)
    attributes = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [edge] * 4}
    g.add(g.node(op, x.name, **attributes), [*x.shape[:2], *shape])


def global_pool(g: Graph) -> None:
    x = _image(g)
    op = g.pick("GlobalAveragePool", "GlobalMaxPool")
    g.add(g.node(op, x.name), [*x.shape[:2], ONE, ONE])


def resize(g: Graph) -> None:
    x, mode = _image(g), g.pick("nearest", "linear")
    scales = g.store([1, 1, 2, 2], np.float32)
    shape = [*x.shape[:2], *(times(s, fixed(2)) for s in x.shape[2:])]
    g.add(g.node("Resize", x.name, "", scales, mode=mode), shape)


def depth_to_space(g: Graph) -> None:
    x = _image(g, lambda count: count % 4 == 0)
    mode = g.pick("DCR", "CRD")
    shape = [x.shape[0], fixed(x.shape[1][0] // 4), *(times(s, fixed(2)) for s in x.shape[2:])]
    g.add(g.node("DepthToSpace", x.name, blocksize=2, mode=mode), shape)


def top_k(g: Graph) -> None:
    x = g.value(lambda y: y.rank > 0)
    axis = g.number(0, x.rank - 1)
    k = g.number(1, min(min(x.shape[axis]), 5))
    name = g.node("TopK", x.name, g.store([k]), outputs=2, axis=axis, largest=g.pick(0, 1))
    g.add(name, [fixed(k) if i == axis else s for i, s in enumerate(x.shape)])


def trigonometry_of_positions(g: Graph) -> None:
    """Positions as models count them, from a symbolic size."""
    x = g.value(lambda y: y.rank > 1)
    size = g.node("Gather", g.node("Shape", x.name), g.store(x.rank - 2), axis=0)
    steps = g.node("Range", g.store(0), size, g.store(1))
    angles = g.node("Mul", g.node("Cast", steps, to=TensorProto.FLOAT), g.store(0.3, np.float32))
    column = g.node("Unsqueeze", g.node(g.pick("Sin", "Cos"), angles), g.store([1]))
    g.add(g.node("Add", x.name, column), x.shape)


KINDS: tuple[Callable[[Graph], None], ...] = (
    *(unary, guarded, activation, binary, with_constant, where, dense, product, transpose),
    *(merge_axes, split_axis, flatten, reshape_by_shape, unsqueeze, squeeze, cut, concat, split),
    *(rotate, pad, tile, expand, gather, softmax, reduce, layer_norm, cumulate, convolution, pool),
    *(global_pool, resize, depth_to_space, top_k, trigonometry_of_positions),
)


@st.composite
def graphs(draw: Any, most_nodes: int = 8) -> onnx.ModelProto:
    """Draw a model whose output depends on all that was drawn last."""
    g = Graph(draw)
    inputs = []
    for index in range(draw(st.integers(1, 2))):
        rank = draw(st.sampled_from([2, 3, 3, 4, 4]))
        first = draw(st.sampled_from(["b", *FIXED[:3]]))
        sizes = st.sampled_from(FIXED) if rank == 4 else st.sampled_from(["n", *FIXED])
        rest = [draw(sizes) for _ in range(rank - 1)]
        if rank == 4 and draw(st.booleans()):
            rest[-1] = "n"
        names = [first, *rest]
        inputs.append(helper.make_tensor_value_info(f"x{index}", TensorProto.FLOAT, names))
        shape = [tuple(run.get(name, name) for run in SIZES) for name in names]
        assume(max(times(*shape)) <= MOST_ELEMENTS)
        g.add(f"x{index}", shape)
    for _ in range(draw(st.integers(2, most_nodes))):
        before = len(g.nodes), len(g.values)
        try:
            draw(st.sampled_from(KINDS))(g)
        except NotApplicable:
            del g.nodes[before[0] :], g.values[before[1] :]
    used = {name for node in g.nodes for name in node.input}
    ends = [v for v in g.values if v.name not in used and not v.name.startswith("x")][-3:]
    assume(ends)
    outputs = [
        helper.make_tensor_value_info(v.name, TensorProto.FLOAT, [None] * v.rank) for v in ends
    ]
    graph = helper.make_graph(g.nodes, "random", inputs, outputs, g.constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
