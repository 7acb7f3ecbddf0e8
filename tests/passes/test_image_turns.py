"""Which models may take images of a batch in turns, and how large their tensors are."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import build
from tvm import relax

from sparse_tvm.passes.image_turns import image_turns

OP = relax.op
IMAGE = {"x": ("batch", 4, "height", "width")}
WEIGHT = {"w": (8, 4, 3, 3)}


def turns(body, inputs=IMAGE, weights=WEIGHT):
    program = build(body, inputs, weights)
    return image_turns(program.module["main"], len(inputs))


def const(value):
    return relax.const(np.float32(value), "float32")


def classifier(emit, x, w):
    y = emit(OP.nn.relu(emit(OP.nn.conv2d(x, w, padding=1))))
    y = emit(OP.nn.max_pool2d(emit(OP.multiply(y, const(2.0))), (2, 2), (2, 2)))
    mean = emit(OP.mean(y, [2, 3]))
    return OP.nn.softmax(mean, -1)


def joined(emit, x, w):
    y = emit(OP.nn.conv2d(x, w, padding=1))
    scale = emit(OP.sigmoid(emit(OP.mean(y, [2, 3], keepdims=True))))
    y = emit(OP.multiply(y, scale))
    return OP.concat([y, emit(OP.add(y, y))], 1)


def tokens(emit, x, w):
    y = emit(OP.nn.conv2d(x, w, padding=1))
    return OP.permute_dims(y, [0, 2, 3, 1])


def over_the_batch(emit, x, w):
    y = emit(OP.nn.conv2d(x, w, padding=1))
    return OP.subtract(y, emit(OP.mean(y, [0, 2, 3], keepdims=True)))


def turned(emit, x, w):
    return OP.permute_dims(emit(OP.nn.conv2d(x, w)), [1, 0, 2, 3])


def behind_each_other(emit, x, w):
    y = emit(OP.nn.conv2d(x, w, padding=1))
    return OP.concat([y, y], 0)


def among_images(emit, x, w):
    return OP.nn.softmax(emit(OP.nn.conv2d(x, w)), 0)


def unknown(emit, x, w):
    return OP.cumsum(emit(OP.nn.conv2d(x, w)), 0)


def first_image(emit, x, w):
    y = emit(OP.nn.conv2d(x, w, padding=1))
    return OP.add(y, emit(OP.take(y, relax.const(np.array([0])), 0)))


@pytest.mark.parametrize("body", [classifier, joined, tokens])
def test_images_apart(body):
    assert turns(body).dimension == "batch"


@pytest.mark.parametrize(
    "body", [over_the_batch, turned, behind_each_other, among_images, unknown, first_image]
)
def test_what_may_mix_images_takes_no_turns(body):
    assert turns(body) is None


def test_a_batch_of_known_size_takes_no_turns():
    assert turns(classifier, {"x": (8, 4, 32, 32)}) is None


def test_another_input_of_the_batch_takes_part_and_one_of_other_sizes_does_not_count():
    def body(emit, x, scale, w):
        return OP.multiply(emit(OP.nn.conv2d(x, w, padding=1)), scale)

    assert turns(body, {**IMAGE, "scale": ("batch", 8, 1, 1)}) is not None
    assert turns(body, {**IMAGE, "scale": (8, 1, 1)}) is not None
    assert turns(body, {**IMAGE, "scale": (1, 8, 1, "batch")}) is None


def test_sizes_are_those_of_an_image():
    def body(emit, x, w):
        return OP.nn.relu(emit(OP.nn.conv2d(x, w, padding=1)))

    found = turns(body)
    assert (found.widest, found.moved) == (2, 4)
