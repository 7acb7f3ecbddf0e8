"""Which layout a weight gets, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from sparse_tvm.backends import get_backend
from sparse_tvm.backends.cpu import CpuBackend
from sparse_tvm.errors import OptionError
from sparse_tvm.families import WeightedFamily, Work
from sparse_tvm.operators import Bias, Convolution, Dense, Layout
from sparse_tvm.passes.formats import FormatOptions
from sparse_tvm.passes.layout_choice import choose
from sparse_tvm.sparsity.masks import prune_array
from sparse_tvm.sparsity.statistics import MeasuredWeight
from sparse_tvm.targets import get_target

V4, V3 = get_target("x86-64-v4"), get_target("x86-64-v3")


def weight(shape, sparsity=0.0, structure="unstructured", seed=0):
    w = np.random.default_rng(seed).standard_normal(shape).astype("float32")
    return prune_array(w, sparsity, structure) if sparsity else w


def chosen(w, *rules, layer="encoder.fc", target=V4, backend=None, op=None, **options):
    values = {"format": "auto", "block": None, "threshold": None, **options}
    return choose(
        op or Dense(layer=layer, matrix=w.shape),
        MeasuredWeight(w),
        FormatOptions.parse(**values, rules=rules),
        backend or get_backend("cpu"),
        target,
    )


def form(choice):
    return choice.layout.format, choice.layout.block


def test_auto_keeps_a_dense_weight_dense():
    choice = chosen(weight((256, 256)))
    assert choice.layout.format == "dense"
    assert choice.reason == "no zeros"


def test_auto_refuses_a_sparsity_that_does_not_pay():
    choice = chosen(weight((256, 256), 0.1))
    assert choice.layout.format == "dense"
    assert "does not pay" in choice.reason
    assert "10" in choice.reason.partition("%")[0]


@pytest.mark.parametrize("target", [V4, V3])
def test_auto_takes_the_block_of_a_structured_weight(target):
    choice = chosen(weight((256, 256), 0.9, "4x1"), target=target)
    format, (rows, columns) = form(choice)
    assert (format, 4 % rows, columns) == ("bsr", 0, 1)  # blocks without stored zeros
    assert rows == 4 or target is not V4
    assert "than dense (predicted)" in choice.reason


def test_auto_makes_very_sparse_weights_sparse():
    assert chosen(weight((256, 256), 0.98)).layout.sparse
    assert chosen(np.zeros((64, 64), "float32")).layout.sparse


def test_auto_with_a_block_compares_it_with_dense():
    assert form(chosen(weight((256, 256), 0.9, "4x1"), block="4x1")) == ("bsr", (4, 1))
    assert chosen(weight((256, 256), 0.5), block="16x1").layout.format == "dense"


@pytest.mark.parametrize(
    ("format", "block", "expected"),
    [
        ("dense", None, "dense"),
        ("csr", None, ("csr", (1, 1))),
        ("bsr", "4x1", ("bsr", (4, 1))),
        ("bsr", "2x4", ("bsr", (2, 4))),
    ],
)
def test_format_of_all_layers(format, block, expected):
    choice = chosen(weight((64, 48), 0.5), format=format, block=block)
    assert choice.layout.format == expected if format == "dense" else form(choice) == expected
    assert f"--format {format}" in choice.reason


def test_threshold():
    w = weight((256, 256), 0.8, "4x1")
    below = chosen(w, threshold=0.85)
    assert below.layout.format == "dense"
    assert "below the threshold 0.85" in below.reason
    assert chosen(w, threshold=0.75).layout.format == "bsr"
    assert chosen(w, threshold=0.85, format="csr").layout.format == "dense"


def test_last_rule_that_matches_wins():
    w = weight((64, 64), 0.9)
    rules = ("fc=csr", r"encoder\..*=bsr:2x1", "decoder=dense")
    choice = chosen(w, *rules)
    assert form(choice) == ("bsr", (2, 1))
    assert r"rule encoder\..*=bsr:2x1" in choice.reason
    assert chosen(w, *rules, layer="x.fc").layout.format == "csr"
    assert chosen(w, *rules, layer="decoder.out").layout.format == "dense"


def test_rule_wins_over_threshold_and_format():
    w = weight((64, 64), 0.2)
    assert chosen(w, "fc=csr", threshold=0.9, format="dense").layout.format == "csr"


@pytest.mark.parametrize(
    ("asked", "stored"), [("32x1", (16, 1)), ("1x16", (1, 8)), ("6x1", (6, 1)), ("24x3", (12, 3))]
)
def test_block_is_cut_to_what_registers_hold(asked, stored):
    choice = chosen(weight((96, 96), 0.5), format="bsr", block=asked)
    assert form(choice) == ("bsr", stored)
    cut = f"; {asked} stored as {stored[0]}x{stored[1]}"
    assert choice.reason.endswith(cut) == (asked != f"{stored[0]}x{stored[1]}")


@pytest.mark.parametrize("shape", [(1, 40), (3, 40), (40, 1), (1, 1)])
@pytest.mark.parametrize("format", ["auto", "csr", "bsr"])
def test_tiny_weights_have_every_format(shape, format):
    w = weight(shape)
    w.flat[::2] = 0
    choice = chosen(w, format=format)
    assert format in ("auto", choice.layout.format)
    rows, columns = choice.layout.block
    if choice.layout.sparse:
        assert rows <= shape[0]
        assert columns <= shape[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "coo"}, "unknown format 'coo'"),
        ({"format": "csr", "block": "4x1"}, "needs --format bsr"),
        ({"threshold": 1.5}, "not a share of zeros"),
        ({"block": "4"}, "not of the form RxC"),
        ({"rules": ("fc",)}, "is not REGEX=FORMAT"),
        ({"rules": ("fc=coo",)}, "is not REGEX=FORMAT"),
        ({"rules": ("fc=csr:4x1",)}, "is not REGEX=FORMAT"),
        ({"rules": ("fc=bsr:4",)}, "not of the form RxC"),
        ({"rules": ("(=csr",)}, "bad regular expression"),
    ],
)
def test_options_that_make_no_sense(options, message):
    values = {"format": "auto", "block": None, "threshold": None, "rules": (), **options}
    with pytest.raises(OptionError, match=message.replace("(", r"\(")):
        FormatOptions.parse(**values)


def test_rule_may_hold_an_equals_sign():
    (rule,) = FormatOptions.parse(rules=["a=b=csr"]).rules
    assert (rule.pattern.pattern, rule.format) == ("a=b", "csr")


def test_unstructured_weights_are_split_and_blocks_are_not():
    assert chosen(weight((768, 768), 0.9)).layout.get("parts", 1) > 1
    assert chosen(weight((768, 768), 0.9, "4x1")).layout.get("parts", 1) == 1
    assert (
        chosen(weight((64, 64), 0.9)).layout.get("parts", 1) == 1
    )  # X is in the first cache as it is


@dataclass(frozen=True)
class Rival(WeightedFamily[Dense]):
    """A family with one sparse layout of its own, of a cost that the test sets."""

    name: ClassVar[str] = "rival"
    operator: ClassVar[type[Dense]] = Dense
    seconds: float

    def refuses(self, op, target) -> str | None:
        return "rival adds no bias" if Bias() in op.epilogue else None

    def candidates(self, op, weight, target, wish=None) -> Sequence[Layout]:
        layout = Layout(self.name, "ell", (1, 1))
        return [layout] if wish is None or wish.format == "ell" else []

    def cost(self, op, layout, weight, tokens, target) -> float:
        return self.seconds

    def pack(self, op, w, layout, target) -> dict[str, np.ndarray]:
        raise AssertionError("choosing packs nothing")

    def build(self, op, operands, output, target):
        raise AssertionError("choosing builds nothing")

    def work(self, op, operands, output, nonzeros=None) -> Work:
        return Work()


def rivalled(seconds):
    backend = CpuBackend()
    backend.add(Rival(seconds))
    return backend


def test_families_compete_by_cost():
    w = weight((256, 256), 0.9)
    alone = chosen(w)
    assert alone.layout.family == "matmul"
    assert chosen(w, backend=rivalled(alone.seconds * 1.01)) == alone
    taken = chosen(w, backend=rivalled(alone.seconds * 0.99))
    assert (taken.layout, taken.seconds) == (Layout("rival", "ell"), alone.seconds * 0.99)
    assert taken.dense_seconds == alone.dense_seconds


def test_family_that_refuses_an_operator_takes_no_part():
    w = weight((256, 256), 0.9)
    op = Dense(layer="fc", matrix=w.shape, epilogue=(Bias(),))
    assert chosen(w, op=op, backend=rivalled(0.0)).layout.family == "matmul"


def test_wish_that_one_family_does_not_know_is_left_to_the_others():
    w = weight((256, 256), 0.9)
    assert chosen(w, format="csr", backend=rivalled(1e-12)).layout.family == "matmul"
    assert (
        chosen(w, format="dense", backend=rivalled(1e-12)).layout
        == chosen(w, format="dense").layout
    )


def convolution(groups):
    return Convolution(
        layer="conv",
        matrix=(16, 16 // groups * 9),
        channels=16,
        out_channels=16,
        size=(8, 8),
        kernel=(3, 3),
        stride=(1, 1),
        dilation=(1, 1),
        pads=(1, 1, 1, 1),
        groups=groups,
    )


@pytest.mark.parametrize(
    ("sparsity", "format", "stored"),
    [(0.9, "auto", "csr"), (0.2, "auto", "dense"), (0.2, "csr", "csr"), (0.9, "dense", "dense")],
)
def test_depthwise_weight_is_sparse_if_few_taps_are_left(sparsity, format, stored):
    op = convolution(16)
    choice = chosen(weight(op.matrix, sparsity), op=op, format=format)
    assert choice.layout == Layout("depthwise_convolution", stored)


def test_depthwise_weight_has_no_blocks():
    op = convolution(16)
    choice = chosen(weight(op.matrix, 0.9), op=op, format="bsr", block="4x1")
    assert choice.layout == Layout("depthwise_convolution", "dense")
    assert "no kernels for it" in choice.reason


def test_blocks_of_a_convolution_are_not_wide():
    op = convolution(1)
    choice = chosen(weight(op.matrix, 0.9), op=op, format="bsr", block="4x4")
    layout = choice.layout
    assert (layout.family, layout.format, layout.block) == ("convolution", "bsr", (4, 1))
    assert choice.reason.endswith("4x4 stored as 4x1")
