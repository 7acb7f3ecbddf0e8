"""What happens to an image's sums in registers before they are stored in planes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.operators import Activation, Bias, Clamp, Residual, Step
from sparse_tvm.schedules.cpu.lane_tiles import (
    Buffer,
    Expr,
    argument,
    prefetch,
    ramp,
    scalar,
    splat,
)
from sparse_tvm.schedules.cpu.plane_code import Extents, clear_border, flat, masked
from sparse_tvm.schedules.cpu.planes import Planes
from sparse_tvm.schedules.cpu.simd import LANES, Simd
from sparse_tvm.schedules.cpu.vector_math import ACTIVATIONS, constant


class ImageOutput:
    """An output in planes, and the steps of its epilogue.

    A padded image is masked last, whatever the steps made of its padding.
    """

    def __init__(
        self,
        batch: Expr,
        channels: int,
        target: Planes,
        epilogue: Sequence[Step],
        residuals: Sequence[Planes],
        simd: Simd,
    ) -> None:
        """Declare the arguments: the mask if padded, each bias and residual, the output."""
        self.target, self._simd, self._channels = target, simd, channels
        self._mask = argument("mask", (target.room,), "int32") if target.border.padded else None
        places = iter(residuals)
        self._places: dict[int, Planes] = {}
        self._steps: list[tuple[Step, Buffer]] = []
        for i, step in enumerate(epilogue):
            operand = None
            if isinstance(step, Bias):
                operand = argument(f"bias_{i}", (channels,))
            elif isinstance(step, Residual):
                self._places[i] = next(places)
                operand = argument(f"residual_{i}", (batch, channels, self._places[i].size))
            self._steps.append((step, operand))
        self._declared = argument("y", (batch, channels, target.size))

    def open(self) -> None:
        """Compute extents here, in the body of a loop over jobs."""
        self.y, self.extents = flat(self._declared), Extents(self.target)
        self._residuals = {
            i: (flat(self._steps[i][1]), Extents(place)) for i, place in self._places.items()
        }

    def _starts_with_bias(self) -> bool:
        return bool(self._steps) and isinstance(self._steps[0][0], Bias)

    def start(self, channel: Expr) -> Expr:
        """The vector that a channel's sums start from: the bias, where that is the first step."""
        if self._starts_with_bias():
            return splat(self._steps[0][1][channel], self._simd)
        return splat(T.float32(0), self._simd)

    def at(self, plane: Expr, pixel: Expr) -> list[Any]:
        """Indices of a vector of the output; planes count over images and channels."""
        return [ramp(plane * self.extents.size + self.extents.first + pixel, self._simd)]

    def ask_for(self, plane: Expr, planes: int, pixel: Expr, vectors: int) -> None:
        """Ask for what vectors of some planes are stored in, and for the residuals of these.

        Of each plane there are too few at a time for the CPU to see a stream.
        """
        lanes = self._simd.lanes
        lines = (vectors * lanes + (LANES - lanes) + (LANES - 1)) // LANES
        places = [(self.y, self.extents), *self._residuals.values()]
        for buffer, extents in places:
            for row in range(planes):
                start = (plane + row) * extents.size + extents.first + pixel
                for line in range(lines):
                    prefetch(buffer, (start + line * LANES,))

    def finish(self, value: Expr, plane: Expr, channel: Expr, pixel: Expr) -> None:
        """Finish a vector of sums that began with `start`, and store it."""
        self.store(value, plane, channel, pixel, first_step=int(self._starts_with_bias()))

    def store(
        self,
        value: Expr,
        plane: Expr,
        channel: Expr,
        pixel: Expr,
        first_step: int = 0,
        lanes: Expr | None = None,
    ) -> None:
        """Apply the steps from ``first_step`` on to a vector, and store it, or its first lanes."""
        for i, (step, operand) in list(enumerate(self._steps))[first_step:]:
            if isinstance(step, Bias):
                value = value + splat(operand[channel], self._simd)
            elif isinstance(step, Residual):
                residual, place = self._residuals[i]
                value = value + residual[ramp(plane * place.size + place.first + pixel, self._simd)]
            elif isinstance(step, Clamp):
                value = _clamped(value, step)
            elif isinstance(step, Activation):
                value = ACTIVATIONS[step.function](value)
            else:
                raise ValueError(f"images have no step {step}")
        if self._mask is not None:
            value = masked(value, self._mask, pixel, self._simd)
        if lanes is None:
            T.buffer_store(self.y, value, self.at(plane, pixel))
            return
        numbers = T.ramp(tirx.const(0, "int32"), 1, self._simd.lanes)
        among = numbers < T.broadcast(T.Cast("int32", lanes), self._simd.lanes)
        T.evaluate(T.masked_store(self.y, value, *self.at(plane, pixel), among))

    def clear_border(self, plane: Expr, written: Expr) -> None:
        """Clear the padding around the ``written`` elements from the first pixel on, if any."""
        if self._mask is not None:
            clear_border(self.y, plane * self.extents.size, self.extents, written, self._simd)

    def clear_borders(self, image: Expr, channel: Expr, stop: Expr, written: Expr) -> None:
        """The same for an image's channels, as far as there are, from ``channel`` to ``stop``."""
        if self._mask is not None:
            with T.serial(0, tirx.min(stop, self._channels) - channel) as i:
                self.clear_border(scalar(image * self._channels + channel + i), written)

    def clear(self, plane: Expr, pixel: Expr) -> None:
        """Clear a vector of the output."""
        T.buffer_store(self.y, splat(T.float32(0), self._simd), self.at(plane, pixel))


def _clamped(value: Expr, step: Clamp) -> Expr:
    if step.low is not None:
        value = tirx.max(value, constant(step.low, value))
    return value if step.high is None else tirx.min(value, constant(step.high, value))
