"""Windows that move over the last axes of a tensor: what ONNX says of them by attributes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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

    def same(self, axis: int, extent: Size) -> int:
        """Return what is padded along an axis for a window at each step of it."""
        span = self.dilations[axis] * (self.kernel[axis] - 1) + 1
        step = self.strides[axis]
        if step == 1:
            return span - 1
        if not isinstance(extent, int):
            raise ValueError("how much auto_pad pads depends on sizes, which --input-shape fixes")
        return max((-(-extent // step) - 1) * step + span - extent, 0)

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


def with_pads(node: Node, kernel: Sequence[int]) -> dict[str, Any]:
    """Return a node's attributes with ``pads`` instead of ``auto_pad``.

    Raises
    ------
    ValueError
        When how much is padded depends on symbolic sizes.
    """
    attributes = dict(node.attributes)
    auto = attributes.pop("auto_pad", b"NOTSET")
    if auto in (b"SAME_UPPER", b"SAME_LOWER"):
        windows = Windows.of(node, kernel)
        total = [windows.same(axis, size) for axis, size in enumerate(node.shape(0)[2:])]
        less, more = [pad // 2 for pad in total], [pad - pad // 2 for pad in total]
        attributes["pads"] = [*less, *more] if auto == b"SAME_UPPER" else [*more, *less]
    elif auto == b"VALID":
        attributes.pop("pads", None)
    return attributes
