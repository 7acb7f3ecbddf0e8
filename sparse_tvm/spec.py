"""What a model's input or output looks like, shared by front ends, artifacts and the runtime."""

from __future__ import annotations

from dataclasses import dataclass


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
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{', '.join(map(str, self.shape))}]"
