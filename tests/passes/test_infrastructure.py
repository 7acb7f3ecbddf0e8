"""Passes never change their argument, and a pass that breaks its promise is caught."""

from __future__ import annotations

import copy
import os
from dataclasses import replace

import numpy as np
import pytest
import tvm
from helpers import build, context
from tvm import relax

import sparse_tvm
from sparse_tvm.backends import get_backend
from sparse_tvm.errors import BuildError
from sparse_tvm.frontends.importer.model import import_onnx
from sparse_tvm.models.bert import BertConfig, build_bert
from sparse_tvm.passes import pipeline
from sparse_tvm.passes.cpu.lane_layout import IN_LANE_TILES, lane_layout
from sparse_tvm.passes.dense_to_sparse import WEIGHTS_STORED, dense_to_sparse
from sparse_tvm.passes.fc_transpose import WEIGHTS_TRANSPOSED, fc_transpose
from sparse_tvm.passes.infrastructure import (
    CHECK_VARIABLE,
    WELL_FORMED,
    Context,
    Pass,
    Phase,
    Property,
    graph_pass,
)
from sparse_tvm.passes.lower_kernels import LOWERED, lower_kernels
from sparse_tvm.passes.program import Program

PASSES = [one for phase in pipeline.phases(get_backend("cpu")) for one in phase.passes]
BY_NAME = pytest.mark.parametrize("one", PASSES, ids=lambda one: one.name)
CONTEXT = context(target="x86-64-v3", precision="int8")
CONTEXT = replace(CONTEXT, options=replace(CONTEXT.options, integers=True))
BERT = BertConfig(layers=1, hidden=32, heads=2, intermediate=48, vocabulary=600)


IN_FLOAT32 = context(target="x86-64-v3")


def through(program: Program, within: Context = CONTEXT) -> dict[str, Program]:
    """A program before each pass of the pipeline, by the pass's name, and at the ``end``."""
    found = {}
    for one in PASSES:
        found[one.name] = program
        program = one(program, within)
    return {**found, "end": program}


@pytest.fixture(scope="module")
def stages() -> dict[str, Program]:
    """A small BERT on its way."""
    imported = import_onnx(build_bert(BERT, sequence=16))
    return through(Program(imported.module, dict(imported.weights), dict(imported.layers)))


