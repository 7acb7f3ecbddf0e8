"""Which layers of a model are pruned."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import onnx

from sparse_tvm.errors import ModelError, OptionError
from sparse_tvm.frontends.onnx.read import first_few
from sparse_tvm.frontends.onnx.weights import WeightRef, find_weights, other_users
from sparse_tvm.sparsity.pattern import Goal


def choose_layers(
    model: onnx.ModelProto, layers: str | None, exclude: str | None
) -> tuple[list[WeightRef], dict[str, str]]:
    """Return the layers to prune, and why others that were chosen cannot be."""
    found = find_weights(model)
    if not found:
        raise ModelError("the model has no MatMul, Gemm or Conv with float32 weights to prune")
    wanted = _matching("layers", layers, found) if layers is not None else found
    unwanted = _matching("exclude", exclude, found) if exclude is not None else []
    selected = [ref for ref in wanted if ref not in unwanted]
    users = other_users(model, selected)
    skipped = {
        ref.layer: f"its values are shared with {first_few(users[ref.layer])}"
        for ref in selected
        if users[ref.layer]
    }
    chosen = [ref for ref in selected if ref.layer not in skipped]
    if not chosen:
        raise nothing_left(skipped, found)
    return chosen, skipped


def nothing_left(skipped: Mapping[str, str], found: Sequence[WeightRef]) -> OptionError:
    """Return the error that says why no layer can be pruned."""
    reasons = first_few(f"{layer}: {reason}" for layer, reason in skipped.items())
    return OptionError(
        "no layer is left to prune" + (f" ({reasons})" if reasons else ""),
        hint=f"the model's layers are {first_few(ref.layer for ref in found)}",
    )


def with_goals(chosen: Sequence[WeightRef], goals: Mapping[str, Goal]) -> list[WeightRef]:
    """Return the layers that have goals.

    Raises
    ------
    OptionError
        When a goal is for no layer of the model.
    """
    names = {ref.layer for ref in chosen}
    if strangers := [name for name in goals if name not in names]:
        raise OptionError(
            f"there is no layer {first_few(strangers)} to prune",
            hint=f"the model's layers are {first_few(names)}",
        )
    return [ref for ref in chosen if ref.layer in goals]


def _matching(option: str, pattern: str, refs: Sequence[WeightRef]) -> list[WeightRef]:
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise OptionError(
            f"{option} {pattern!r} is not a valid regular expression: {error}"
        ) from error
    matching = [ref for ref in refs if regex.search(ref.layer)]
    if not matching:
        raise OptionError(
            f"{option} {pattern!r} matches no layer",
            hint=f"the model's layers are {first_few(ref.layer for ref in refs)}",
        )
    return matching
