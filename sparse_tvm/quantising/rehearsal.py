"""A model in ONNX Runtime whose layers round as kernels do: any layer, to any precision.

One session holds every choice, so that trying another costs one run: a weight and an input come
out of an ``If``, whose branches are what they are in float32, rounded to bf16, and rounded to int8;
in fp16 the weight alone is rounded. Sums are float32 in all of them, which is what tells them from
kernels. Convolutions round to int8 alone, as kernels do: in 16 bits they are float32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sparse_tvm.frontends.onnx.detach import as_array, stored_tensors
from sparse_tvm.frontends.onnx.weights import canonical
from sparse_tvm.frontends.onnx.write import write_onnx
from sparse_tvm.passes.set_precision import in_range
from sparse_tvm.quantising.scales import Scale
from sparse_tvm.quantising.sites import Site
from sparse_tvm.reference import Reference
from sparse_tvm.sparsity.quantise import (
    LARGEST,
    PEAK_STEPS,
    bf16_values,
    quantise_rows,
    round_to_bf16,
)
from sparse_tvm.verification import Similarity

LEVELS = ("fp32", "fp16", "bf16", "int8")
"""What a layer may compute in; an entry of the session's input is an index into these."""

_INPUT = "sparse_tvm.levels"
_AXES_ARE_INPUTS = 18
"""The opset since which reductions read their axes."""

_WHOLE = 1.5 * 2**23
"""What float32 plus this and less it is, is a whole number."""

_HALF = 2.0**16 + 1
"""Veltkamp's factor: what it splits off float32 has the eight digits of bf16."""

_TINY = 1e-30

Feed = Mapping[str, np.ndarray]


class Rehearsal:
    """The model, its outputs on some data in float32, and how near others come.

    Parameters
    ----------
    model : onnx.ModelProto
        With its weights; it is changed.
    sites : Sequence[Site]
        Nodes of the layers that may round.
    feeds : Sequence[Feed]
        What to run it on.
    scales : Mapping[str, Scale]
        Of tensors that int8 rounds by one fixed scale; others have a scale per token.
    threads : int
        Of ONNX Runtime.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        sites: Sequence[Site],
        feeds: Sequence[Feed],
        scales: Mapping[str, Scale],
        threads: int,
    ) -> None:
        self.layers = list(dict.fromkeys(site.ref.layer for site in sites))
        self.runs = 0
        self._feeds = feeds
        _Writer(model, self.layers, scales).write(sites)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "rehearsal.onnx"
            write_onnx(model, path)
            self._model = Reference(path, threads=threads)
        self._expected = [self._run(feed, {}) for feed in feeds]

    def cosine(self, precisions: Mapping[str, str]) -> float:
        """The least cosine of any row of any output with float32's, layers in these precisions."""
        return min(
            Similarity.of(found, expected[name]).cosine
            for feed, expected in zip(self._feeds, self._expected, strict=True)
            for name, found in self._run(feed, precisions).items()
        )

    def losses(self, precisions: Mapping[str, str]) -> dict[str, float]:
        """By layer, what that layer alone takes from a cosine of 1; the largest first."""
        lost = {
            layer: 1 - self.cosine({layer: precision})
            for layer, precision in precisions.items()
            if layer in self.layers and precision != LEVELS[0]
        }
        return dict(sorted(lost.items(), key=lambda entry: -entry[1]))

    def _run(self, feed: Feed, precisions: Mapping[str, str]) -> dict[str, np.ndarray]:
        self.runs += 1
        levels = [LEVELS.index(precisions.get(layer, LEVELS[0])) for layer in self.layers]
        return self._model.run({**feed, _INPUT: np.array(levels, np.int32)})


