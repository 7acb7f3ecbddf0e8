"""Sparse weights as other libraries store them, decoded to one dense array at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

BITMASK = "compressed-tensors bitmask"
BITMASK_2_4 = "compressed-tensors 2:4 bitmask"

_SEMI_STRUCTURED = "SparseSemiStructuredTensor"
_PARTS = ("compressed", "bitmask", "shape", "row_offsets")


def torch_layout(tensor: Any) -> str | None:
    """Name the sparse layout of a ``torch.Tensor``; None when it is dense.

    >>> torch_layout(torch.eye(4).to_sparse_csr())  # doctest: +SKIP
    'torch sparse CSR'
    """
    if any(base.__name__ == _SEMI_STRUCTURED for base in type(tensor).__mro__):
        return "torch semi-structured 2:4"
    layout = str(getattr(tensor, "layout", "")).removeprefix("torch.")
    if not layout.startswith("sparse"):
        return None
    name = layout.removeprefix("sparse").strip("_").upper() or "COO"
    block = "x".join(map(str, tensor.values().shape[1:3])) if name in ("BSR", "BSC") else ""
    return f"torch sparse {name} {block}".rstrip()


def torch_to_dense(tensor: Any) -> Any:
    """Return a sparse tensor, of any layout that `torch_layout` names, as a dense one."""
    if not any(base.__name__ == _SEMI_STRUCTURED for base in type(tensor).__mro__):
        return tensor.detach().to_dense()
    if tensor.packed is None:
        raise ValueError("the semi-structured tensor holds no packed values")
    if tensor.meta is None:  # cuSPARSELt keeps values and metadata in one opaque buffer
        return tensor.to_dense()
    from torch.sparse._semi_structured_conversions import (
        sparse_semi_structured_to_dense_cutlass,
    )

    return sparse_semi_structured_to_dense_cutlass(tensor.packed, tensor.meta)


def find_bitmasks(names: set[str]) -> set[str]:
    """Return the weights of a checkpoint that are stored as bitmask and values.

    >>> sorted(find_bitmasks({"a.weight.compressed", "a.weight.bitmask", "a.weight.shape", "b"}))
    ['a.weight']
    """
    suffix = ".bitmask"
    stems = {name.removesuffix(suffix) for name in names if name.endswith(suffix)}
    return {stem for stem in stems if f"{stem}.compressed" in names}


def bitmask_parts(name: str, names: set[str]) -> list[str]:
    """Return the stored tensors that make up one weight."""
    return [f"{name}.{part}" for part in _PARTS if f"{name}.{part}" in names]


def decode_bitmask(read: Callable[[str], np.ndarray], name: str) -> np.ndarray:
    """Decode a weight stored by compressed-tensors as ``sparse-bitmask`` or its 2:4 form.

    Parameters
    ----------
    read : Callable[[str], np.ndarray]
        Returns a stored tensor by name.
    name : str
        The weight: ``<name>.compressed`` has its values in row-major order and
        ``<name>.bitmask`` one bit per element, each row padded to bytes, least bit first.

    Returns
    -------
    np.ndarray
        The dense weight, of the values' type.

    Raises
    ------
    ValueError
        When the parts contradict each other.
    """
    values, packed = read(f"{name}.compressed"), read(f"{name}.bitmask")
    shape = tuple(int(size) for size in read(f"{name}.shape"))
    packed = packed.reshape(-1, packed.shape[-1])
    bits = np.unpackbits(packed, axis=-1, bitorder="little", count=shape[-1]).astype(bool)
    if bits.size != np.prod(shape) or int(bits.sum()) != values.size:
        raise ValueError(f"{name}: {values.size} values do not fit its bitmask and shape {shape}")
    dense = np.zeros(shape, values.dtype)
    dense.reshape(bits.shape)[bits] = values.ravel()
    return dense


def encode_bitmask(name: str, dense: np.ndarray) -> Mapping[str, np.ndarray]:
    """Return the tensors that store a matrix as compressed-tensors' ``sparse-bitmask`` does."""
    bits = dense != 0
    counts = bits.sum(axis=-1, dtype=np.int64).ravel()
    return {
        f"{name}.compressed": dense[bits],
        f"{name}.bitmask": np.packbits(bits, axis=-1, bitorder="little"),
        f"{name}.shape": np.array(dense.shape, np.int64),
        f"{name}.row_offsets": np.concatenate([[0], np.cumsum(counts)[:-1]]),
    }


def bitmask_origin(dense: np.ndarray, sparsity_format: str) -> str:
    """Name what stored a decoded weight, by the checkpoint's own word for its format."""
    return BITMASK_2_4 if "24" in sparsity_format and dense.ndim == 2 else BITMASK


def decode_tflite(
    values: np.ndarray, shape: tuple[int, ...], order: list[int], blocks: list[int], dims: list[Any]
) -> np.ndarray:
    """Expand a TensorFlow Lite sparse tensor.

    Parameters
    ----------
    values : np.ndarray
        The stored values.
    shape : tuple[int, ...]
        The dense shape.
    order : list[int]
        Traversal order: original dimensions first, then block dimensions.
    blocks : list[int]
        ``block_map``: the original dimension that each block dimension splits.
    dims : list
        Per traversed dimension an ``int`` (dense, its size) or ``(segments, indices)``.
    """
    rank = len(shape)
    sizes = [d if isinstance(d, int) else None for d in dims]
    block_sizes = {blocks[o - rank]: sizes[level] for level, o in enumerate(order) if o >= rank}
    positions = np.zeros((1, len(dims)), np.int64)  # coordinates by traversed dimension
    slots = np.zeros(1, np.int64)  # position in the storage of the level above
    for level, dim in enumerate(dims):
        if isinstance(dim, int):
            count = np.full(len(slots), dim)
            start = slots * dim
            coordinates = None
        else:
            segments, coordinates = dim
            start, count = segments[slots], segments[slots + 1] - segments[slots]
        parents = np.repeat(np.arange(len(slots)), count)
        within = np.arange(len(parents)) - np.repeat(np.cumsum(count) - count, count)
        slots = start[parents] + within
        positions = positions[parents]
        positions[:, level] = within if coordinates is None else coordinates[slots]
    index = np.zeros((len(slots), rank), np.int64)
    for level, o in enumerate(order):
        if o < rank:
            index[:, o] += positions[:, level] * (block_sizes.get(o) or 1)
        else:
            index[:, blocks[o - rank]] += positions[:, level]
    dense = np.zeros(shape, values.dtype)
    inside = np.all(index < np.array(shape), axis=1)  # blocks may overhang
    dense[tuple(index[inside].T)] = values[slots[inside]]
    return dense
