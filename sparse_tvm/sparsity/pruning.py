"""Pruning of models: set the weights that matter least to zero."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from sparse_tvm.cpu import usable_cores
from sparse_tvm.errors import OptionError
from sparse_tvm.files import check_writable
from sparse_tvm.frontends.detect import open_source
from sparse_tvm.frontends.onnx.detach import as_array, stored_tensors
from sparse_tvm.frontends.onnx.in_memory import find_array
from sparse_tvm.frontends.onnx.read import read_onnx
from sparse_tvm.frontends.onnx.source import OnnxSource
from sparse_tvm.frontends.onnx.weights import (
    WeightRef,
    canonical,
    find_weights,
    replace_data,
    stored,
)
from sparse_tvm.frontends.onnx.write import weight_bytes, write_onnx
from sparse_tvm.frontends.source import Source, SourceOptions, require
from sparse_tvm.sparsity.analysis import analyse
from sparse_tvm.sparsity.calibration import SAMPLES, Batch, Data, read_calibration
from sparse_tvm.sparsity.channels import Reordered, reorder
from sparse_tvm.sparsity.choice import choose_layers, nothing_left, with_goals
from sparse_tvm.sparsity.layer_inputs import LayerInput, find_inputs
from sparse_tvm.sparsity.masks import Cut, block_scores, magnitude_mask, masked, spread
from sparse_tvm.sparsity.pattern import AUTO, Goal, asked_sparsity
from sparse_tvm.sparsity.progress_store import ProgressStore, identity_of
from sparse_tvm.targets import NATIVE

if TYPE_CHECKING:
    from sparse_tvm.planning.structures import StructureChoice

METHODS = ("magnitude", "wanda", "obs")


@dataclass(frozen=True)
class PrunedLayer:
    """One pruned layer: its sparsity before and after, and the structure found afterwards.

    `error` is the squared error of its outputs on calibration data, relative to their variance.
    """

    name: str
    op: str
    shape: tuple[int, int]
    before: float
    after: float
    structure: str
    error: float | None = None


@dataclass(frozen=True)
class PruneReport:
    """What `prune` did.

    Attributes
    ----------
    output : Path
        The file it wrote.
    layers : tuple[PrunedLayer, ...]
        The pruned layers, in the order the model uses them.
    skipped : dict[str, str]
        Why a chosen layer was left as it is, by layer name.
    structures : StructureChoice | None
        What structure ``"auto"`` chose, and what it expects of that.
    reordered : tuple[Reordered, ...]
        What `permute` did for each N:M layer.
    """

    output: Path
    layers: tuple[PrunedLayer, ...]
    skipped: dict[str, str]
    structures: StructureChoice | None = None
    reordered: tuple[Reordered, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of values in the pruned layers."""
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers)

    @property
    def nonzeros(self) -> int:
        """Number of values of the pruned layers that are not zero now."""
        return sum(
            round(layer.shape[0] * layer.shape[1] * (1 - layer.after)) for layer in self.layers
        )


