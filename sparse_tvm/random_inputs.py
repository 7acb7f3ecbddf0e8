"""Random inputs for any model, the same ones for verifying, running and timing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from sparse_tvm.errors import OptionError
from sparse_tvm.spec import TensorSpec, multiples_of, size_of, symbols_of

if TYPE_CHECKING:
    from sparse_tvm.frontends.input_shapes import InputShapes

_UNKNOWN_RANGE = (0, 2)  # of integers that are indices into tables of unknown size


def random_inputs(
    specs: Iterable[TensorSpec], seed: int = 0, sizes: Mapping[str, int] | None = None
) -> dict[str, np.ndarray]:
    """Return one random array per input.

    Floating-point inputs are standard normal, and integers spread over the values that the model
    can take, or tells apart, where it says so; else they are 0 or 1. Masks (``mask`` in the name)
    are ones, but rows of two-dimensional masks may end in zeros, at most half of them; segment ids
    (``token_type``) of unknown range are zeros, as there may be one segment only.

    Parameters
    ----------
    specs : Iterable[TensorSpec]
        The model's inputs.
    seed : int
        Other seeds give other inputs.
    sizes : Mapping[str, int] | None
        Sizes of symbolic dimensions; those not given are 1.
    """
    rng = np.random.default_rng(seed)
    return {spec.name: _random(spec, sizes or {}, rng) for spec in specs}


def typical_sizes(
    specs: Iterable[TensorSpec],
    bounds: Mapping[str, tuple[int, int]],
    *,
    first: int = 1,
    others: int = 128,
) -> dict[str, int]:
    """Choose sizes for symbolic dimensions: `first` for those that lead an input, or `others`.

    Parameters
    ----------
    specs : Iterable[TensorSpec]
        The model's inputs.
    bounds : Mapping[str, tuple[int, int]]
        Smallest and largest sizes, by dimension, where there are; they limit the choice.
    first, others : int
        Of one example and 128 tokens, unless told otherwise.
    """
    specs = list(specs)
    sizes: dict[str, int] = {}
    multiples = multiples_of(specs)
    for spec in specs:
        for axis, dim in enumerate(spec.shape):
            for symbol in symbols_of(dim):
                low, high = bounds.get(symbol, (1, others))
                wanted = others if axis else first
                multiple = multiples.get(symbol, 1)
                size = min(max(low, wanted), max(high, low)) // multiple * multiple
                sizes.setdefault(symbol, max(size, -(-low // multiple) * multiple))
    return sizes


def chosen_sizes(
    specs: Sequence[TensorSpec],
    bounds: Mapping[str, tuple[int, int]],
    shapes: InputShapes,
    sizes: Mapping[str, int],
) -> dict[str, int]:
    """Return the size of every symbolic dimension: as `shapes` or `sizes` say, else a typical one.

    Raises
    ------
    OptionError
        As :func:`sizes_of`, and when `sizes` has a dimension that is none of `specs`.
    """
    chosen = {**typical_sizes(specs, bounds), **sizes_of(specs, shapes)}
    for dimension in sizes:
        if dimension not in chosen:
            raise OptionError(
                f"--shape: the model has no symbolic dimension {dimension!r}",
                hint=f"it has {', '.join(chosen) or 'none'}",
            )
    return {**chosen, **sizes}


def sizes_of(specs: Iterable[TensorSpec], shapes: InputShapes) -> dict[str, int]:
    """Return the sizes that `shapes` gives to the symbolic dimensions of `specs`.

    Raises
    ------
    OptionError
        When there is no such input, or its shape is another one.
    """
    known = {spec.name: spec for spec in specs}
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        if name not in known:
            inputs = ", ".join(map(str, known.values()))
            raise OptionError(f"--shape: the model has no input {name!r}", hint=f"it has {inputs}")
        dims = known[name].shape
        fits = len(shape) == len(dims) and all(isinstance(size, int) for size in shape)
        for size, dim in zip(shape, dims, strict=True) if fits else ():
            if isinstance(size, int) and isinstance(dim, str) and symbols_of(dim) == (dim,):
                sizes.setdefault(dim, size)
            if set(symbols_of(dim)) <= sizes.keys():
                fits = fits and size == size_of(dim, sizes)
        if not fits:
            given = ",".join(map(str, shape))
            raise OptionError(f"--shape {name}:{given} is no shape of {known[name]}")
    return sizes


def _random(spec: TensorSpec, sizes: Mapping[str, int], rng: np.random.Generator) -> np.ndarray:
    dtype = np.dtype(spec.dtype)
    shape = tuple(size_of(dim, sizes) for dim in spec.shape)
    if np.issubdtype(dtype, np.floating):
        return rng.standard_normal(shape).astype(dtype)
    if "mask" in spec.name.lower():
        return _mask(shape, rng).astype(dtype)
    values = spec.values or spec.typical
    if "token_type" in spec.name.lower() and values is None:
        return np.zeros(shape, dtype)
    low, high = values or _UNKNOWN_RANGE
    return rng.integers(low, high, shape).astype(dtype)


def _mask(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Return ones, with zeros at the end of about every other row."""
    if len(shape) != 2:
        return np.ones(shape)
    rows, columns = shape
    padding = rng.integers(0, columns // 2 + 1, rows) * rng.integers(0, 2, rows)
    return np.arange(columns) < (columns - padding)[:, None]