@pytest.fixture(scope="module")
def stages_of_an_image() -> dict[str, Program]:
    """What BERT has not: a quantised convolution, a transposed one, a norm spelled out, a product
    that is no attention, a quantised layer, attention to a cache, a count of non-zeros, a batch
    norm."""
    op = relax.op

    def counted(emit, x):
        types = [relax.TensorType(shape, "int64") for shape in ((30,), (1,))]
        fields = relax.Tuple([x, tvm.ir.StringImm("{}")])
        found = emit(relax.call_dps_packed("onnx.NonZero", fields, types))
        return emit(op.astype(emit(relax.TupleGetItem(found, 1)), "float32"))

    def rounded(emit, x):
        steps, low, high = (relax.const(value, "float32") for value in (0.1, -100.0, 155.0))
        clipped = emit(op.minimum(emit(op.maximum(emit(op.divide(x, steps)), low)), high))
        return emit(op.multiply(emit(op.round(clipped)), steps))

    def quantised(emit, x, v):
        return emit(op.matmul(rounded(emit, x), emit(op.permute_dims(v))))

    def attention(emit, cache):
        keys = emit(op.concat([cache, cache], 2))
        turned = emit(op.permute_dims(keys, [0, 1, 3, 2]))
        weights = emit(op.nn.softmax(emit(op.matmul(cache, turned))))
        rows = emit(op.permute_dims(emit(op.matmul(weights, keys)), [0, 2, 1, 3]))
        return emit(op.reshape(rows, (1, 3, 16)))

    def body(emit, image, other, cache, w, t, v, gamma, beta, *norm):
        pixels = emit(op.reshape(emit(op.nn.conv2d(rounded(emit, image), w)), (24, 6)))
        centred = emit(op.subtract(pixels, emit(op.mean(pixels, [-1], keepdims=True))))
        variance = emit(op.mean(emit(op.multiply(centred, centred)), [-1], keepdims=True))
        deviation = emit(op.sqrt(emit(op.add(variance, relax.const(1e-5, "float32")))))
        normal = emit(op.divide(centred, deviation))
        total = emit(op.add(emit(op.multiply(normal, gamma)), beta))
        product = emit(op.matmul(emit(op.add(total, quantised(emit, normal, v))), other))
        larger = emit(op.nn.conv2d_transpose(image, t, strides=(2, 2)))
        norm = emit(op.nn.batch_norm(larger, *norm, axis=1, training=False))
        larger = emit(relax.TupleGetItem(norm, 0))
        total = emit(op.add(product, emit(op.mean(attention(emit, cache)))))
        total = emit(op.add(total, counted(emit, other)))
        return op.add(total, emit(op.mean(larger)))

    inputs = {"image": (1, 4, 6, 8), "other": (6, 5), "cache": (1, 1, 3, 16)}
    shapes = {"w": (6, 4, 3, 3), "t": (4, 5, 2, 2), "v": (6, 6), "gamma": (6,), "beta": (6,)}
    shapes |= dict.fromkeys(("norm_gamma", "norm_beta", "norm_mean", "norm_variance"), (5,))
    program = build(body, inputs, shapes)
    program.weights["norm_variance"] = np.abs(program.weights["norm_variance"])
    for name in ("v", "w"):
        program.weights[name] = np.rint(program.weights[name] * 30) / np.float32(32)
    return through(program)


