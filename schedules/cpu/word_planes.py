"""The layout of int8 images: planes of words, each four channels of one pixel.

A word-plane is a plane of :mod:`sparse_tvm.schedules.cpu.planes` whose elements are 32-bit words:
channels 4i to 4i + 3 of a pixel, one unsigned byte each, lowest first. All that is said there of
pitches, borders, phases and masks holds for words as for float32: a convolution finds the operand
of a dot product instruction, sixteen pixels by four channels, at a fixed distance from the pixel,
and sixteen planes below each other are a tile for a matrix unit. What pads an image is the byte
that stands for zero, in all four channels. Bytes behind the last channel hold anything: the
weights that meet them are zero.

Needs no TVM.
"""

from __future__ import annotations

import numpy as np

from sparse_tvm.schedules.cpu.precision import INT8
from sparse_tvm.sparsity.quantise import as_words

BYTES = INT8.unit
"""Channels in a word."""

_PAIR = 128
"""Steps that 16 bits hold, times a byte of x."""


def word_planes(channels: int) -> int:
    """Planes of words that so many channels take."""
    return -(-channels // BYTES)


def fill_word(zero: int) -> np.ndarray:
    """Four bytes of a zero point as a word, int32 ``[1]``."""
    return np.full(BYTES, zero, np.uint8).view(np.int32)


def weight_words(w: np.ndarray, taps: int) -> np.ndarray:
    """The words of an int8 weight ``[N, channels * taps]``: int32 ``[N, planes * taps]``.

    Four channels of one tap are a word.
    """
    n = len(w)
    by_tap = w.reshape(n, -1, taps).swapaxes(1, 2).reshape(n * taps, -1)
    words = as_words(by_tap).reshape(n, taps, -1)
    return np.ascontiguousarray(words.swapaxes(1, 2)).reshape(n, -1)


def halves_of(words: np.ndarray) -> np.ndarray:
    """Words as two each, int32 ``[..., 2]``: the even bytes, and the odd ones, in 16 bits."""
    pairs = words[..., None].view(np.int8).reshape(*words.shape, 2, 2).astype(np.int16)
    return np.ascontiguousarray(pairs.swapaxes(-1, -2)).view(np.int32)[..., 0]


def exact_parts(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Words as sums of two, the second mostly zero, for 16 bits to hold sums of their products.

    Two products with bytes of x, 0 to 255, are summed up: of weights on the same side of zero,
    at most `_PAIR` steps together, of others in any case.
    """
    pairs = words[..., None].view(np.int8).reshape(*words.shape, 2, 2)
    first, second = (pairs[..., i].astype(np.int16) for i in range(2))
    room = np.clip(second, np.minimum(-_PAIR - first, 0), np.maximum(_PAIR - first, 0))

    def joined(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        parts = np.stack([first, second], axis=-1).astype(np.int8)
        return parts.reshape(*words.shape, BYTES).view(np.int32)[..., 0]

    return joined(first, room), joined(np.zeros_like(first), second - room)


def depthwise_words(w: np.ndarray, *, halves: bool = False) -> np.ndarray:
    """The words of a depthwise int8 weight ``[channels, taps]``: int32 ``[planes, taps, 4]``.

    Channel i of a plane multiplies byte i alone. In halves, its word is the one of that byte.
    """
    channels, taps = w.shape
    padded = np.pad(w, ((0, -channels % BYTES), (0, 0))).reshape(-1, BYTES, taps)
    alone = np.zeros((len(padded), taps, BYTES, BYTES), np.int8)
    for byte in range(BYTES):
        alone[:, :, byte, byte] = padded[:, byte]
    words = alone.view(np.int32)[..., 0]
    if not halves:
        return words
    both = halves_of(words)
    return np.stack([both[..., i, i % 2] for i in range(BYTES)], axis=-1)


def padded_to(values: np.ndarray, multiple: int) -> np.ndarray:
    """A vector with zeros behind it, up to a multiple of some number."""
    return np.pad(values, (0, -len(values) % multiple))
