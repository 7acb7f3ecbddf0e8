"""Compare an artifact with the model's own framework on the same random inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparse_tvm.backends.base import BackendTarget
from sparse_tvm.cpu import architecture, host_features
from sparse_tvm.emulation import EmulatedCrash, Emulator, NoEmulator
from sparse_tvm.errors import DeviceError, InputError, VerificationError
from sparse_tvm.frontends.importer.model import ImportedModel
from sparse_tvm.frontends.source import Source
from sparse_tvm.random_inputs import random_inputs, typical_sizes
from sparse_tvm.reference import cannot_run, max_abs_difference
from sparse_tvm.sparsity.calibration import calls_of
from sparse_tvm.targets import Target

Arrays = Mapping[str, np.ndarray]

LEAST_COSINE, LEAST_COSINE_QUANTISED = 0.9, 0.99
"""Of layers in low precision with float32's, and of quantised models, whose values may fall on the
other side of a rounding once in a while."""

TOLERANCE, TOLERANCE_16_BIT = 1e-4, 1e-2
"""Largest differences from models of float32, and from those that round to 16 bits on their way."""


class NotVerified(Exception):
    """The artifact cannot run here; the text says why."""


@dataclass(frozen=True)
class Feed:
    """One call's inputs, and where they are from if a difference is to tell (``" at batch 3"``)."""

    arrays: Arrays
    where: str = ""


def feeds_of(imported: ImportedModel, given: Arrays | None) -> list[Feed]:
    """What to compare on: the user's inputs, or random ones of a few sizes.

    Parameters
    ----------
    imported : ImportedModel
        The model.
    given : Mapping[str, np.ndarray] | None
        One call's inputs, or samples of a model that takes a fixed number at a time.

    Raises
    ------
    InputError
        When names, types or shapes are not the model's, or values are NaN or infinite.
    """
    if given is not None:
        return [Feed(each) for each in calls_of(given, imported.inputs, "the inputs to verify on")]
    return [
        Feed(random_inputs(imported.inputs, sizes=sizes), _place(sizes))
        for sizes in _sizes_to_verify(imported)
    ]


def _place(sizes: Mapping[str, int]) -> str:
    at = ", ".join(f"{dim} {size}" for dim, size in sizes.items())
    return at and f" at {at}"


def compare_with_reference(
    artifact: Path, source: Source, target: BackendTarget, bound: Bound, feeds: Sequence[Feed]
) -> dict[str, Any]:
    """Run both, an artifact for another architecture in an emulator, and compare every output.

    Returns
    -------
    dict[str, Any]
        What the manifest says about it.

    Raises
    ------
    VerificationError
        When an output is worse than the bound, or the artifact fails.
    NotVerified
        When this machine can neither run nor emulate its code.
    """
    outputs, where = _run(artifact, [feed.arrays for feed in feeds], target)
    reference = source.reference(threads=1)
    differences: dict[str, float] = {}
    similarities: dict[str, Similarity] = {}
    for feed, found in zip(feeds, outputs, strict=True):
        expected = reference.run(feed.arrays, list(found))
        for name, whole in found.items():
            output, known = reference.compared(feed.arrays, whole, expected[name])
            difference = max_abs_difference(output, known)
            if bound.min_cosine is None:
                bound.check_difference(name, difference, known, reference.engine, feed.where)
            else:
                similar = Similarity.of(output, known)
                bound.check_cosine(name, similar.cosine, reference.engine, feed.where)
                similarities[name] = similar.with_more(similarities.get(name))
            differences[name] = max(difference, differences.get(name, 0.0))
    found_similar = {name: similar.as_json() for name, similar in similarities.items()}
    return {
        "reference": f"{reference.engine} {reference.version}",
        "tolerance": bound.tolerance,
        "max_abs_diff": differences,
        **({"similarity": found_similar} if similarities else {}),
        **({"emulated": where} if where else {}),
    }


