"""Compare an artifact with the model's own framework on the same random inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparse_tvm.backends.base import BackendTarget
from sparse_tvm.cpu import architecture, host_features
from sparse_tvm.emulation import EmulatedCrash, Emulator, NoEmulator
from sparse_tvm.errors import VerificationError
from sparse_tvm.frontends.importer.model import ImportedModel
from sparse_tvm.frontends.source import Source
from sparse_tvm.random_inputs import random_inputs, typical_sizes
from sparse_tvm.reference import max_abs_difference
from sparse_tvm.targets import Target

Arrays = Mapping[str, np.ndarray]


class NotVerified(Exception):
    """The artifact cannot run here; the text says why."""


def compare_with_reference(
    artifact: Path, imported: ImportedModel, source: Source, target: BackendTarget, tolerance: float
) -> dict[str, Any]:
    """Run both, an artifact for another architecture in an emulator, and compare every output.

    Returns
    -------
    dict[str, Any]
        What the manifest says about it.

    Raises
    ------
    VerificationError
        When an output differs by more than the tolerance, or the artifact fails.
    NotVerified
        When this machine can neither run nor emulate its code.
    """
    sizes = _sizes_to_verify(imported)
    inputs = [random_inputs(imported.inputs, sizes=each) for each in sizes]
    outputs, where = _run(artifact, inputs, target)
    reference = source.reference(threads=1)
    differences: dict[str, float] = {}
    for i, found in enumerate(outputs):
        expected = reference.run(inputs[i], list(found))
        for name, output in found.items():
            difference = max_abs_difference(output, expected[name])
            limit = tolerance * max(1.0, float(np.abs(expected[name]).max(initial=0.0)))
            if not difference <= limit:
                at = ", ".join(f"{dim} {size}" for dim, size in sizes[i].items())
                raise VerificationError(
                    f"output {name} differs from {reference.engine}'s by up to {difference:.3g}"
                    f"{at and f' at {at}'}, more than the tolerance {limit:.3g}",
                    hint="nothing was written; --no-verify or a larger --tolerance accepts it",
                )
            differences[name] = max(difference, differences.get(name, 0.0))
    return {
        "reference": f"{reference.engine} {reference.version}",
        "tolerance": tolerance,
        "max_abs_diff": differences,
        **({"emulated": where} if where else {}),
    }


def _run(
    artifact: Path, inputs: Sequence[Arrays], target: BackendTarget
) -> tuple[list[dict[str, np.ndarray]], str | None]:
    """Return the outputs, and on which emulated CPU they were computed, if so."""
    if not isinstance(target, Target) or target.architecture == architecture():
        missing = set(target.features) - host_features() if isinstance(target, Target) else set()
        if missing:
            raise NotVerified(f"this machine's CPU lacks {', '.join(sorted(missing))}")
        from sparse_tvm.runtime import load

        model = load(artifact)
        return [model.run(each) for each in inputs], None
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
