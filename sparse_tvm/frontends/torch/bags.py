"""Spell ``nn.EmbeddingBag`` of two-dimensional indices as a look-up and a reduction.

PyTorch flattens the indices and says where each bag begins; its exporter loops over the bags.
"""

from __future__ import annotations

import operator
from typing import Any

from sparse_tvm.frontends.torch.decompose import copied_graph, parts_of

_BAG = "aten.embedding_bag.padding_idx"


def with_summed_bags(program: Any) -> Any:
    """Return a program whose bags of one size are sums, means or maxima of ``[bags, size, width]``.

    Parameters
    ----------
    program : torch.export.ExportedProgram
        Left as it is, and returned where it has no such bags.
    """
    import torch

    if not any(str(node.target) == _BAG for node in program.graph.nodes):
        return program
    graph = copied_graph(program)
    for node in list(graph.nodes):
        if str(node.target) == _BAG and (indices := _indices(node)) is not None:
            _rewrite(node, indices)
    graph.eliminate_dead_code()
    return torch.export.ExportedProgram(**{**parts_of(program), "graph": graph})


def _indices(bag: Any) -> Any:
    """Return the indices ``[bags, size]`` whose rows are the bags, or None."""
    _, flat, offsets, _, _, _, weights, ends, padding = (*bag.args, *[None] * 9)[:9]
    results = [user for user in bag.users if user.users]
    plain = weights is None and not ends and padding is None and not bag.kwargs
    if not plain or [(each.target, each.args[1]) for each in results] != [(operator.getitem, 0)]:
        return None
    moves, counts = ("aten.reshape.default", "aten.view.default"), "aten.arange.start_step"
    if str(flat.target) not in moves or str(offsets.target) != counts:
        return None
    indices = flat.args[0]
    value = indices.meta["val"]
    if list(flat.args[1]) != [-1] or value.ndim != 2:
        return None
    wanted = (0, value.numel(), value.shape[1])
    return indices if all(map(_same, offsets.args, wanted)) else None


def _same(found: Any, wanted: Any) -> bool:
    """Whether a number of the graph, or a node that computes it, is a size in any case."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(getattr(found, "meta", {"val": found})["val"] == wanted))


def _rewrite(bag: Any, indices: Any) -> None:
    """Replace the first output of a bag; the others are not used."""
    import torch

    aten, graph = torch.ops.aten, bag.graph
    table, mode = bag.args[0], bag.args[4] if len(bag.args) > 4 else 0
    reduce = (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default)[mode]
    (result,) = (user for user in bag.users if user.users)
    with graph.inserting_before(bag):
        rows = graph.call_function(aten.embedding.default, (table, indices))
        reduced = graph.call_function(reduce, (rows, [1]))
    reduced.meta = {**result.meta}
    with indices.meta["val"].fake_mode:
        rows.meta = {
            **bag.meta,
            "val": aten.embedding.default(table.meta["val"], indices.meta["val"]),
        }
    result.replace_all_uses_with(reduced)
