"""A tensor's numbers as JSON, decoded in little memory and small steps.

Decoding JSON takes the interpreter's lock, so long arrays are cut into parts, and other requests
get their turn between two of them. Nothing is made of the data before it is certain that they are
as many numbers as the tensor has, flat or nested as its shape is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from sparse_tvm.serving.budget import Hold
from sparse_tvm.serving.protocol import from_numbers
from sparse_tvm.serving.refusal import invalid
from sparse_tvm.spec import TensorSpec

_PART = 256 << 10
_WITHIN_NUMBERS = b"0123456789+-.eE" + b"truefalse" + b" \t\r\n"
_COPIES = 4
"""Of the JSON: the text, its skeleton, the one that its shape has, and the numbers."""

_DECODERS: dict[str, msgspec.json.Decoder[Any]] = {
    "b": msgspec.json.Decoder(list[bool]),
    "i": msgspec.json.Decoder(list[int]),
    "u": msgspec.json.Decoder(list[int]),
    "f": msgspec.json.Decoder(list[float]),
}


async def decode_numbers(
    raw: msgspec.Raw, spec: TensorSpec, shape: Sequence[int], held: Hold
) -> np.ndarray:
    """Return the array of this shape for sound JSON.

    Parameters
    ----------
    raw : msgspec.Raw
        The JSON.
    held : Hold
        Where the memory that it takes is noted.

    Raises
    ------
    Refusal
        When it is something else than numbers of this shape, or they do not fit the dtype.
    """
    size = len(memoryview(raw))
    count = math.prod(shape)
    async with held.turn(size):
        held.grow(_COPIES * size)
        numbers = _without_brackets(bytes(raw), spec, shape)
    dtype = np.dtype(spec.dtype)
    held.grow(count * dtype.itemsize)
    decoder = _DECODERS[dtype.kind]
    result = np.empty(count, dtype)
    start = filled = 0
    while start < len(numbers):
        end = numbers.find(b",", start + _PART)
        part = numbers[start:] if end < 0 else numbers[start:end]
        async with held.turn(len(part)):
            try:
                values = decoder.decode(b"[" + part + b"]")
            except msgspec.DecodeError as error:
                raise invalid(f"the data of input {spec.name!r}: {error}") from None
            result[filled : filled + len(values)] = from_numbers(spec, values, [len(values)])
        filled += len(values)
        if end < 0:
            break
        start = end + 1
    if filled != count:  # an empty list has the skeleton of a list of one
        raise invalid(f"the data of input {spec.name!r} are {filled} numbers, not {count}")
    return result.reshape(shape)


def _without_brackets(text: bytes, spec: TensorSpec, shape: Sequence[int]) -> bytes:
    """Return the numbers with commas between them, if they are as many as the shape has."""
    count = math.prod(shape)
    # What remains without digits and blanks are brackets and commas; of anything else, more.
    skeleton = text.translate(None, _WITHIN_NUMBERS)
    if count > len(text) or skeleton not in (_flat(count), _nested(shape)):
        raise invalid(
            f"the data of input {spec.name!r} are not {count} numbers, flat or nested as its shape"
        )
    return text.translate(None, b"[]")


def _flat(count: int) -> bytes:
    return b"[" + b"," * (count - 1) + b"]"


def _nested(shape: Sequence[int]) -> bytes:
    """Return the brackets and commas of an array of this shape, all sizes at least 1."""
    skeleton = b""
    for size in reversed(shape):
        skeleton = b"[" + b",".join([skeleton] * size) + b"]"
    return skeleton
