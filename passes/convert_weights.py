"""Weight conversion: what each weight's stored form is, why, and the arrays of that form.

For every weight, the formats the user allows are compared by the cycles the cost model predicts
for this weight's real count of stored blocks; dense always takes part, so a layer is never made
sparse where that would make it slower. The user's rules win over the prediction.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from sparse_tvm.errors import OptionError
from sparse_tvm.schedules.cpu.cost import dense_rows, matmul_cycles, part_counts
from sparse_tvm.schedules.cpu.matmul import JOBS_PER_GROUP, WeightLayout
from sparse_tvm.schedules.cpu.simd import Simd
from sparse_tvm.sparsity.analysis import Structure
from sparse_tvm.sparsity.formats import BSR, occupied_blocks, parse_block
from sparse_tvm.targets import Target

FORMATS = ("auto", "dense", "csr", "bsr")
_AUTO_BLOCKS = ((2, 1), (4, 1), (8, 1), (16, 1))
_MAX_BLOCK_ROWS = 16
_MARGIN = 1.1
"""How much faster a sparse form must be predicted: never slower than dense, on more threads too,
which share what their weights stream through."""


@dataclass(frozen=True)
class LayerRule:
    """One ``--layer REGEX=FORMAT`` option."""

    pattern: re.Pattern[str]
    format: str
    block: tuple[int, int] | None
    text: str


@dataclass(frozen=True)
class FormatOptions:
    """How the user wants weights stored.

    Attributes
    ----------
    format : str
        ``auto`` chooses by predicted cost; the others are for every layer.
    block : tuple[int, int] | None
        Rows x columns of BSR blocks; None lets the cost model choose.
    threshold : float | None
        Layers with a smaller share of zeros stay dense.
    rules : tuple[LayerRule, ...]
        Exceptions by layer name; the last that matches counts.
    """

    format: str = "auto"
    block: tuple[int, int] | None = None
    threshold: float | None = None
    rules: tuple[LayerRule, ...] = field(default=())

    @classmethod
    def parse(
        cls, format: str, block: str | None, threshold: float | None, rules: Sequence[str]
    ) -> FormatOptions:
        """Check the options of the command line.

        Raises
        ------
        OptionError
            When a value is unknown or contradicts another.
        """
        if format not in FORMATS:
            raise OptionError(f"unknown format {format!r}", hint=f"one of {', '.join(FORMATS)}")
        if block is not None and format not in ("auto", "bsr"):
            raise OptionError(f"--block {block} needs --format bsr or auto, not {format}")
        if threshold is not None and not 0 <= threshold <= 1:
            raise OptionError(
                f"threshold {threshold} is not a share of zeros", hint="a number from 0 to 1"
            )
        size = parse_block(block) if block else None
        return cls(format, size, threshold, tuple(_parse_rule(rule) for rule in rules))

    def rule_for(self, layer: str) -> LayerRule | None:
        """The last rule that matches the layer."""
        return next((r for r in reversed(self.rules) if r.pattern.search(layer)), None)


def _parse_rule(text: str) -> LayerRule:
    """Parse ``REGEX=dense|csr|bsr[:RxC]``."""
    expression, equals, wanted = text.rpartition("=")
    format, _, block = wanted.partition(":")
    if not equals or format not in ("dense", "csr", "bsr") or (block and format != "bsr"):
        raise OptionError(
            f"layer rule {text!r} is not REGEX=FORMAT", hint="for example 'query|key=bsr:4x1'"
        )
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise OptionError(f"layer rule {text!r}: bad regular expression: {error}") from error
    return LayerRule(pattern, format, parse_block(block) if block else None, text)


@dataclass(frozen=True)
class Choice:
    """The form chosen for one weight."""

    layout: WeightLayout
    reason: str
    asked_block: tuple[int, int] | None = None


def choose(
    layer: str,
    w: np.ndarray,
    structure: Structure,
    options: FormatOptions,
    target: Target,
    in_parts: bool = True,
) -> Choice:
    """Choose the stored form of the weight ``[N, K]`` of one layer.

    `in_parts` tells whether its kernel takes a sparse weight in parts of columns.
    """
    simd = Simd.of(target)
    n, k = w.shape
    dense = WeightLayout("dense", (dense_rows(n, simd), 1))

    def cycles(layout: WeightLayout, stored: int) -> float:
        return matmul_cycles((n, k), layout, stored, target)

    mask = w != 0
    dense_cycles = cycles(dense, -(-n // dense.block[0]) * k)

    def priced(layout: WeightLayout) -> tuple[float, WeightLayout]:
        """The layout in as many parts as cost least."""
        stored = int(np.count_nonzero(occupied_blocks(mask, layout.block)))
        counts = part_counts(k, layout.block[0], target) if in_parts else [1]
        split = [replace(layout, parts=count) for count in counts]
        return min(((cycles(layout, stored), layout) for layout in split), key=lambda p: p[0])

    def candidates(format: str, block: tuple[int, int] | None) -> list[WeightLayout]:
        if format == "csr":
            return [WeightLayout("csr", (1, 1))]
        if block is not None:
            return [WeightLayout("bsr", _kernel_block(block, (n, k)))]
        blocks = [*_AUTO_BLOCKS, *([structure.block] if structure.block else [])]
        sizes = dict.fromkeys(_kernel_block(size, (n, k)) for size in blocks)
        return [WeightLayout("bsr", size) for size in sizes]

    def best(layouts: list[WeightLayout]) -> tuple[WeightLayout, str]:
        cost, layout = min(map(priced, layouts), key=lambda pair: pair[0])
        return layout, f"predicted {dense_cycles / cost:.1f}x dense"

    rule = options.rule_for(layer)
    if rule is not None:
        if rule.format == "dense":
            return Choice(dense, f"rule {rule.text}")
        layout, prediction = best(candidates(rule.format, rule.block))
        return Choice(layout, f"rule {rule.text}; {prediction}", rule.block)
    if options.format == "dense":
        return Choice(dense, "--format dense")
    if options.threshold is not None and structure.sparsity < options.threshold:
        return Choice(
            dense, f"sparsity {structure.sparsity:.1%} is below the threshold {options.threshold}"
        )
    if options.format != "auto":
        layout, prediction = best(candidates(options.format, options.block))
        return Choice(layout, f"--format {options.format}; {prediction}", options.block)
    if structure.nnz == mask.size:
        return Choice(dense, "no zeros")
    layout, prediction = best(
        [*([] if options.block else candidates("csr", None)), *candidates("bsr", options.block)]
    )
    if priced(layout)[0] * _MARGIN >= dense_cycles:
        return Choice(dense, f"sparsity {structure.sparsity:.1%} does not pay: {prediction}")
    return Choice(layout, prediction, options.block)


def _kernel_block(block: tuple[int, int], shape: tuple[int, int]) -> tuple[int, int]:
    """The largest divisor of a block that fits the register file and the weight."""
    rows, columns = block
    limit = min(_MAX_BLOCK_ROWS, shape[0])
    rows = next(r for r in range(min(rows, limit), 0, -1) if rows % r == 0)
    columns = next(c for c in range(min(columns, 8, shape[1]), 0, -1) if columns % c == 0)
    return rows, columns


def stored_arrays(w: np.ndarray, layout: WeightLayout) -> dict[str, np.ndarray]:
    """The kernel's arguments for the weight ``[N, K]`` (see ``schedules.cpu.matmul``)."""
    rows, columns = layout.block
    n, k = w.shape
    if not layout.sparse:
        padded = np.pad(w, ((0, -n % rows), (0, 0))) if n % rows else w
        blocks = padded.reshape(-1, rows, k).transpose(0, 2, 1)
        return {"data": np.ascontiguousarray(blocks, np.float32)}
    bsr = BSR.from_dense(w, layout.block)
    first_column = bsr.indices * columns
    data = bsr.data.transpose(0, 2, 1)
    overhang = first_column + columns - k
    if (overhang > 0).any():
        # The last block column ends at the weight's edge instead of beyond it.
        data, first_column = data.copy(), np.minimum(first_column, k - columns)
        for i in np.flatnonzero(overhang > 0):
            data[i] = np.roll(data[i], overhang[i], axis=0)
    if not data.shape[0]:  # an all-zero weight: kernels want at least one element
        data, first_column = np.zeros((1, columns, rows), np.float32), np.zeros(1, np.int32)
    return {
        "data": np.ascontiguousarray(data, np.float32),
        "indices": first_column.astype(np.int32),
        "indptr": bsr.indptr.astype(np.int32),
        "partition": balanced_partition(bsr.indptr),
    }


