"""Windows that move over the last axes of a tensor: what ONNX says of them by attributes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparse_tvm.frontends.importer.rules import Node
from sparse_tvm.frontends.importer.sizes import Size


@dataclass(frozen=True)
class Windows:
    """A kernel's size, and how it moves.

    Attributes
    ----------
    kernel, strides, dilations : list[int]
        By axis.
    pads : list[int]
        Those in front of all axes, then those behind.
    """

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    pads: list[int]

    @classmethod
    def of(cls, node: Node, kernel: Sequence[int]) -> Windows:
        """Read a node's attributes, which all have defaults."""
        given, ones = node.attributes, [1] * len(kernel)
        strides, dilations = (list(given.get(name, ones)) for name in ("strides", "dilations"))
        pads = list(given.get("pads", [0] * 2 * len(kernel)))
        return cls(list(kernel), strides, dilations, pads)

    def counts(self, node: Node, size: Sequence[Size]) -> list[Size]:
        """Return how many windows there are along each axis of an image of this size."""
        rank = len(self.kernel)
        return [
            node.sizes.floordiv(
                extent
                + self.pads[axis]
                + self.pads[axis + rank]
                - self.dilations[axis] * (self.kernel[axis] - 1)
                - 1,
                self.strides[axis],
            )
            + 1
            for axis, extent in enumerate(size)
        ]
