"""Magnitude pruning of weights and of models: set the values that matter least to zero."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from sparse_tvm.errors import ModelError, OptionError
from sparse_tvm.frontends.detect import open_source
from sparse_tvm.frontends.onnx.detach import as_array, stored_tensors
from sparse_tvm.frontends.onnx.in_memory import find_array
from sparse_tvm.frontends.onnx.read import first_few, read_onnx
from sparse_tvm.frontends.onnx.source import OnnxSource
from sparse_tvm.frontends.onnx.weights import (
    WeightRef,
    canonical,
    find_weights,
    other_users,
    replace_data,
    stored,
)
from sparse_tvm.frontends.onnx.write import weight_bytes, write_onnx
from sparse_tvm.frontends.source import SourceOptions
from sparse_tvm.sparsity.analysis import analyse
from sparse_tvm.sparsity.blocks import parse_block
from sparse_tvm.sparsity.formats import reduce_blocks


@dataclass(frozen=True)
class Pattern:
    """What is pruned as a unit: blocks, or the smallest of every M inputs.

    Attributes
    ----------
    block : tuple[int, int]
        Outputs by inputs; ``(1, 1)`` is unstructured.
    n_m : tuple[int, int] | None
        Keep N of every M consecutive inputs; `block` is not used then.
    """

    block: tuple[int, int] = (1, 1)
    n_m: tuple[int, int] | None = None

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Parse ``"unstructured"``, ``"RxC"`` or ``"N:M"``.

        Raises
        ------
        OptionError
            When `text` is none of these.
        """
        if text == "unstructured":
            return cls()
        if match := re.fullmatch(r"(\d{1,3}):(\d{1,3})", text, re.ASCII):
            n, m = int(match[1]), int(match[2])
            if not 0 < n < m:
                raise OptionError(
                    f"structure {text!r} keeps {n} of every {m} values",
                    hint="N must be smaller than M and not 0, for example 2:4",
                )
            return cls(n_m=(n, m))
        try:
            return cls(parse_block(text))
        except OptionError:
            raise OptionError(
                f"unknown structure {text!r}",
                hint="give unstructured, blocks of outputs x inputs such as 4x1, or N:M as in 2:4",
            ) from None


@dataclass(frozen=True)
class PrunedLayer:
    """One pruned layer: its sparsity before and after, and the structure found afterwards."""

    name: str
    op: str
    shape: tuple[int, int]
    before: float
    after: float
    structure: str


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
    """

    output: Path
    layers: tuple[PrunedLayer, ...]
    skipped: dict[str, str]

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


def prune_array(w: np.ndarray, sparsity: float, structure: str | Pattern) -> np.ndarray:
    """Return a weight with its least important values set to zero.

    Parameters
    ----------
    w : np.ndarray
        float32 ``[N, K]``: output features by input features.
    sparsity : float
        Share of blocks to set to zero, exact to one block; ties go in row-major order. Not used
        for N:M, which implies it.
    structure : str | Pattern
        What is pruned as a unit: see `Pattern`.

    Returns
    -------
    np.ndarray
        A new float32 ``[N, K]``. Values that were zero stay zero.
    """
    pattern = Pattern.parse(structure) if isinstance(structure, str) else structure
    if pattern.n_m:
        return _keep_n_of_m(w, *pattern.n_m)
    scores = _block_scores(w, pattern.block)
    return _masked(w, _Cut.at(scores, sparsity).keep(scores), pattern.block)


def prune(
    model: Any,
    output: str | os.PathLike[str],
    *,
    options: SourceOptions | None = None,
    sparsity: float | None = None,
    structure: str = "unstructured",
    scope: str = "uniform",
    layers: str | None = None,
    exclude: str | None = None,
    random_weights: bool = False,
    seed: int = 0,
) -> PruneReport:
    """Prune the MatMul, Gemm and Conv weights of a model by magnitude.

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
        ``"unstructured"``, blocks of outputs x inputs such as ``"4x1"``, or ``"2:4"``.
    scope : str
        ``"uniform"``: every layer gets this sparsity; ``"global"``: all layers together do, by
        one threshold.
    layers, exclude : str | None
        Regular expressions, searched in layer names: prune only these, all but these.
    random_weights : bool
        Replace the weights by random ones of the same scale first: how fast would such a model
        be?
    seed : int
        Of the random weights.

    Returns
    -------
    PruneReport
        Sparsity and structure by layer.

    Raises
    ------
    ModelError, OptionError, OutputError
        When the model cannot be read, an option does not fit it, or `output` cannot be written.
    """
    pattern = Pattern.parse(structure)
    share = _check_sparsity(sparsity, pattern, structure)
    _check_scope(scope, pattern, structure)
    source = open_source(model, options)
    as_onnx = isinstance(source, OnnxSource) or Path(output).suffix == ".onnx"
    pruned = _own_copy(source.as_onnx())
    chosen, skipped = _choose(pruned, layers, exclude)
    weights = _Weights(pruned, chosen, random_weights, seed)
    cut = None
    if scope == "global":
        scores = [_block_scores(weights[ref], pattern.block).ravel() for ref in chosen]
        cut = _Cut.at(np.concatenate(scores), share)
    done = []
    for ref in chosen:
        w = weights[ref]
        if cut is None:
            w = prune_array(w, share, pattern)
        else:
            w = _masked(w, cut.keep(_block_scores(w, pattern.block)), pattern.block)
        done.append(weights.replace(ref, w))
    if as_onnx:
        write_onnx(pruned, output, external=_is_external(source.as_onnx(), pruned))
    else:
        tensors = dict(stored_tensors(pruned.graph))
        values = {ref.initializer: as_array(tensors[ref.initializer]) for ref in chosen}
        source.write_pruned(values, Path(output))
    return PruneReport(Path(output), tuple(done), skipped)


class _Weights:
    """The chosen weights of a model as ``[N, K]`` matrices."""

    def __init__(
        self, model: onnx.ModelProto, refs: Sequence[WeightRef], random: bool, seed: int
    ) -> None:
        self._tensors = dict(stored_tensors(model.graph))
        self._seeds = {ref.layer: (seed, i) for i, ref in enumerate(refs)} if random else {}

    def __getitem__(self, ref: WeightRef) -> np.ndarray:
        w = canonical(ref, as_array(self._tensors[ref.initializer]))
        return _random_like(w, self._seeds[ref.layer]) if ref.layer in self._seeds else w

    def replace(self, ref: WeightRef, w: np.ndarray) -> PrunedLayer:
        tensor = self._tensors[ref.initializer]
        zeros = w.size - int(np.count_nonzero(as_array(tensor)))
        replace_data(tensor, stored(ref, w, tuple(tensor.dims)))
        found = analyse(w)
        before = zeros / max(w.size, 1)
        return PrunedLayer(ref.layer, ref.op, ref.shape, before, found.sparsity, found.label)


def _random_like(w: np.ndarray, seed: tuple[int, int]) -> np.ndarray:
    """Return normally distributed values of the same mean square, so that layers compare."""
    values = np.random.default_rng(seed).standard_normal(w.shape, dtype=np.float32)
    scale = np.sqrt(np.mean(np.square(w))) or np.float32(w.shape[1] ** -0.5)
    values *= scale
    return values


@dataclass
class _Cut:
    """Which scores go: all below a threshold, and the first `ties` that equal it."""

    threshold: float
    ties: int

    @classmethod
    def at(cls, scores: np.ndarray, share: float) -> _Cut:
        """Cut off `share` of the scores, to the nearest count."""
        count = round(share * scores.size)
        if not count:
            return cls(-1.0, 0)
        threshold = np.partition(scores, count - 1, axis=None)[count - 1]
        return cls(float(threshold), count - int(np.count_nonzero(scores < threshold)))

    def keep(self, scores: np.ndarray) -> np.ndarray:
        """Return the mask of the scores that stay; later calls go on counting ties."""
        threshold = np.float32(self.threshold)
        kept = scores > threshold
        tied = np.flatnonzero(scores == threshold)
        kept.flat[tied[self.ties :]] = True
        self.ties -= min(self.ties, tied.size)
        return kept


def _block_scores(w: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Return the float32 root mean square of each block.

    The L2 norm, since removing the blocks of least L2 norm changes the weight least in that
    norm; divided by the square root of the number of values, so that the smaller blocks at the
    edges compare with the others.
    """
    scores: np.ndarray
    if block == (1, 1):
        scores = np.abs(w)
        return scores
    (n, k), (r, c) = w.shape, block
    rows = np.minimum(r, n - np.arange(0, n, r))
    columns = np.minimum(c, k - np.arange(0, k, c))
    squares = reduce_blocks(np.square(w), block, np.add)
    squares /= np.outer(rows, columns)
    scores = np.sqrt(squares)
    return scores


