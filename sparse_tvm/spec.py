"""What a model's input or output looks like, shared by front ends, artifacts and the runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type and shape of one input or output.

    Parameters
    ----------
    name : str
        The name in the source model.
    dtype : str
        NumPy's name of the element type, such as ``"float32"``.
    shape : tuple[int | str, ...]
        One entry per dimension; a string is a symbolic dimension.
    values : tuple[int, int] | None
        For an integer input whose elements are indices into a table: the smallest, and one more
        than the largest.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    values: tuple[int, int] | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{', '.join(map(str, self.shape))}]"

    def as_json(self) -> dict[str, Any]:
        """Return the entry of a manifest."""
        entry = {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}
        return entry if self.values is None else {**entry, "range": list(self.values)}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> TensorSpec:
        """Read the entry of a manifest."""
        values = tuple(entry["range"]) if "range" in entry else None
        return cls(entry["name"], entry["dtype"], tuple(entry["shape"]), values)
