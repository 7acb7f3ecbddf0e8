"""Spare programs of few, plain operators the exporter's second trace, half of its time.

``torch.onnx.export`` traces a program again to decompose its operators. Encoders are made of
operators that it translates as they are, but for a handful that have an equal among those.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from typing import Any

_TRANSLATED = frozenset(
    {
        *("aten.add.Tensor", "aten.arange.default", "aten.cat.default", "aten.conv2d.default"),
        *("aten.embedding.default", "aten.expand.default", "aten.flatten.using_ints"),
        *("aten.ge.Scalar", "aten.gelu.default", "aten.index.Tensor", "aten.layer_norm.default"),
        *("aten.linear.default", "aten.matmul.default", "aten.mul.Tensor", "aten.ne.Scalar"),
        *("aten.new_ones.default", "aten.relu.default", "aten.reshape.default"),
        *("aten.scaled_dot_product_attention.default", "aten.select.int", "aten.slice.Tensor"),
        *("aten.softmax.int", "aten.split.Tensor", "aten.squeeze.dim", "aten.sub.Tensor"),
        *("aten.sym_size.int", "aten.tanh.default", "aten.transpose.int"),
        *("aten.unsqueeze.default", "aten.view.default"),
        # The exporter drops it.
        "aten._assert_tensor_metadata.default",
    }
)


def without_second_trace(program: Any) -> Any:
    """Return a program that the exporter need not decompose, where that is possible.

    Parameters
    ----------
    program : torch.export.ExportedProgram
        Left as it is.

    Returns
    -------
    torch.export.ExportedProgram
        An equal program that says it is decomposed; where it holds any operator that is not
        known to need none, one that can be.
    """
    import torch

    rewrites = _rewrites()
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    plain = all(
        node.target is operator.getitem or str(node.target) in _TRANSLATED.union(rewrites)
        for node in calls
    )
    if not plain or any(node.op == "get_attr" for node in program.graph.nodes):
        return _with_views_of_copies(program)
    graph = copied_graph(program)
    for node in list(graph.nodes):
        rewrite = rewrites.get(str(node.target))
        if rewrite is not None and not rewrite(node):
            return _with_views_of_copies(program)
    graph.eliminate_dead_code()

    class Decomposed(torch.export.ExportedProgram):  # type: ignore[misc]
        def run_decompositions(self, *_: Any, **__: Any) -> Any:
            return self

    return Decomposed(**{**parts_of(program), "graph": graph})


def _with_views_of_copies(program: Any) -> Any:
    """Let each view be of a copy: decomposed, its operand may lie in memory as no view allows.

    Decomposed, a reshape is such a view.
    """
    import torch

    aten = torch.ops.aten
    views = {aten.view.default, aten.reshape.default}
    if not any(node.target in views for node in program.graph.nodes):
        return program
    graph = copied_graph(program)
    for node in list(graph.nodes):
        if node.target in views:
            with graph.inserting_before(node):
                layout = {"memory_format": torch.contiguous_format}
                copied = graph.call_function(aten.clone.default, node.args[:1], layout)
            copied.meta["val"] = node.args[0].meta["val"]
            node.replace_input_with(node.args[0], copied)
    return torch.export.ExportedProgram(**{**parts_of(program), "graph": graph})


def copied_graph(program: Any) -> Any:
    """Return a copy of a program's graph with the same names."""
    graph = copy.deepcopy(program.graph)
    for copied, node in zip(graph.nodes, program.graph.nodes, strict=True):
        copied.name = node.name  # copying evades Python's own names, such as input
    return graph


def parts_of(program: Any) -> dict[str, Any]:
    """Return what an ``ExportedProgram`` is built from, to build another like it."""
    return {
        "root": program.graph_module,
        "graph": program.graph,
        "graph_signature": program.graph_signature,
        "state_dict": program.state_dict,
        "range_constraints": program.range_constraints,
        "module_call_graph": program.module_call_graph,
        "example_inputs": program.example_inputs,
        "constants": program.constants,
        "verifiers": program.verifiers,
    }


def _rewrites() -> Mapping[str, Callable[[Any], bool]]:
    """Return what replaces operators; False where it cannot."""
    import torch

    aten = torch.ops.aten

    def become(node: Any, target: Any, args: tuple[Any, ...], **kwargs: Any) -> bool:
        node.target, node.args, node.kwargs = target, args, kwargs
        return True

    def cast(node: Any) -> bool:
        return become(node, aten._to_copy.default, node.args[:1], dtype=node.meta["val"].dtype)

    def drop(node: Any) -> bool:
        if any(user.op == "output" for user in node.users):  # which names it
            return become(node, aten.clone.default, node.args[:1])
        node.replace_all_uses_with(node.args[0])
        node.graph.erase_node(node)
        return True

    def drop_dropout(node: Any) -> bool:
        trains = node.args[2] if len(node.args) > 2 else node.kwargs.get("train", True)
        return not trains and drop(node)

    def subtract(node: Any) -> bool:
        scaled = len(node.args) > 2 or node.kwargs
        value, scalar = node.args[:2]
        return not scaled and become(node, aten.sub.Tensor, (scalar, value))

    def conjoin(node: Any) -> bool:
        return become(node, aten.bitwise_and.Tensor, node.args)

    return {
        "aten.__and__.Tensor": conjoin,
        "aten.contiguous.default": drop,
        "aten.dropout.default": drop_dropout,
        "aten.rsub.Scalar": subtract,
        "aten.to.device": cast,
        "aten.to.dtype": cast,
        "aten.to.dtype_layout": cast,
        "aten.type_as.default": cast,
    }
