"""Prune a PyTorch model with calibration data, layer after layer, by forward hooks."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from sparse_tvm.errors import InputError, OptionError
from sparse_tvm.frontends.onnx.read import first_few
from sparse_tvm.frontends.source import require
from sparse_tvm.sparsity.layer_inputs import Window
from sparse_tvm.sparsity.moments import Moments
from sparse_tvm.sparsity.obs import prune_by_obs
from sparse_tvm.sparsity.pattern import Goal

torch = require("torch", "torch", "pruning of PyTorch models")

Batch = Mapping[str, Any]


def prune_with_data(
    model: Any,
    teacher: Any,
    goals: Mapping[str, Goal],
    batches: Sequence[Batch],
    *,
    dtype: Any = None,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, float]:
    """Prune layers in place by the Optimal Brain Surgeon, each to give the teacher's outputs.

    The layers are pruned in the order in which they run, on inputs from layers pruned already;
    those that read the same tensor, such as queries, keys and values, together. Biases are
    corrected. Blocks that are zero stay zero, so that a model can be pruned further and further
    with training in between.

    Each batch goes through the model once, and waits in memory while a layer is pruned.

    Parameters
    ----------
    model, teacher : nn.Module
        The model to prune, and the unpruned one: of one architecture, in evaluation mode.
    goals : Mapping[str, Goal]
        By name of module (Linear, or Conv without groups).
    batches : sequence of mappings
        Keyword arguments of the model. Rows where ``attention_mask`` is 0 do not count.
    dtype : torch.dtype | None
        Run the models with autocast to it.
    progress : callable
        Told of each layer when it is done.

    Returns
    -------
    dict[str, float]
        By layer: the squared error of its outputs, relative to their variance.

    Raises
    ------
    OptionError
        When there is no such layer.
    InputError
        When there are no batches or too few rows, the model does not take them, a layer does not
        run or its inputs are not finite.
    """
    if not batches:
        raise InputError("there is no calibration data", hint="give at least one batch")
    modules = dict(model.named_modules())
    if strangers := [name for name in goals if name not in modules]:
        raise OptionError(
            f"there is no layer {first_few(strangers)} to prune",
            hint="give names of the model's modules",
        )
    groups = _groups(teacher, goals, batches[0])
    errors: dict[str, float] = {}
    with ExitStack() as stack:
        dense, pruned = (
            [stack.enter_context(_Pass(each, [g[0] for g in groups], b, dtype)) for b in batches]
            for each in (teacher, model)
        )
        for names in groups:
            moments = _moments(names[0], teacher, batches, dense, pruned)
            for name in names:
                errors[name] = _prune_layer(
                    model.get_submodule(name), teacher.get_submodule(name), goals[name], moments
                )
                progress(f"{len(errors)}/{len(goals)} {name}: error {errors[name]:.1%}")
    return errors


class _Pass(threading.Thread):
    """One batch on its way through a model, in a thread that waits where a layer begins.

    As a context manager it stops the pass wherever it is.
    """

    def __init__(self, model: Any, pauses: Sequence[str], batch: Batch, dtype: Any) -> None:
        super().__init__(daemon=True)
        self._model, self._batch, self._dtype = model, batch, dtype
        self._pauses = pauses
        self._reached: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._going: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def __enter__(self) -> _Pass:
        self._handles = [
            self._model.get_submodule(name).register_forward_pre_hook(self._hook)
            for name in self._pauses
        ]
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._going.put(False)
        self.join()
        for handle in self._handles:
            handle.remove()

    def next(self) -> Any:
        """Go on to the next layer, and return its input."""
        self._going.put(True)
        found = self._reached.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def run(self) -> None:
        """Run the model; see `threading.Thread`."""
        autocast = torch.autocast(
            next(self._model.parameters()).device.type,
            dtype=self._dtype,
            enabled=self._dtype is not None,
        )
        try:
            self._wait()
            with torch.no_grad(), autocast:
                self._model(**self._batch)
            raise InputError("the model takes another way with another batch")
        except _Stopped:
            pass
        except BaseException as error:
            self._reached.put(error)

    def _hook(self, _: Any, inputs: tuple[Any, ...]) -> None:
        if threading.current_thread() is self:
            self._reached.put(inputs[0])
            self._wait()

    def _wait(self) -> None:
        if not self._going.get():
            raise _Stopped


class _Stopped(Exception):
    """The rest of the pass is not wanted."""


def _groups(model: Any, goals: Mapping[str, Goal], batch: Batch) -> list[list[str]]:
    """Return the layers as they run; those that read the same tensor together."""
    seen: list[tuple[str, Any]] = []

    def hook(name: str) -> Callable[[Any, Any], None]:
        return lambda _, inputs: seen.append((name, inputs[0]))

    handles = [model.get_submodule(n).register_forward_pre_hook(hook(n)) for n in goals]
    try:
        with torch.no_grad():
            model(**batch)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"the model does not run on the calibration data: {reason}",
            hint="a batch holds the keyword arguments of the model's forward",
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    groups: list[list[str]] = []
    before = None
    for name, tensor in seen:
        if tensor is before:
            groups[-1].append(name)
        else:
            groups.append([name])
        before = tensor
    names = [name for name, _ in seen]
    if idle := [name for name in goals if names.count(name) != 1]:
        raise InputError(f"layer {first_few(idle)} does not run exactly once in the model")
    return groups


def _moments(
    name: str,
    teacher: Any,
    batches: Sequence[Batch],
    dense: Sequence[_Pass],
    pruned: Sequence[_Pass],
) -> Moments:
    layer = teacher.get_submodule(name)
    moments = Moments(_matrix(layer.weight).shape[1])
    for batch, left, right in zip(batches, dense, pruned, strict=True):
        mask = batch.get("attention_mask")
        both = (_rows(layer, each.next(), mask) for each in (left, right))
        for rows, other in zip(*both, strict=True):
            moments.add(rows, other)
    moments.check(name, sum(len(next(iter(batch.values()))) for batch in batches))
    return moments


def _prune_layer(layer: Any, unpruned: Any, goal: Goal, moments: Moments) -> float:
    before = _matrix(unpruned.weight)
    centred = layer.bias is not None
    after = prune_by_obs(_matrix(layer.weight), moments.problem(before, centred=centred), goal)
    with torch.no_grad():
        stored = _stored(layer)
        stored.copy_(torch.from_numpy(after).reshape(stored.shape))
        if centred:
            change = torch.from_numpy(moments.bias_change(before, after))
            layer.bias.copy_(unpruned.bias + change.to(layer.bias.device))
    return moments.error(before, after, centred=centred)


def _rows(layer: Any, x: Any, mask: Any) -> Iterator[np.ndarray]:
    if not isinstance(layer, torch.nn.Linear):
        window = Window(
            tuple(layer.kernel_size), tuple(layer.stride), tuple(layer.dilation),
            tuple((p, p) for p in layer.padding), "NOTSET",
        )  # fmt: skip
        for rows in window.unfold(x.float().cpu().numpy()):
            yield np.ascontiguousarray(rows)
        return
    if mask is not None and x.shape[:2] == mask.shape:
        x = x[mask.bool()]
    yield x.reshape(-1, x.shape[-1]).float().cpu().numpy()


def _stored(layer: Any) -> Any:
    """Return the parameter behind a layer's weight."""
    if torch.nn.utils.parametrize.is_parametrized(layer, "weight"):
        return layer.parametrizations.weight.original
    return layer.weight


def _matrix(weight: Any) -> np.ndarray:
    matrix: np.ndarray = weight.detach().float().cpu().reshape(len(weight), -1).numpy()
    return matrix