@pytest.fixture(scope="module")
def stages_of_a_decoder() -> dict[str, Program]:
    """What both have not: heads turned by rotary positions, a gate, and a scaled layer."""
    op, heads, size = relax.op, 2, 8

    def part(emit, t, start, stop):
        return emit(op.strided_slice(t, [3], [start], [stop]))

    def by_heads(emit, t):
        rows = emit(op.reshape(t, (1, 16, heads, size)))
        return emit(op.permute_dims(rows, [0, 2, 1, 3]))

    def turned(emit, t, cos, sin):
        t = by_heads(emit, t)
        second = emit(op.negative(part(emit, t, size // 2, size)))
        other = emit(op.concat([second, part(emit, t, 0, size // 2)], axis=3))
        cos, sin = (emit(op.expand_dims(angle, 1)) for angle in (cos, sin))
        return emit(op.add(emit(op.multiply(t, cos)), emit(op.multiply(other, sin))))

    def body(emit, x, cos, sin, gate, up, out, scale):
        activated = emit(op.nn.silu(emit(op.matmul(x, emit(op.permute_dims(gate))))))
        gated = emit(op.multiply(activated, emit(op.matmul(x, emit(op.permute_dims(up))))))
        q, k = (turned(emit, t, cos, sin) for t in (gated, x))
        scores = emit(op.matmul(q, emit(op.permute_dims(k, [0, 1, 3, 2]))))
        scores = emit(op.multiply(scores, relax.const(size**-0.5)))
        mixed = emit(op.matmul(emit(op.nn.softmax(scores)), by_heads(emit, x)))
        mixed = emit(op.permute_dims(mixed, [0, 2, 1, 3]))
        merged = emit(op.reshape(mixed, (1, 16, heads * size)))
        return op.multiply(emit(op.matmul(merged, emit(op.permute_dims(out)))), scale)

    inputs = {"x": (1, 16, heads * size), **dict.fromkeys(("cos", "sin"), (1, 16, size))}
    weights = dict.fromkeys(("gate", "up", "out"), (heads * size, heads * size))
    weights["scale"] = (heads * size,)
    return through(build(body, inputs, weights), IN_FLOAT32)


def snapshot(program: Program) -> Program:
    """A copy that shares nothing with the program."""
    return Program(
        tvm.ir.load_json(tvm.ir.save_json(program.module)),
        {name: array.copy() for name, array in program.weights.items()},
        *map(copy.deepcopy, (program.layers, program.reports, program.kernels, program.notes)),
    )


def assert_same(program: Program, expected: Program) -> None:
    tvm.ir.assert_structural_equal(program.module, expected.module)
    assert list(program.weights) == list(expected.weights)
    for name, array in expected.weights.items():
        np.testing.assert_array_equal(program.weights[name], array)
    for key in ("layers", "reports", "kernels", "notes"):
        assert getattr(program, key) == getattr(expected, key), key


@BY_NAME
def test_pass_leaves_its_argument_alone(one, stages, stages_of_an_image, stages_of_a_decoder):
    for found in (stages, stages_of_an_image, stages_of_a_decoder):
        program = found[one.name]
        expected = snapshot(program)
        assert one(program, CONTEXT) is not program
        assert_same(program, expected)


@BY_NAME
def test_pass_makes_the_same_of_the_same(one, stages):
    assert_same(one(stages[one.name], CONTEXT), one(stages[one.name], CONTEXT))


@BY_NAME
def test_every_pass_has_something_to_do(one, stages, stages_of_an_image, stages_of_a_decoder):
    """Else the tests above would show nothing."""
    names = list(stages)
    after = names[names.index(one.name) + 1]
    assert any(
        found[one.name].module.script() != found[after].module.script()
        for found in (stages, stages_of_an_image, stages_of_a_decoder)
    )


def test_pass_that_changes_all_it_is_given_changes_a_copy(stages):
    @graph_pass()
    def vandal(program: Program, context: Context) -> Program:
        del program.module["main"]
        program.weights.clear()
        program.layers.clear()
        program.notes.append("mine")
        for report in program.reports.values():
            report.kernel = "mine"
        for kernel in program.kernels.values():
            kernel["layers"].append("mine")
        return program

    before = stages["end"]
    assert before.reports
    assert before.kernels
    expected = snapshot(before)
    vandal(before, CONTEXT, check=False)
    assert_same(before, expected)


@pytest.mark.parametrize(
    ("promise", "before", "after"),
    [
        (WEIGHTS_TRANSPOSED, fc_transpose, "fuse_activations"),
        (WEIGHTS_STORED, dense_to_sparse, "lane_layout"),
        (IN_LANE_TILES, lane_layout, "legalize"),
        (LOWERED, lower_kernels, "schedule_rest"),
    ],
    ids=lambda value: getattr(value, "statement", None) or getattr(value, "name", value),
)
def test_promise_is_kept_by_its_pass_and_by_no_other(promise, before, after, stages):
    assert promise in before.ensures
    assert list(promise.violations(stages[before.name]))
    assert list(promise.violations(stages[after])) == []


def test_pass_that_comes_too_early_is_caught(stages):
    with pytest.raises(BuildError, match="pass lane_layout requires that every layer's weight"):
        lane_layout(stages["dense_to_sparse"], CONTEXT)
    with pytest.raises(BuildError, match=r": dense encoder\.layer\.0\.attention\.self\.query"):
        lower_kernels(stages["dense_to_sparse"], CONTEXT)


def lazy(*, requires=(), ensures=()) -> Pass:
    """A pass that does nothing."""

    @graph_pass(requires=requires, ensures=ensures)
    def does_nothing(program: Program, context: Context) -> Program:
        return program

    return does_nothing


def test_pass_that_does_not_do_what_it_promises_is_caught(stages):
    idle = lazy(ensures=[WEIGHTS_STORED])
    with pytest.raises(BuildError, match="pass does_nothing ensures that every layer's weight"):
        idle(stages["dense_to_sparse"], CONTEXT)
    idle(stages["lane_layout"], CONTEXT)


def test_every_pass_of_a_phase_is_held_to_its_promise(stages):
    phase = Phase("some", (lazy(), lazy(ensures=[WEIGHTS_STORED])))
    with pytest.raises(BuildError, match="does_nothing ensures"):
        phase.run(stages["dense_to_sparse"], CONTEXT)
    assert_same(
        phase.run(stages["dense_to_sparse"], CONTEXT, check=False), stages["dense_to_sparse"]
    )


def layer() -> Program:
    return build(
        lambda emit, x, w: relax.op.matmul(x, emit(relax.op.permute_dims(w))),
        {"x": ("tokens", 8)},
        {"w": (6, 8)},
    )


def undefined_variable(program):
    main = program.module["main"]
    other = relax.Var("x", main.params[0].ty)
    params = [other, *main.params[1:]]
    program.module["main"] = relax.Function(
        params, main.body, main.ret_ty, main.is_pure, main.attrs
    )


def weight_missing(program):
    program.weights.clear()


def weight_too_many(program):
    program.weights["v"] = program.weights["w"]


def weight_of_another_shape(program):
    program.weights["w"] = program.weights["w"].T


def weight_of_another_type(program):
    program.weights["w"] = program.weights["w"].astype("float64")


BREAKAGES = {
    undefined_variable: "TVM finds the module ill-formed",
    weight_missing: "parameters and weights are not the same",
    weight_too_many: "parameters and weights are not the same",
    weight_of_another_shape: "parameter w is",
    weight_of_another_type: "parameter w is",
}


@pytest.mark.parametrize(
    ("break_it", "message"), BREAKAGES.items(), ids=[b.__name__ for b in BREAKAGES]
)
def test_pass_that_leaves_a_broken_program_is_caught(break_it, message):
    @graph_pass()
    def broken(program: Program, context: Context) -> Program:
        break_it(program)
        return program

    before = layer()
    assert list(WELL_FORMED.violations(before)) == []
    with pytest.raises(BuildError, match=f"pass broken ensures that the program .*{message}"):
        broken(before, CONTEXT)
    assert list(WELL_FORMED.violations(broken(before, CONTEXT, check=False)))


def test_tests_check_every_pass():
    assert os.environ[CHECK_VARIABLE] == "1"


NEVER = Property("nothing is right", lambda program: ["here"])


@pytest.mark.parametrize(("value", "check"), [("1", None), ("0", True), ("", True)])
def test_checks_are_on(value, check, monkeypatch):
    monkeypatch.setenv(CHECK_VARIABLE, value)
    with pytest.raises(BuildError, match="ensures that nothing is right: here"):
        lazy(ensures=[NEVER])(layer(), CONTEXT, check=check)
    with pytest.raises(BuildError, match="requires that nothing is right: here"):
        lazy(requires=[NEVER])(layer(), CONTEXT, check=check)


@pytest.mark.parametrize(("value", "check"), [("1", False), ("0", None), (None, None)])
def test_checks_are_off(value, check, monkeypatch):
    monkeypatch.delenv(CHECK_VARIABLE)
    if value is not None:
        monkeypatch.setenv(CHECK_VARIABLE, value)
    lazy(requires=[NEVER], ensures=[NEVER])(layer(), CONTEXT, check=check)


def test_compile_checks_passes_on_request(tmp_path, monkeypatch):
    monkeypatch.delenv(CHECK_VARIABLE)
    broken = replace(pipeline.fuse_product, ensures=(NEVER,))
    monkeypatch.setattr(pipeline, "fuse_product", broken)
    model, path = build_bert(BERT, sequence=16), tmp_path / "model.so"
    with pytest.raises(BuildError, match="pass fuse_product ensures that nothing is right"):
        sparse_tvm.compile(model, path, check_passes=True, verify=False)
    assert list(tmp_path.iterdir()) == []
    sparse_tvm.compile(model, path, verify=False)
    assert path.exists()
