"""What families offer for tuning alone computes the same as what they would choose."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tvm
from pretended import sparse_weight
from tvm import relax

from sparse_tvm.backends import resolve_target
from sparse_tvm.operators import Bias, Convolution, Dense, Frames, Residual
from sparse_tvm.passes.infrastructure import Context
from sparse_tvm.sparsity.statistics import MeasuredWeight
from sparse_tvm.tuning.layer_kernel import Call, layer_program

CONTEXT = Context(*resolve_target("native"))
DENSE = Dense(layer="fc", matrix=(48, 640), epilogue=(Bias(), Residual()))
CONVOLUTION = Convolution(
    layer="conv",
    matrix=(24, 16 * 9),
    epilogue=(Bias(), Residual()),
    channels=16,
    out_channels=24,
    size=(13, 11),
    kernel=(3, 3),
    stride=(1, 1),
    dilation=(1, 1),
    pads=(1, 1, 1, 1),
)
VIDEO = replace(CONVOLUTION, matrix=(24, 16 * 27), frames=Frames(5, 3))
CASES = [
    (DENSE, (2, 40), (2, 40, 640), (48,)),
    (CONVOLUTION, (2,), (2, 16, 13, 11), (24, 13, 11)),
    (VIDEO, (6,), (10, 16, 13, 11), (24, 13, 11)),
]


def output(call, w, layout, inputs):
    program, _ = layer_program(call, w, layout, CONTEXT)
    for phase in CONTEXT.backend.phases():
        program = phase.run(program, CONTEXT)
    executable = CONTEXT.backend.generate(program, CONTEXT.target)
    machine = relax.VirtualMachine(executable, tvm.cpu())
    weights = tuple(tvm.runtime.tensor(array) for array in program.weights.values())
    return machine["main"](*map(tvm.runtime.tensor, inputs), weights).numpy()


@pytest.mark.parametrize(("op", "leading", "x", "y"), CASES, ids=["dense", "convolution", "video"])
def test_every_variant_computes_the_layer(op, leading, x, y):
    w, rng = sparse_weight(*op.matrix), np.random.default_rng(1)
    shapes = [x, (op.matrix[0],), (*leading, *y)]
    inputs = [rng.standard_normal(shape, np.float32) for shape in shapes]
    call, weight = Call(op, leading), MeasuredWeight(w)
    (family, *_) = CONTEXT.backend.accepting(op, CONTEXT.target)
    candidates = family.candidates(op, weight, CONTEXT.target)
    variants = family.variants(op, weight, CONTEXT.target)
    assert not {*variants} & {*candidates}
    assert len(variants) == len({*variants}) > len(candidates)
    expected = output(call, w, candidates[0], inputs)
    for layout in variants[:: max(1, len(variants) // 12)]:
        found = output(call, w, layout, inputs)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4, err_msg=str(layout))
        assert family.cost(op, layout, weight, 128, CONTEXT.target) > 0
