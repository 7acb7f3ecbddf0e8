"""Prune layer after layer, each with the inputs that the pruned layers before it give."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from sparse_tvm.frontends.onnx.detach import as_array, stored_tensors
from sparse_tvm.frontends.onnx.weights import WeightRef, canonical, replace_data, stored
from sparse_tvm.sparsity.calibration import Batch, padding_rows
from sparse_tvm.sparsity.layer_inputs import LayerInput
from sparse_tvm.sparsity.masks import masked, wanda_mask
from sparse_tvm.sparsity.moments import Moments
from sparse_tvm.sparsity.obs import prune_by_obs
from sparse_tvm.sparsity.pattern import Goal
from sparse_tvm.sparsity.progress_store import ProgressStore
from sparse_tvm.sparsity.stages import StagedModel


@dataclass(frozen=True)
class Task:
    """A layer, where its input is, and what to make of it."""

    ref: WeightRef
    source: LayerInput
    goal: Goal


def prune_with_data(
    model: onnx.ModelProto,
    tasks: Sequence[Task],
    batches: Sequence[Batch],
    method: str,
    store: ProgressStore,
    *,
    threads: int,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, float]:
    """Prune weights in place, and correct biases by what the mean output of a layer loses.

    Memory holds one batch, and three ``[K, K]`` matrices of the layer at hand; activations wait
    on disk.

    Parameters
    ----------
    model : onnx.ModelProto
        Whose weights are replaced.
    tasks : sequence of Task
        The layers, in the order in which the model uses them.
    batches : sequence of Batch
        Calibration data.
    method : str
        ``"obs"`` or ``"wanda"``.
    store : ProgressStore
        What is there already is not done again.
    threads : int
        Of ONNX Runtime.
    progress : callable
        Told of each layer when it is done.

    Returns
    -------
    dict[str, float]
        By layer: the squared error of its outputs on the calibration data, relative to their
        variance.

    Raises
    ------
    InputError
        When there are too few samples for a layer, or activations are not finite.
    """
    unpruned = onnx.ModelProto()
    unpruned.CopyFrom(model)
    tensors = dict(stored_tensors(model.graph))
    by_tensor: dict[str, list[int]] = {}
    for index, task in enumerate(tasks):
        by_tensor.setdefault(task.source.tensor, []).append(index)
    errors: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as directory:
        dense, pruned = (
            StagedModel(each, batches, by_tensor, Path(directory) / name, threads)
            for each, name in ((unpruned, "dense"), (model, "pruned"))
        )
        for tensor, indices in by_tensor.items():
            for stage in (dense, pruned):
                stage.advance(tensor)
            moments: Moments | None = None
            for index in indices:
                task = tasks[index]
                done = store.load(index)
                if done is None:
                    if moments is None:
                        moments = _moments(task, dense, pruned, batches)
                    done = _prune_layer(task, tensors, moments, method)
                    store.save(index, done)
                _apply(task, tensors, done)
                errors[task.ref.layer] = float(done["error"])
                progress(
                    f"{len(errors)}/{len(tasks)} {task.ref.layer}: "
                    f"error {errors[task.ref.layer]:.1%}"
                )
            for stage in (dense, pruned):
                stage.forget(tensor)
    return errors


def _moments(
    task: Task, dense: StagedModel, pruned: StagedModel, batches: Sequence[Batch]
) -> Moments:
    tensor, features = task.source.tensor, task.ref.shape[1]
    moments = Moments(features)
    for batch, left, right in zip(batches, dense.read(tensor), pruned.read(tensor), strict=True):
        padding = padding_rows(batch)
        for rows, other in zip(
            _rows(task, left, padding), _rows(task, right, padding), strict=True
        ):
            moments.add(rows, other)
    moments.check(task.ref.layer, sum(len(next(iter(batch.values()))) for batch in batches))
    return moments


def _rows(task: Task, x: np.ndarray, padding: np.ndarray | None) -> Iterator[np.ndarray]:
    for rows in task.source.rows(x):
        kept = rows[~padding] if padding is not None and len(padding) == len(rows) else rows
        yield np.ascontiguousarray(kept, np.float32)


def _prune_layer(
    task: Task, tensors: Mapping[str, onnx.TensorProto], moments: Moments, method: str
) -> dict[str, np.ndarray]:
    w = canonical(task.ref, as_array(tensors[task.ref.initializer]))
    centred = task.source.bias is not None
    if method == "wanda":
        after = masked(w, wanda_mask(w, moments.input_norms, task.goal))
    else:
        after = prune_by_obs(w, moments.problem(w, centred=centred), task.goal)
    done = {"weight": after, "error": np.array(moments.error(w, after, centred=centred))}
    if task.source.bias is not None:
        bias = as_array(tensors[task.source.bias])
        done["bias"] = bias + moments.bias_change(w, after)
    return done


def _apply(
    task: Task, tensors: Mapping[str, onnx.TensorProto], done: Mapping[str, np.ndarray]
) -> None:
    weight = tensors[task.ref.initializer]
    replace_data(weight, stored(task.ref, done["weight"], tuple(weight.dims)))
    if task.source.bias is not None:
        replace_data(tensors[task.source.bias], done["bias"])


def arrays_of(batches: Iterable[Batch]) -> Iterator[np.ndarray]:
    """Yield the arrays of batches in a fixed order."""
    for batch in batches:
        for _, array in sorted(batch.items()):
            yield array
