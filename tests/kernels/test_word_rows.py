"""What is done to each pixel of int8 images, against NumPy."""

from __future__ import annotations

import numpy as np
from harness import FORMS, run, simd, thread_counts
from hypothesis import given
from hypothesis import strategies as st
from image_harness import Extent, from_planes, images, to_planes
from test_conv_planes import FEW, SAME
from word_images import from_word_planes, packing, to_word_planes

from sparse_tvm.schedules.cpu.image_pack import READ_BEYOND, image_pack
from sparse_tvm.schedules.cpu.planes import Border, Planes, Window
from sparse_tvm.schedules.cpu.word_planes import fill_word, word_planes
from sparse_tvm.schedules.cpu.word_rows import add_images, dequantise_image, quantise_image

problems = st.fixed_dictionaries(
    {
        "image": images,
        "padded": st.booleans(),
        "zero": st.integers(0, 255),
        "target": st.sampled_from(FORMS),
        "threads": thread_counts,
    }
)
SOURCE = READ_BEYOND.with_gap(1)
ODD = 1.5 * 2.0**-6


class _Case:
    def __init__(self, problem):
        self.extent, self.rng = Extent(problem["image"]), np.random.default_rng(1)
        self.channels = problem["image"]["channels"]
        self.aim = SAME.reads.with_gap(2) if problem["padded"] else Border(2)
        self.batch = problem["image"]["batch"]
        self.target, self.threads = problem["target"], problem["threads"]

    def planes(self, border):
        """Planes for the kernel, and for here."""
        return (Planes(*e, border) for e in (self.extent.symbols, self.extent.numbers))

    def bytes(self):
        shape = (self.batch, self.channels, *self.extent.numbers)
        return self.rng.integers(0, 256, shape, np.uint8)

    def extents(self):
        return self.extent.batch, self.channels

    def unit(self):
        return self.extent.names, simd(self.target)

    def run(self, kernel, arguments, planes, size, dtype):
        shape = (self.batch, planes, size)
        return run(kernel, self.target, self.threads, arguments, shape, dtype)


@given(problems)
@FEW
def test_quantise(problem):
    case, zero = _Case(problem), problem["zero"]
    (source, here), (wanted, there) = case.planes(SOURCE), case.planes(case.aim)
    # Multiples of half a step: ties go to the nearest even number, before the zero point.
    x = case.rng.integers(-600, 600, (case.batch, case.channels, *case.extent.numbers)) * ODD / 2
    x = x.astype("float32")
    kernel = quantise_image(*case.extents(), source, wanted, *case.unit(), packing(case.target))
    steps = np.array([ODD, zero], np.float32)
    arguments = [to_planes(x, here), *case.extent.sizes, steps]
    stored = case.run(kernel, arguments, word_planes(case.channels), there.size, "int32")
    expected = np.clip(np.rint(x / np.float32(ODD)) + zero, 0, 255)
    np.testing.assert_array_equal(from_word_planes(stored, there, case.channels), expected)
    if problem["padded"]:
        front = np.ascontiguousarray(stored[..., : there.first])
        assert (front.view(np.uint8) == zero).all()


@given(problems)
@FEW
def test_dequantise(problem):
    case, zero = _Case(problem), problem["zero"]
    (source, here), (wanted, there) = case.planes(SOURCE), case.planes(case.aim)
    x = case.bytes()
    kernel = dequantise_image(*case.extents(), source, wanted, case.extent.names, simd(case.target))
    steps = np.array([ODD, zero], np.float32)
    arguments = [to_word_planes(x, here), *case.extent.sizes, steps]
    stored = case.run(kernel, arguments, case.channels, there.size, "float32")
    expected = (x.astype("float32") - zero) * np.float32(ODD)
    np.testing.assert_array_equal(from_planes(stored, there), expected)
    if problem["padded"]:
        np.testing.assert_array_equal(stored, to_planes(from_planes(stored, there), there))


@given(problems)
@FEW
def test_add(problem):
    case, zero = _Case(problem), problem["zero"]
    (a, a_here), (b, b_here) = case.planes(SOURCE), case.planes(READ_BEYOND.with_gap(3))
    wanted, there = case.planes(case.aim)
    x, y = case.bytes(), case.bytes()
    kernel = add_images(*case.extents(), (a, b), wanted, *case.unit(), packing(case.target))
    steps = np.array([0.75, 0.5, zero - 160, 2, 253, zero], np.float32)
    operands = [to_word_planes(x, a_here), to_word_planes(y, b_here)]
    arguments = [*operands, *case.extent.sizes, steps]
    stored = case.run(kernel, arguments, word_planes(case.channels), there.size, "int32")
    expected = np.clip(np.rint(x * 0.75 + y * 0.5 + zero - 160), 2, 253)
    got = from_word_planes(stored, there, case.channels)
    np.testing.assert_array_equal(got, expected)


@given(problems)
@FEW
def test_phases_of_words(problem):
    case, zero = _Case(problem), problem["zero"]
    window = Window((3, 3), (2, 2), pads=(1, 1, 1, 1))
    source, here = case.planes(SOURCE)
    border = window.reads.with_gap(2)
    sizes = (window.phase_size(size) for size in (case.extent.symbols, case.extent.numbers))
    wanted, there = (Planes(*size, border) for size in sizes)
    x = case.bytes()
    planes = word_planes(case.channels)
    kernel = image_pack(
        case.extent.batch,
        planes,
        source,
        wanted,
        window,
        case.extent.names,
        simd(case.target),
        words=True,
    )
    arguments = [to_word_planes(x, here), *case.extent.sizes, fill_word(zero)]
    phases = len(window.phases)
    stored = case.run(kernel, arguments, planes * phases, there.size, "int32")
    by_phase = stored.reshape(case.batch, planes, phases, there.size)
    for number, (row, column) in enumerate(window.phases):
        got = from_word_planes(by_phase[:, :, number], there, case.channels)
        part = x[:, :, row::2, column::2][:, :, : there.height, : there.width]
        expected = np.full(got.shape, zero, np.uint8)
        expected[:, :, : part.shape[2], : part.shape[3]] = part
        np.testing.assert_array_equal(got, expected)
