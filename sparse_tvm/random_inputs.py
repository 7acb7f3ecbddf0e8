"""Random inputs for any model, the same ones for verifying, running and timing."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from sparse_tvm.spec import TensorSpec


def random_inputs(specs: Iterable[TensorSpec], seed: int = 0) -> dict[str, np.ndarray]:
    """Return one random array per input.

    Floating-point inputs are standard normal. Integer inputs are most often indices into tables
    of unknown size, so they are 0 or 1, except that masks (``mask`` in the name) are all ones and
    segment ids (``token_type``) all zeros, as there may be one segment only. Symbolic dimensions
    have size 1.
    """
    rng = np.random.default_rng(seed)
    return {spec.name: _random(spec, rng) for spec in specs}


def _random(spec: TensorSpec, rng: np.random.Generator) -> np.ndarray:
    dtype = np.dtype(spec.dtype)
    shape = tuple(1 if isinstance(dim, str) else dim for dim in spec.shape)
    if np.issubdtype(dtype, np.floating):
        return rng.standard_normal(shape).astype(dtype)
    if "mask" in spec.name.lower():
        return np.ones(shape, dtype)
    if "token_type" in spec.name.lower():
        return np.zeros(shape, dtype)
    return rng.integers(0, 2, shape).astype(dtype)