def _masked(w: np.ndarray, keep: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Set the blocks that `keep` does not name to zero, in a copy."""
    for axis, size in enumerate(block):
        if size > 1:
            keep = np.repeat(keep, size, axis)
    pruned: np.ndarray = np.where(keep[: w.shape[0], : w.shape[1]], w, np.float32(0))
    return pruned


def _keep_n_of_m(w: np.ndarray, n: int, m: int) -> np.ndarray:
    """Keep the `n` largest magnitudes of every `m` consecutive inputs; the first of equals."""
    columns = w.shape[1]
    padded = np.pad(w, ((0, 0), (0, -columns % m)))
    groups = padded.reshape(-1, m)
    order = np.argsort(-np.abs(groups), axis=1, kind="stable")
    np.put_along_axis(groups, order[:, n:], 0, axis=1)
    return np.ascontiguousarray(padded[:, :columns])


def _check_sparsity(sparsity: float | None, pattern: Pattern, structure: str) -> float:
    if pattern.n_m:
        n, m = pattern.n_m
        implied = 1 - n / m
        if sparsity is not None and abs(sparsity - implied) > 1e-6:
            raise OptionError(
                f"sparsity {sparsity} contradicts structure {structure}, which implies {implied:g}",
                hint="leave the sparsity out",
            )
        return implied
    if sparsity is None:
        raise OptionError(f"structure {structure} needs a sparsity", hint="for example 0.9")
    if not 0 <= sparsity < 1:
        raise OptionError(
            f"sparsity {sparsity} is not in [0, 1)", hint="0.9 sets 90 % of the weights to zero"
        )
    return sparsity


def _check_scope(scope: str, pattern: Pattern, structure: str) -> None:
    if scope not in ("uniform", "global"):
        raise OptionError(f"unknown scope {scope!r}", hint="give uniform or global")
    if scope == "global" and pattern.n_m:
        raise OptionError(
            f"scope global does not fit structure {structure}, which is the same in every layer",
            hint="leave the scope out",
        )


def _own_copy(model: str | os.PathLike[str] | onnx.ModelProto) -> onnx.ModelProto:
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


def _choose(
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
        reasons = first_few(f"{layer}: {reason}" for layer, reason in skipped.items())
        raise OptionError(
            "no layer is left to prune" + (f" ({reasons})" if reasons else ""),
            hint=f"the model's layers are {first_few(ref.layer for ref in found)}",
        )
    return chosen, skipped


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