def prune(
    model: Any,
    output: str | os.PathLike[str],
    *,
    options: SourceOptions | None = None,
    sparsity: float | None = None,
    structure: str = "unstructured",
    goals: Mapping[str, Goal] | None = None,
    plan: str | os.PathLike[str] | None = None,
    scope: str = "uniform",
    layers: str | None = None,
    exclude: str | None = None,
    method: str = "magnitude",
    calibrate: Data | None = None,
    samples: int = SAMPLES,
    tokenizer: str | os.PathLike[str] | None = None,
    random_weights: bool = False,
    seed: int = 0,
    threads: int | None = None,
    target: str | None = None,
    precision: str | None = None,
    tokens: int | None = None,
    records: Sequence[str | os.PathLike[str]] = (),
    measure: bool = False,
    permute: bool = False,
    progress: Callable[[str], None] = lambda message: None,
) -> PruneReport:
    """Prune the MatMul, Gemm and Conv weights of a model.

    Embeddings are never touched, nor are weights that share their values with one. Weights that
    several layers share are pruned once.

    Parameters
    ----------
    model : path or model
        Anything :func:`sparse_tvm.compile` takes; a model in memory is not changed.
    output : path
        What to write. A name that ends in ``.onnx``, or an ONNX model, gives ONNX, whose
        weights go to ``<output>.data`` when the model is over 2 GiB or came with external data
        itself. Otherwise a Hugging Face model is written as such a directory, and a PyTorch
        model as a ``.pt2``.
    options : SourceOptions | None
        What else opening the model takes, such as example inputs.
    sparsity : float | None
        Share of values to set to zero, in [0, 1). N:M structures imply it.
    structure : str
        ``"unstructured"``, blocks of outputs x inputs such as ``"4x1"``, or ``"2:4"``; or
        ``"auto"``, see :func:`~sparse_tvm.planning.structures.choose_structures`.
    goals : Mapping[str, Goal] | None
        A structure and a sparsity by layer, instead of one for all; other layers stay as they
        are.
    plan : path | None
        What ``sparse-tvm plan`` wrote: the goals, for a model of the same layers.
    scope : str
        ``"uniform"``: every layer gets this sparsity; ``"global"``: all layers together do, by
        one threshold.
    layers, exclude : str | None
        Regular expressions, searched in layer names: prune only these, all but these.
    method : str
        ``"magnitude"``; or, with calibration data, ``"wanda"`` (weights times inputs) or
        ``"obs"`` (the Optimal Brain Surgeon: weights that stay make up for those that go). Both
        go from layer to layer and correct biases.
    calibrate : path or mapping | None
        Data to calibrate with: see :func:`~sparse_tvm.sparsity.calibration.read_calibration`.
    samples : int
        The most calibration samples to use.
    tokenizer : path | None
        The ``tokenizer.json`` for sentences; one beside the model by default.
    random_weights : bool
        Replace the weights by random ones of the same scale first: how fast would such a model
        be?
    seed : int
        Of the random weights.
    threads : int | None
        Of ONNX Runtime, for calibration, and of the model that structure ``"auto"`` is to make
        fast; all usable cores by default.
    target, precision, tokens, records, measure
        For structure ``"auto"`` only: where the model is to run (by default here), in what it is to
        compute, as :func:`sparse_tvm.compile` has it (by default float32), tokens of an input that
        leaves it open (128), what ``sparse-tvm tune`` measured, and whether to time the model here,
        pruned in several ways, rather than predict.
    permute : bool
        First put inputs of N:M layers in an order in which more of their weight stays, and what
        makes them, too, so that the model still computes the same: see
        :mod:`~sparse_tvm.sparsity.channels`.
    progress : callable
        Told of each layer that is pruned with data, or given another order.

    Returns
    -------
    PruneReport
        Sparsity and structure by layer, and the layer's error where there was data.

    Raises
    ------
    ModelError, OptionError, InputError, OutputError
        When the model or the data cannot be read, an option does not fit it, or `output` cannot
        be written.

    Notes
    -----
    With data, finished layers are kept in ``<output>.pruning`` until all are done: the same call
    again goes on where an interrupted one was.
    """
    by_layer = goals is not None or plan is not None
    auto = structure == AUTO and not by_layer
    _check_auto(
        auto,
        sparsity,
        target=target,
        precision=precision,
        tokens=tokens,
        records=records,
        measure=measure,
    )
    goal = None if by_layer or auto else Goal.parse(structure, sparsity)
    if by_layer and sparsity is not None:
        raise OptionError("goals by layer leave no sparsity to choose", hint="leave it out")
    _check_method(method, calibrate)
    if permute and goal is not None and goal.pattern.n_m is None:
        raise OptionError(
            f"an order of inputs does nothing for structure {structure}",
            hint="permute goes with N:M, such as 2:4",
        )
    _check_scope(scope, goal, structure, method)
    source = open_source(model, options)
    as_onnx = isinstance(source, OnnxSource) or Path(output).suffix == ".onnx"
    pruned = own_copy(source.as_onnx())
    if plan is not None:
        from sparse_tvm.planning.document import planned_goals

        goals = planned_goals(plan, pruned, source.name)
    chosen, skipped = choose_layers(pruned, layers, exclude)
    if goals is not None:
        chosen = with_goals(chosen, goals)
    elif goal is not None:
        goals = {ref.layer: goal for ref in chosen}
    weights = _Weights(pruned, chosen)
    if random_weights:
        weights.randomise(seed)
    structures = None
    if auto:
        from sparse_tvm.planning.structures import choose_structures

        structures = choose_structures(
            source,
            sparsity,
            target=target or NATIVE,
            precision=precision,
            tokens=tokens,
            threads=threads,
            input_shapes=options.input_shapes if options is not None else {},
            layers=layers,
            exclude=exclude,
            records=records,
            measure=measure,
            weights={ref.layer: weights[ref] for ref in chosen} if random_weights else None,
            progress=progress,
        )
        goals = structures.goals
        reason = f"at this sparsity pruning makes it no faster on {structures.target}"
        skipped |= {ref.layer: reason for ref in chosen if ref.layer not in goals}
        weights.refs = chosen = with_goals(chosen, goals)
        if not chosen:
            raise nothing_left(skipped, chosen)
    reordered: list[Reordered] = []
    changed: list[str] = []
    if permute:
        every = find_weights(pruned)
        reordered, changed = reorder(pruned, chosen, every, goals or {}, progress)
    done = _Done({}, [], None)
    if calibrate is None:
        _prune_by_magnitude(weights, goals or {}, scope)
    else:
        for package in ("scipy", "threadpoolctl"):
            require(package, "prune", f"method {method}")
        batches = read_calibration(
            calibrate, pruned, samples=samples, tokenizer=tokenizer or tokenizer_of(source)
        )
        inputs, refused = find_inputs(pruned, chosen)
        skipped |= refused
        weights.refs = [ref for ref in chosen if ref.layer in inputs]
        if not weights.refs:
            raise nothing_left(skipped, chosen)
        done = _prune_with_data(
            pruned, weights, inputs, goals or {}, batches, method, output,
            threads or usable_cores(), progress,
        )  # fmt: skip
    report = PruneReport(
        Path(output), weights.report(done.errors), skipped, structures, tuple(reordered)
    )
    if as_onnx:
        write_onnx(pruned, output, external=_is_external(source.as_onnx(), pruned))
    else:
        tensors = dict(stored_tensors(pruned.graph))
        names = (*(ref.initializer for ref in weights.refs), *done.biases, *changed)
        source.write_pruned({name: as_array(tensors[name]) for name in names}, Path(output))
    if done.store is not None:
        done.store.remove()
    return report


