"""Prune a model while it trains: masks over its weights that grow on a schedule."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from sparse_tvm.errors import OptionError
from sparse_tvm.frontends.onnx.read import first_few
from sparse_tvm.frontends.source import SourceOptions, require
from sparse_tvm.sparsity.masks import Cut, block_scores, magnitude_mask, spread
from sparse_tvm.sparsity.pattern import AUTO, Goal
from sparse_tvm.targets import NATIVE

torch = require("torch", "torch", "pruning while training")
parametrize = torch.nn.utils.parametrize

SCHEDULES: Mapping[str, Callable[[float], float]] = {
    # Much at first, while there is much to spare: Zhu and Gupta (2017), arXiv 1710.01878.
    "cubic": lambda progress: 1 - (1 - progress) ** 3,
    "linear": lambda progress: progress,
    "one-shot": lambda progress: 1.0,
}
"""The share of the final sparsity that is reached at a share of the steps, both 0 to 1."""


class Mask(torch.nn.Module):  # type: ignore[misc, name-defined]
    """A parametrisation: the weight where the mask is true, zero elsewhere.

    The gradient is masked, too. What an optimiser's momentum or weight decay do to the values
    behind the mask never shows.
    """

    def __init__(self, weight: Any) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool))

    def forward(self, weight: Any) -> Any:
        """Mask a weight."""
        return weight * self.mask

    def right_inverse(self, weight: Any) -> Any:
        """Return what is stored when a weight is assigned."""
        return weight


class Pruner:
    """Prunes Linear and Conv layers by magnitude, step by step, and keeps them pruned.

    Masks are parametrisations of the layers (``torch.nn.utils.parametrize``) and buffers of the
    model: its ``state_dict`` holds them, ``.to()`` moves them, and any optimiser, autocast and
    ``torch.compile`` work as before. Make the optimiser of `model`'s parameters after or before.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    structure : str
        ``"unstructured"``, blocks of outputs x inputs such as ``"4x1"``, or ``"2:4"``; or
        ``"auto"``: for each layer what
        :func:`~sparse_tvm.planning.structures.choose_structures` chooses. Layers that no structure
        makes faster stay dense then.
    sparsity : float | None
        Share of values that are zero at the end, in [0, 1). N:M structures imply it.
    goals : Mapping[str, Goal] | None
        A structure and a sparsity by layer, instead of one for all.
    schedule : str
        ``"cubic"``, ``"linear"`` or ``"one-shot"``.
    steps : int
        Calls of `step` until the final sparsity is reached.
    every : int
        Calls of `step` between changes of the masks.
    start : int
        Calls of `step` before the first.
    scope : str
        ``"uniform"``: every layer has the same sparsity; ``"global"``: all together, by one
        threshold.
    layers, exclude : str | None
        Regular expressions, searched in the names of modules: only these, all but these.
    example_inputs : tuple | Mapping[str, Tensor] | None
        For structure ``"auto"``: arguments to trace the model with, of the sizes it is to be fast
        for.
    target, precision : str | None
        For structure ``"auto"``: where the model is to run, by default here, and in what it is to
        compute, as :func:`sparse_tvm.compile` has it, by default float32.
    threads : int | None
        For structure ``"auto"``: how many will run it; by default all cores of this machine, and
        one of another.

    Raises
    ------
    OptionError
        When an option is unknown or does not fit the model.
    """

    def __init__(
        self,
        model: Any,
        *,
        structure: str = "unstructured",
        sparsity: float | None = None,
        goals: Mapping[str, Goal] | None = None,
        schedule: str = "cubic",
        steps: int = 1000,
        every: int = 10,
        start: int = 0,
        scope: str = "uniform",
        layers: str | None = None,
        exclude: str | None = None,
        example_inputs: Any = None,
        target: str | None = None,
        precision: str | None = None,
        threads: int | None = None,
    ) -> None:
        if schedule not in SCHEDULES:
            raise OptionError(
                f"unknown schedule {schedule!r}", hint=f"give one of {', '.join(SCHEDULES)}"
            )
        if steps < 1 or every < 1 or start < 0:
            raise OptionError(f"steps {steps}, every {every} and start {start} make no schedule")
        found = find_layers(model, layers, exclude)
        auto = structure == AUTO and goals is None
        for_auto = (target, precision) != (None, None)
        if auto != (example_inputs is not None) or (for_auto and not auto):
            raise OptionError(
                f"structure {AUTO} needs example_inputs"
                if auto
                else f"example_inputs, target and precision are for structure {AUTO}",
                hint="give arguments of the model, as to torch.export"
                if auto
                else "leave them out",
            )
        if auto:
            goals = _auto_goals(model, found, sparsity, example_inputs, target, precision, threads)
        elif goals is None:
            goal = Goal.parse(structure, sparsity)
            goals = dict.fromkeys(found, goal)
        elif strangers := [name for name in goals if name not in found]:
            raise OptionError(
                f"there is no layer {first_few(strangers)} to prune",
                hint=f"the model's layers are {first_few(found)}",
            )
        patterns = {goal.pattern for goal in goals.values()}
        if scope not in ("uniform", "global"):
            raise OptionError(f"unknown scope {scope!r}", hint="give uniform or global")
        if scope == "global" and (len(set(goals.values())) > 1 or next(iter(patterns)).n_m):
            raise OptionError(
                "scope global needs one sparsity and one structure of blocks for all layers",
                hint="leave the scope out",
            )
        self.goals = dict(goals)
        self.layers = {name: found[name] for name in goals}
        self._schedule, self._scope = schedule, scope
        self._steps, self._every, self._start = steps, every, start
        self.calls = 0
        for layer in self.layers.values():
            if _mask_of(layer) is None:
                parametrize.register_parametrization(layer, "weight", Mask(layer.weight))

    def step(self) -> None:
        """Count one step of the optimiser, and prune where the schedule says so."""
        self.calls += 1
        done = self.calls - self._start
        if 0 < done <= self._steps and (done % self._every == 0 or done == self._steps):
            self.prune_to(SCHEDULES[self._schedule](done / self._steps))

    def prune_to(self, share: float) -> None:
        """Prune, now, to a share of each layer's final sparsity; nothing grows back."""
        weights = {name: _matrix(layer) for name, layer in self.layers.items()}
        goals = {name: _partial(goal, share) for name, goal in self.goals.items()}
        if self._scope == "uniform":
            masks = {name: magnitude_mask(weights[name], goals[name]) for name in goals}
        else:
            goal = next(iter(goals.values()))
            block = goal.pattern.block
            scores = {name: block_scores(w, block) for name, w in weights.items()}
            cut = Cut.at(np.concatenate([each.ravel() for each in scores.values()]), goal.sparsity)
            masks = {
                name: spread(cut.keep(scores[name]), block, weights[name].shape) for name in goals
            }
        self.set_masks({name: mask & (weights[name] != 0) for name, mask in masks.items()})

    def set_masks(self, masks: Mapping[str, np.ndarray]) -> None:
        """Prune to given masks: boolean ``[N, K]`` by layer, true where a weight stays."""
        with torch.no_grad():
            for name, mask in masks.items():
                layer = self.layers[name]
                original = layer.parametrizations.weight.original
                kept = torch.from_numpy(np.ascontiguousarray(mask)).to(original.device)
                held = _mask_of(layer)
                assert held is not None
                held.mask.copy_(held.mask & kept.reshape(original.shape))
                original.mul_(held.mask)

    def keep_zeros(self) -> None:
        """Mask what is zero now, however it became so."""
        self.set_masks({name: _matrix(layer) != 0 for name, layer in self.layers.items()})

    def sparsity(self) -> dict[str, float]:
        """Return the share of zeros by layer."""
        return {
            name: 1 - float(layer.weight.count_nonzero()) / layer.weight.numel()
            for name, layer in self.layers.items()
        }

    def finish(self) -> None:
        """Make the zeros part of the weights and remove the masks: the model is a plain one."""
        for layer in self.layers.values():
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)

    def state_dict(self) -> dict[str, Any]:
        """Return where the schedule is. The masks are in the model's own ``state_dict``."""
        return {"calls": self.calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another pruner was; load the model's ``state_dict`` as well."""
        self.calls = int(state["calls"])

    @contextmanager
    def plain_weights(self) -> Iterator[None]:
        """Within it, the layers compute their masked weights once rather than at each call."""
        with parametrize.cached():
            yield


def _auto_goals(
    model: Any,
    layers: Mapping[str, Any],
    sparsity: float | None,
    example_inputs: Any,
    target: str | None,
    precision: str | None,
    threads: int | None,
) -> dict[str, Goal]:
    """Return what is chosen for those of the layers that pruning makes faster."""
    from sparse_tvm.frontends.torch.source import ModuleSource
    from sparse_tvm.planning.structures import choose_structures

    chosen = choose_structures(
        ModuleSource(model, SourceOptions(example_inputs=example_inputs)),
        sparsity,
        target=target or NATIVE,
        precision=precision,
        threads=threads,
    )
    goals = {name: goal for name, goal in chosen.goals.items() if name in layers}
    if not goals:
        raise OptionError(
            f"at a sparsity of {sparsity} no chosen layer gets faster on {chosen.target}",
            hint="give a structure, or a higher sparsity",
        )
    return goals


def find_layers(
    model: Any, layers: str | None = None, exclude: str | None = None
) -> dict[str, Any]:
    """Return the Linear and Conv modules of a model by name.

    Convolutions in groups are left out, and so are layers that share their weight with another
    module, such as an embedding.

    Raises
    ------
    OptionError
        When a regular expression is none, or matches nothing.
    """
    kinds = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kinds)
        and getattr(module, "groups", 1) == 1
        and (parametrize.is_parametrized(module, "weight") or users[id(module.weight)] == 1)
    }
    for option, pattern in (("layers", layers), ("exclude", exclude)):
        if pattern is None:
            continue
        try:
            matching = {name for name in found if re.search(pattern, name)}
        except re.error as error:
            raise OptionError(
                f"{option} {pattern!r} is not a valid regular expression: {error}"
            ) from error
        if not matching:
            raise OptionError(
                f"{option} {pattern!r} matches no layer",
                hint=f"the model's layers are {first_few(found)}",
            )
        found = {n: m for n, m in found.items() if (n in matching) == (option == "layers")}
    if not found:
        raise OptionError("the model has no Linear or Conv layer to prune")
    return found


def _mask_of(layer: Any) -> Any:
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    return next((each for each in layer.parametrizations.weight if isinstance(each, Mask)), None)


def _matrix(layer: Any) -> np.ndarray:
    """Return a layer's masked weight: float32 ``[N, K]``."""
    weight = layer.weight.detach().float().cpu()
    matrix: np.ndarray = weight.reshape(len(weight), -1).numpy()
    return matrix


def _partial(goal: Goal, share: float) -> Goal:
    """Return the goal on the way to a goal; N:M is reached by keeping more of each M first."""
    if goal.pattern.n_m is None:
        return Goal(goal.pattern, goal.sparsity * share)
    n, m = goal.pattern.n_m
    kept = m - int(share * (m - n) + 1e-6)
    pattern = type(goal.pattern)(n_m=(kept, m))
    return Goal(pattern, 1 - kept / m)