def split_arrays(w: np.ndarray, layout: WeightLayout) -> dict[str, np.ndarray]:
    """The arguments of ``schedules.cpu.matmul`` for the weight ``[N, K]``.

    Those of `stored_arrays`; a sparse weight's blocks part by part, in each part job by job, and
    in each job the block rows by their number of blocks, with ``rows`` to tell which they are.
    """
    arrays = stored_arrays(w, layout)
    if not layout.sparse:
        return arrays
    indptr, partition, k = arrays["indptr"], arrays["partition"], w.shape[1]
    block_rows = len(indptr) - 1
    row_of = np.repeat(np.arange(block_rows), np.diff(indptr))
    part_of = arrays["indices"][: len(row_of)].astype(np.int64) * layout.parts // k
    counts = np.zeros((layout.parts, block_rows), np.int64)
    np.add.at(counts, (part_of, row_of), 1)
    job_of = np.searchsorted(partition, np.arange(block_rows), side="right")
    rows = np.stack([np.lexsort((of_part, job_of)) for of_part in counts])
    place = np.empty_like(rows)
    np.put_along_axis(place, rows, np.arange(block_rows)[None], axis=1)
    order = np.lexsort((place[part_of, row_of], part_of))
    if not len(order):
        order = np.arange(len(arrays["data"]))  # the one block of a weight without any
    ends = np.cumsum(np.take_along_axis(counts, rows, axis=1))
    return {
        "data": np.ascontiguousarray(arrays["data"][order]),
        "indices": arrays["indices"][order].astype(layout.index_dtype(k)),
        "indptr": np.concatenate([[0], ends]).astype(np.int32),
        "rows": rows.astype(np.int32).ravel(),
        "partition": partition,
    }


def balanced_partition(indptr: np.ndarray, jobs: int = JOBS_PER_GROUP) -> np.ndarray:
    """First block row of each job, so that all jobs have about equally much to do.

    Returns
    -------
    np.ndarray
        int32 ``[jobs + 1]``; a block row counts as its stored blocks and two more.
    """
    work = indptr.astype(np.int64) + 2 * np.arange(len(indptr))
    bounds = np.searchsorted(work, np.linspace(0, work[-1], jobs + 1))
    bounds[0], bounds[-1] = 0, len(indptr) - 1
    return np.maximum.accumulate(bounds).astype(np.int32)