@dataclass(frozen=True)
class _Done:
    """What pruning with data found and changed, and where it kept what it did."""

    errors: dict[str, float]
    biases: list[str]
    store: ProgressStore | None


def _prune_with_data(
    model: onnx.ModelProto,
    weights: _Weights,
    inputs: Mapping[str, LayerInput],
    goals: Mapping[str, Goal],
    batches: Sequence[Batch],
    method: str,
    output: str | os.PathLike[str],
    threads: int,
    progress: Callable[[str], None],
) -> _Done:
    from sparse_tvm.sparsity.reconstruction import Task, arrays_of, prune_with_data

    tasks = [Task(ref, inputs[ref.layer], goals[ref.layer]) for ref in weights.refs]
    check_writable(f"{os.fspath(output)}.pruning.new")
    identity = identity_of(
        (method, [(task.ref, task.goal) for task in tasks]),
        (*arrays_of(batches), *(weights[ref] for ref in weights.refs)),
    )
    store = ProgressStore(output, identity)
    errors = prune_with_data(
        model, tasks, batches, method, store, threads=threads, progress=progress
    )
    return _Done(errors, [task.source.bias for task in tasks if task.source.bias], store)


class _Weights:
    """The chosen weights of a model as ``[N, K]`` matrices."""

    def __init__(self, model: onnx.ModelProto, refs: Sequence[WeightRef]) -> None:
        self._tensors = dict(stored_tensors(model.graph))
        self.refs = refs
        self._before = {ref.layer: _zeros(self[ref]) for ref in refs}

    def __getitem__(self, ref: WeightRef) -> np.ndarray:
        return canonical(ref, as_array(self._tensors[ref.initializer]))

    def replace(self, ref: WeightRef, w: np.ndarray) -> None:
        """Store other values."""
        tensor = self._tensors[ref.initializer]
        replace_data(tensor, stored(ref, w, tuple(tensor.dims)))

    def randomise(self, seed: int) -> None:
        """Replace all values by random ones of the same scale."""
        for index, ref in enumerate(self.refs):
            self.replace(ref, _random_like(self[ref], (seed, index)))

    def report(self, errors: Mapping[str, float]) -> tuple[PrunedLayer, ...]:
        """Describe layers as they are now."""
        layers = []
        for ref in self.refs:
            found, before = analyse(self[ref]), self._before[ref.layer]
            error = errors.get(ref.layer)
            layers.append(
                PrunedLayer(
                    ref.layer, ref.op, ref.shape, before, found.sparsity, found.label, error
                )
            )
        return tuple(layers)