@dataclass(frozen=True)
class Bound:
    """How far outputs may be from the reference's.

    Attributes
    ----------
    tolerance : float
        Largest absolute difference, relative to the output's largest value if that is above 1.
    min_cosine : float | None
        For layers in low precision, instead of the tolerance: the least cosine of any row of an
        output.
    """

    tolerance: float
    min_cosine: float | None = None

    def check_difference(
        self, name: str, difference: float, expected: np.ndarray, engine: str, at: str
    ) -> None:
        """Refuse a difference beyond the tolerance."""
        limit = self.tolerance * max(1.0, float(np.abs(expected).max(initial=0.0)))
        if not difference <= limit:
            raise VerificationError(
                f"output {name} differs from {engine}'s by up to {difference:.3g}{at}, "
                f"more than the tolerance {limit:.3g}",
                hint="nothing was written; --no-verify or a larger --tolerance accepts it",
            )

    def check_cosine(self, name: str, cosine: float, engine: str, at: str) -> None:
        """Refuse a cosine below the least."""
        if self.min_cosine is not None and not cosine >= self.min_cosine:
            raise VerificationError(
                f"output {name} has a cosine of {cosine:.4f} with {engine}'s{at}, "
                f"less than {self.min_cosine}",
                hint="nothing was written; use a higher --precision, for some layers too "
                "(--layer 'REGEX=@bf16'), or a smaller --min-cosine",
            )


@dataclass(frozen=True)
class Similarity:
    """How near outputs in low precision are, row by row along the last axis.

    Attributes
    ----------
    cosine : float
        The least of any row; a pair of rows of zeros has 1.
    values, differences : float
        How many values there are, and the sum of their absolute differences.
    rows, alike : int
        Rows of outputs ``[rows, classes]``, and in how many the largest class is the same; 0 for
        other outputs.
    """

    cosine: float
    values: int
    differences: float
    rows: int
    alike: int

    @classmethod
    def of(cls, output: np.ndarray, expected: np.ndarray) -> Similarity:
        """Compare an output with what is expected."""
        width = expected.shape[-1] if expected.ndim else 1
        ours, theirs = (np.asarray(a, np.float64).reshape(-1, width) for a in (output, expected))
        products = (ours * theirs).sum(axis=1)
        lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
        equal = (ours == theirs).all(axis=1)
        cosines = np.where(equal, 1.0, products / np.where(lengths > 0, lengths, 1))
        classes = expected.ndim == 2 and width > 1
        alike = (ours.argmax(axis=1) == theirs.argmax(axis=1)).sum() if classes else 0
        difference = float(np.abs(ours - theirs).sum())
        least = float(cosines.min(initial=1.0))
        return cls(least, ours.size, difference, len(ours) if classes else 0, int(alike))

    def with_more(self, other: Similarity | None) -> Similarity:
        """Of the rows of both."""
        if other is None:
            return self
        return Similarity(
            min(self.cosine, other.cosine),
            self.values + other.values,
            self.differences + other.differences,
            self.rows + other.rows,
            self.alike + other.alike,
        )

    def as_json(self) -> dict[str, float]:
        """As the manifest has it."""
        found = {
            "mean_abs_diff": self.differences / self.values if self.values else 0.0,
            "cosine": self.cosine,
        }
        return {**found, "top1": self.alike / self.rows} if self.rows else found


def _run(
    artifact: Path, inputs: Sequence[Arrays], target: BackendTarget
) -> tuple[list[dict[str, np.ndarray]], str | None]:
    """Return the outputs, and on which emulated CPU they were computed, if so."""
    if not isinstance(target, Target) or target.architecture == architecture():
        missing = set(target.features) - host_features() if isinstance(target, Target) else set()
        if missing:
            raise NotVerified(f"this machine's CPU lacks {', '.join(sorted(missing))}")
        from sparse_tvm.runtime import load

        try:
            model = load(artifact)
        except DeviceError as error:
            raise NotVerified(error.message) from None
        try:
            return [model.run(each) for each in inputs], None
        except InputError as error:  # what is read depends on them
            raise cannot_run("its artifact", "the model", error) from None
    try:
        emulator = Emulator.of(target)
        return emulator.run(artifact, inputs), f"{emulator.program}, {emulator.cpu}"
    except NoEmulator as reason:
        raise NotVerified(f"{target.architecture} code cannot run here: {reason}") from None
    except EmulatedCrash as crash:
        raise VerificationError(
            f"the artifact fails in an emulator of {target.name}: {crash}",
            hint="nothing was written; --no-verify accepts it",
        ) from None


def _sizes_to_verify(imported: ImportedModel) -> list[dict[str, int]]:
    """Return a few sizes of the symbolic dimensions: small and odd, and some whole tiles."""
    few = typical_sizes(imported.inputs, imported.bounds, first=1, others=7)
    more = typical_sizes(imported.inputs, imported.bounds, first=3, others=33)
    return [few, more] if few else [{}]
