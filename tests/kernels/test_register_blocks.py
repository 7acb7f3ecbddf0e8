"""Blocks of sums stay in registers: inner loops of convolutions do not store them elsewhere."""

from __future__ import annotations

import re

import pytest
import tvm
from harness import simd

from sparse_tvm.operators import Convolution, Layout
from sparse_tvm.schedules.cpu.conv_cost import blocking, dense_rows
from sparse_tvm.schedules.cpu.conv_planes import conv_planes
from sparse_tvm.schedules.cpu.images import Images
from sparse_tvm.schedules.cpu.intrinsics import FAST_MATH
from sparse_tvm.schedules.cpu.lane_tiles import symbol
from sparse_tvm.schedules.cpu.planes import Border, Planes, Window
from sparse_tvm.targets import TARGETS

LEVELS = [TARGETS[f"x86-64-v{level}"] for level in (2, 3, 4)]
SIZE, CHANNELS, OUT = 14, 32, 48


def innermost_loops(assembly: str) -> list[str]:
    """The bodies of loops that are one run of instructions."""
    blocks = re.split(r"^(\.L\w+):", assembly, flags=re.MULTILINE)
    pairs = zip(blocks[1::2], blocks[2::2], strict=True)
    return [body for label, body in pairs if re.search(rf"\tj\w+\t{re.escape(label)}\b", body)]


@pytest.mark.parametrize("target", LEVELS, ids=[target.name for target in LEVELS])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("form", ["dense", "csr", "2x1", "4x1"])
@pytest.mark.parametrize("known", [True, False], ids=["one size", "any size"])
def test_inner_loops_keep_sums_in_registers(target, kernel, form, known):
    pads = (kernel // 2,) * 4
    window = Window((kernel, kernel), pads=pads)
    op = Convolution(
        layer="layer",
        matrix=(OUT, CHANNELS * kernel * kernel),
        channels=CHANNELS,
        out_channels=OUT,
        size=(SIZE, SIZE) if known else (None, None),
        kernel=(kernel, kernel),
        stride=(1, 1),
        dilation=(1, 1),
        pads=pads,
    )
    format = form if form in ("dense", "csr") else "bsr"
    rows = {"dense": dense_rows(op, target), "csr": 1}.get(form) or int(form[0])
    layout = Layout("test", format, (rows, 1)).having(**blocking(op, format, rows, target))
    size = (SIZE, SIZE) if known else (symbol("height"), symbol("width"))
    source, wanted = Planes(*size, window.reads.with_gap(1)), Planes(*size, Border(1))
    sizes = [] if known else size
    images = Images(1, CHANNELS, OUT, source, wanted, window, sizes)
    function = conv_planes(images, layout, [], [], simd(target))
    with (
        tvm.target.Target(target.tvm_target()),
        tvm.transform.PassContext(opt_level=3, config=FAST_MATH),
    ):
        built = tvm.compile(function.with_attr("global_symbol", "kernel"))
    loops = innermost_loops(str(built.mod.inspect_source("asm")))
    products = [(len(re.findall(r"fmadd|mulps", loop)), loop) for loop in loops]
    assert any(count for count, _ in products)
    for count, loop in products:
        # LLVM unrolls the taps of a window, and may keep a vector for the next of them.
        spilled = re.findall(r"\tv?mov[au]ps\t%[xyz]mm\d+, .*\(%r[sb]p", loop)
        assert len(spilled) <= count / 16, loop