class _Writer:
    """Puts an ``If`` before both operands of nodes."""

    def __init__(
        self, model: onnx.ModelProto, layers: Sequence[str], scales: Mapping[str, Scale]
    ) -> None:
        self._graph, self._layers, self._scales = model.graph, list(layers), scales
        self._arrays = dict(stored_tensors(model.graph))
        opset = next(e.version for e in model.opset_import if e.domain in ("", "ai.onnx"))
        self._axes_are_inputs = opset >= _AXES_ARE_INPUTS
        self._made: dict[tuple[str, ...], str] = {}
        self._count = 0

    def write(self, sites: Sequence[Site]) -> None:
        """Replace the operands, and add the input that says how layers round."""
        by_output = {site.output: site for site in sites}
        given = list(self._graph.node)
        del self._graph.node[:]
        for node in given:
            site = by_output.get(next(iter(node.output), ""))
            if site is not None:
                x, w = node.input[site.x], node.input[site.w]
                nodes: list[onnx.NodeProto] = []
                node.input[site.x] = self._choice(nodes, site, x, self._rounded_input(site, x))
                node.input[site.w] = self._choice(nodes, site, w, self._rounded_weight(site))
                self._graph.node.extend(nodes)
            self._graph.node.append(node)
        levels = helper.make_tensor_value_info(_INPUT, TensorProto.INT32, [len(self._layers)])
        self._graph.input.append(levels)

    def _choice(
        self,
        nodes: list[onnx.NodeProto],
        site: Site,
        given: str,
        rounded: dict[str, list[onnx.NodeProto]],
    ) -> str:
        """Append an If over the levels, and return its output; branches end in a tensor each.

        What is not among those `rounded` is as `given`.
        """
        place = self._constant(np.array(self._layers.index(site.ref.layer), np.int64))
        level = self._fresh()
        nodes.append(helper.make_node("Gather", [_INPUT, place], [level], axis=0))
        chosen = [self._same(given)]
        for name, branch in rounded.items():
            chosen = self._if(level, name, branch, chosen)
        nodes.extend(chosen)
        return str(chosen[-1].output[0])

    def _if(
        self,
        level: str,
        name: str,
        then: list[onnx.NodeProto],
        otherwise: list[onnx.NodeProto],
    ) -> list[onnx.NodeProto]:
        """Return nodes that take one branch at a level, and the other elsewhere."""
        same, out = self._fresh(), self._fresh()
        known = self._constant(np.array(LEVELS.index(name), np.int32))
        return [
            helper.make_node("Equal", [level, known], [same]),
            helper.make_node(
                "If", [same], [out], then_branch=_branch(then), else_branch=_branch(otherwise)
            ),
        ]

    def _rounded_input(self, site: Site, x: str) -> dict[str, list[onnx.NodeProto]]:
        int8: list[onnx.NodeProto] = []
        if x in self._scales:
            scale = self._scales[x]
            steps = self._add(int8, "Div", x, scale.step)
            low, high = (float(end - scale.zero) for end in (0, 255))
            steps = self._add(int8, "Max", steps, low)
            steps = self._whole(int8, self._add(int8, "Min", steps, high))
            self._add(int8, "Mul", steps, scale.step)
        else:
            peak = self._peak(int8, self._add(int8, "Abs", x), site.axis)
            step = self._add(int8, "Div", self._add(int8, "Max", peak, _TINY), PEAK_STEPS)
            steps = self._whole(int8, self._add(int8, "Div", x, step))
            steps = self._add(int8, "Min", steps, float(LARGEST))
            self._add(int8, "Mul", self._add(int8, "Max", steps, -float(LARGEST)), step)
        if site.convolution is not None:
            return {"int8": int8}
        bf16: list[onnx.NodeProto] = []
        large = self._add(bf16, "Mul", x, _HALF)
        self._add(bf16, "Sub", large, self._add(bf16, "Sub", large, x))
        return {"int8": int8, "bf16": bf16}

    def _rounded_weight(self, site: Site) -> dict[str, list[onnx.NodeProto]]:
        tensor = self._arrays[site.ref.initializer]
        w = canonical(site.ref, as_array(tensor))
        values, steps = quantise_rows(w)
        if site.convolution is not None:
            images = (values * steps[:, None]).reshape(tuple(tensor.dims))
            int8 = [self._same(self._constant(images, (site.ref.initializer, "int8")))]
            return {"int8": int8}
        key = (site.ref.initializer, str(site.by_inputs))

        def constant(w: np.ndarray, name: str) -> str:
            """Store a matrix ``[N, K]``, or what spreads over one, as the node wants it."""
            return self._constant(np.ascontiguousarray(w.T if site.by_inputs else w), (*key, name))

        integers = constant(values, "int8")
        int8 = []
        real = self._fresh()
        int8.append(helper.make_node("Cast", [integers], [real], to=TensorProto.FLOAT))
        self._add(int8, "Mul", real, constant(steps[:, None], "steps"))
        halves = {"bf16": bf16_values(round_to_bf16(w))}
        if in_range(w, "float16"):
            halves["fp16"] = w.astype(np.float16).astype(np.float32)
        return {
            "int8": int8,
            **{name: [self._same(constant(half, name))] for name, half in halves.items()},
        }

    def _same(self, name: str) -> onnx.NodeProto:
        return helper.make_node("Identity", [name], [self._fresh()])

    def _whole(self, nodes: list[onnx.NodeProto], x: str) -> str:
        return self._add(nodes, "Sub", self._add(nodes, "Add", x, _WHOLE), _WHOLE)

    def _peak(self, nodes: list[onnx.NodeProto], x: str, axis: int) -> str:
        out = self._fresh()
        if self._axes_are_inputs:
            axes = self._constant(np.array([axis], np.int64))
            nodes.append(helper.make_node("ReduceMax", [x, axes], [out], keepdims=1))
        else:
            nodes.append(helper.make_node("ReduceMax", [x], [out], axes=[axis], keepdims=1))
        return out

    def _add(self, nodes: list[onnx.NodeProto], op: str, *operands: str | float) -> str:
        out = self._fresh()
        names = [
            each if isinstance(each, str) else self._constant(np.array(each, np.float32))
            for each in operands
        ]
        nodes.append(helper.make_node(op, names, [out]))
        return out

    def _constant(self, array: np.ndarray, key: tuple[str, ...] | None = None) -> str:
        """Store an array once, by what it is, or by its value."""
        key = key or (str(array.dtype), array.tobytes().hex())
        if key not in self._made:
            self._made[key] = self._fresh()
            self._graph.initializer.append(numpy_helper.from_array(array, self._made[key]))
        return self._made[key]

    def _fresh(self) -> str:
        self._count += 1
        return f"sparse_tvm.rehearsal_{self._count}"


def _branch(nodes: list[onnx.NodeProto]) -> onnx.GraphProto:
    """A graph of nodes that returns what the last one does, and reads what is around it."""
    out = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
    return helper.make_graph(nodes, "branch", [], [out])