def _zeros(w: np.ndarray) -> float:
    return 1 - np.count_nonzero(w) / max(w.size, 1)


def _prune_by_magnitude(weights: _Weights, goals: Mapping[str, Goal], scope: str) -> None:
    cut = None
    if scope == "global":
        goal = next(iter(goals.values()))
        scores = [block_scores(weights[ref], goal.pattern.block).ravel() for ref in weights.refs]
        cut = Cut.at(np.concatenate(scores), goal.sparsity)
    for ref in weights.refs:
        w, goal = weights[ref], goals[ref.layer]
        block = goal.pattern.block
        if cut is None:
            mask = magnitude_mask(w, goal)
        else:
            mask = spread(cut.keep(block_scores(w, block)), block, w.shape)
        weights.replace(ref, masked(w, mask))


def _random_like(w: np.ndarray, seed: tuple[int, int]) -> np.ndarray:
    """Return normally distributed values of the same mean square, so that layers compare."""
    values = np.random.default_rng(seed).standard_normal(w.shape, dtype=np.float32)
    scale = np.sqrt(np.mean(np.square(w))) or np.float32(w.shape[1] ** -0.5)
    values *= scale
    return values


def _check_method(method: str, calibrate: Data | None) -> None:
    if method not in METHODS:
        raise OptionError(f"unknown method {method!r}", hint=f"give one of {', '.join(METHODS)}")
    if (method == "magnitude") != (calibrate is None):
        raise OptionError(
            "method magnitude uses no calibration data"
            if calibrate is not None
            else f"method {method} needs calibration data",
            hint="calibrate goes with method wanda or obs: an .npz of inputs, a .txt of sentences, "
            "or a folder of images",
        )


def _check_auto(auto: bool, sparsity: float | None, **conditions: Any) -> None:
    given = [name for name, value in conditions.items() if value]
    if not auto and given:
        raise OptionError(
            f"{given[0]} is for structure {AUTO}", hint=f"leave it out, or give structure {AUTO}"
        )
    if auto:
        asked_sparsity(sparsity)


def _check_scope(scope: str, goal: Goal | None, structure: str, method: str) -> None:
    if scope not in ("uniform", "global"):
        raise OptionError(f"unknown scope {scope!r}", hint="give uniform or global")
    if scope == "uniform":
        return
    if goal is None or method != "magnitude":
        by_layer = f"structure {AUTO}" if structure == AUTO else "goals by layer"
        what = by_layer if goal is None else f"method {method}"
        raise OptionError(f"scope global does not fit {what}", hint="leave the scope out")
    if goal.pattern.n_m:
        raise OptionError(
            f"scope global does not fit structure {structure}, which is the same in every layer",
            hint="leave the scope out",
        )


def tokenizer_of(source: Source) -> Path | None:
    """Return the tokenizer of a model's directory, or the one beside its file."""
    if source.path is None:
        return None
    directory = source.path if source.path.is_dir() else source.path.parent
    path = directory / "tokenizer.json"
    return path if path.is_file() else None


def own_copy(model: str | os.PathLike[str] | onnx.ModelProto) -> onnx.ModelProto:
    """Read a model to change it: all weights in it, and nothing of it shared with `model`."""
    checked = read_onnx(model)
    if checked is not model:
        return checked
    copy = onnx.ModelProto()
    copy.CopyFrom(checked)
    for _, tensor in stored_tensors(copy.graph):
        if (array := find_array(tensor)) is not None:
            replace_data(tensor, array)
    return copy


def _is_external(source: str | os.PathLike[str] | onnx.ModelProto, model: onnx.ModelProto) -> bool:
    """Whether a model came with its weights in other files: its own is smaller than they are."""
    if isinstance(source, onnx.ModelProto):
        return False
    return Path(source).stat().st_size < weight_bytes(model)
