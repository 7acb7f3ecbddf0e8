"""fc-transpose: any spelling of a dense layer becomes matmul(x, permute_dims(w [out, in]))."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import (
    apply,
    assert_becomes,
    assert_unchanged,
    check_weights,
    evaluate,
    operators,
    program,
)
from tvm.script import ir as I
from tvm.script import relax as R

from sparse_tvm.passes.fc_transpose import fc_transpose


@I.ir_module
class Right:
    @R.function
    def main(x: R.Tensor(("tokens", 8), "float32"), w: R.Tensor((8, 6), "float32")) -> R.Tensor(
        ("tokens", 6), "float32"
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            y = R.matmul(x, w)
            R.output(y)
        return y


@I.ir_module
class Turned:
    """As Gemm with transB and torch.nn.Linear spell it."""

    @R.function
    def main(x: R.Tensor(("tokens", 8), "float32"), w: R.Tensor((6, 8), "float32")) -> R.Tensor(
        ("tokens", 6), "float32"
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            t = R.permute_dims(w, axes=[1, 0])
            y = R.matmul(x, t)
            R.output(y)
        return y


@I.ir_module
class TurnedThrice:
    @R.function
    def main(x: R.Tensor(("tokens", 8), "float32"), w: R.Tensor((6, 8), "float32")) -> R.Tensor(
        ("tokens", 6), "float32"
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            a = R.permute_dims(w)
            b = R.permute_dims(a, axes=[1, 0])
            same = R.permute_dims(b, axes=[0, 1])
            c = R.permute_dims(same)
            y = R.matmul(x, c)
            R.output(y)
        return y


@I.ir_module
class Canonical:
    @R.function
    def main(x: R.Tensor(("tokens", 8), "float32"), w: R.Tensor((6, 8), "float32")) -> R.Tensor(
        ("tokens", 6), "float32"
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            t = R.permute_dims(w)
            y = R.matmul(x, t)
            R.output(y)
        return y


@pytest.mark.parametrize("spelling", [Right, Turned, TurnedThrice])
def test_right_operand(spelling):
    before = program(spelling)
    after = assert_becomes(fc_transpose, before, Canonical)
    (stored,) = after.weights.values()
    (given,) = before.weights.values()
    np.testing.assert_array_equal(stored, given.T if spelling is Right else given)
    assert [after.layers[name] for name in after.weights] == ["w"]


@I.ir_module
class Left:
    @R.function
    def main(x: R.Tensor((8, "tokens"), "float32"), w: R.Tensor((6, 8), "float32")) -> R.Tensor(
        (6, "tokens"), "float32"
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            y = R.matmul(w, x)
            R.output(y)
        return y


@I.ir_module
class LeftTurned:
    @R.function
    def main(x: R.Tensor((8, "tokens"), "float32"), w: R.Tensor((8, 6), "float32")) -> R.Tensor(
        (6, "tokens"), "float32"
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            t = R.permute_dims(w)
            y = R.matmul(t, x)
            R.output(y)
        return y


@I.ir_module
class LeftCanonical:
    @R.function
    def main(x: R.Tensor((8, "tokens"), "float32"), w: R.Tensor((6, 8), "float32")) -> R.Tensor(
        (6, "tokens"), "float32"
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            t = R.permute_dims(w)
            flipped = R.permute_dims(x, axes=[1, 0])
            product = R.matmul(flipped, t)
            y = R.permute_dims(product, axes=[1, 0])
            R.output(y)
        return y


@pytest.mark.parametrize("spelling", [Left, LeftTurned])
def test_left_operand(spelling):
    after = assert_becomes(fc_transpose, program(spelling), LeftCanonical)
    assert [after.layers[name] for name in after.weights] == ["w"]


@I.ir_module
class LeftBatched:
    @R.function
    def main(x: R.Tensor(("batch", 8, 5), "float32"), w: R.Tensor((6, 8), "float32")) -> R.Tensor(
        ("batch", 6, 5), "float32"
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            y = R.matmul(w, x)
            R.output(y)
        return y


@I.ir_module
class LeftBatchedCanonical:
    @R.function
    def main(x: R.Tensor(("batch", 8, 5), "float32"), w: R.Tensor((6, 8), "float32")) -> R.Tensor(
        ("batch", 6, 5), "float32"
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            t = R.permute_dims(w)
            flipped = R.permute_dims(x, axes=[0, 2, 1])
            product = R.matmul(flipped, t)
            y = R.permute_dims(product, axes=[0, 2, 1])
            R.output(y)
        return y


def test_left_operand_of_a_batch():
    assert_becomes(fc_transpose, program(LeftBatched), LeftBatchedCanonical)


@I.ir_module
class TransposedInput:
    """Gemm with transA: the activation is turned, the weight is not."""

    @R.function
    def main(x: R.Tensor((8, "tokens"), "float32"), w: R.Tensor((8, 6), "float32")) -> R.Tensor(
        ("tokens", 6), "float32"
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            xt = R.permute_dims(x)
            y = R.matmul(xt, w)
            R.output(y)
        return y


def test_transposed_input_is_kept():
    assert operators(apply(fc_transpose, program(TransposedInput))) == [
        "permute_dims",
        "permute_dims",
        "matmul",
    ]


@I.ir_module
class FourDimensions:
    @R.function
    def main(
        x: R.Tensor(("batch", 3, "tokens", 8), "float32"), w: R.Tensor((8, 6), "float32")
    ) -> R.Tensor(("batch", 3, "tokens", 6), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            y = R.matmul(x, w)
            R.output(y)
        return y


@I.ir_module
class FourDimensionsCanonical:
    @R.function
    def main(
        x: R.Tensor(("batch", 3, "tokens", 8), "float32"), w: R.Tensor((6, 8), "float32")
    ) -> R.Tensor(("batch", 3, "tokens", 6), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            t = R.permute_dims(w)
            y = R.matmul(x, t)
            R.output(y)
        return y


def test_input_with_four_dimensions():
    assert_becomes(fc_transpose, program(FourDimensions), FourDimensionsCanonical)


@I.ir_module
class Tied:
    """An embedding whose table is also the head's weight."""

    @R.function
    def main(ids: R.Tensor(("tokens",), "int64"), w: R.Tensor((20, 8), "float32")) -> R.Tensor(
        ("tokens", 20), "float32"
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            x = R.take(w, ids, axis=0, mode="clip")
            t = R.permute_dims(w)
            y = R.matmul(x, t)
            R.output(y)
        return y


@I.ir_module
class TiedCanonical:
    @R.function
    def main(
        ids: R.Tensor(("tokens",), "int64"),
        w: R.Tensor((20, 8), "float32"),
        w_fc: R.Tensor((20, 8), "float32"),
    ) -> R.Tensor(("tokens", 20), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            x = R.take(w, ids, axis=0, mode="clip")
            t = R.permute_dims(w_fc)
            y = R.matmul(x, t)
            R.output(y)
        return y


def test_weight_tied_to_an_embedding():
    before = program(Tied)
    after = assert_becomes(fc_transpose, before, TiedCanonical)
    ids = np.array([3, 0, 19], np.int64)
    np.testing.assert_allclose(evaluate(after, ids), evaluate(before, ids), rtol=1e-5)


@I.ir_module
class Shared:
    """Two layers with one weight, a third with its transpose."""

    @R.function
    def main(x: R.Tensor(("tokens", 8), "float32"), w: R.Tensor((8, 8), "float32")) -> R.Tensor(
        ("tokens", 8), "float32"
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            a = R.matmul(x, w)
            b = R.matmul(a, w)
            t = R.permute_dims(w)
            y = R.matmul(b, t)
            R.output(y)
        return y


@I.ir_module
class SharedCanonical:
    @R.function
    def main(
        x: R.Tensor(("tokens", 8), "float32"),
        w_fc: R.Tensor((8, 8), "float32"),
        w_as_is: R.Tensor((8, 8), "float32"),
    ) -> R.Tensor(("tokens", 8), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            t0 = R.permute_dims(w_fc)
            a = R.matmul(x, t0)
            t1 = R.permute_dims(w_fc)
            b = R.matmul(a, t1)
            t2 = R.permute_dims(w_as_is)
            y = R.matmul(b, t2)
            R.output(y)
        return y


def test_weight_used_several_times_and_both_ways():
    before = program(Shared)
    after = assert_becomes(fc_transpose, before, SharedCanonical)
    assert {after.layers[name] for name in after.weights} == {"w"}
    x = np.random.default_rng(1).standard_normal((5, 8)).astype("float32")
    np.testing.assert_allclose(evaluate(after, x), evaluate(before, x), rtol=1e-4, atol=1e-4)


@I.ir_module
class Confusing:
    """The name that a turned weight would get is taken."""

    @R.function
    def main(
        x: R.Tensor(("tokens", 8), "float32"),
        w: R.Tensor((8, 6), "float32"),
        w_fc: R.Tensor((8, 6), "float32"),
    ) -> R.Tensor(("tokens", 6), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            a = R.matmul(x, w)
            b = R.matmul(x, w_fc)
            y = R.subtract(a, b)
            R.output(y)
        return y


def test_names_that_are_taken():
    before = program(Confusing)
    after = apply(fc_transpose, before)
    check_weights(after)
    assert {after.layers[name] for name in after.weights} == {"w", "w_fc"}
    x = np.random.default_rng(1).standard_normal((5, 8)).astype("float32")
    np.testing.assert_allclose(evaluate(after, x), evaluate(before, x), rtol=1e-4, atol=1e-4)


@I.ir_module
class Activations:
    @R.function
    def main(a: R.Tensor(("tokens", 8), "float32"), b: R.Tensor((8, 6), "float32")) -> R.Tensor(
        ("tokens", 6), "float32"
    ):
        R.func_attr({"num_input": 2})
        with R.dataflow():
            y = R.matmul(a, b)
            R.output(y)
        return y


@I.ir_module
class Stacked:
    """One matrix per batch index is no dense layer."""

    @R.function
    def main(
        x: R.Tensor((3, "tokens", 8), "float32"), w: R.Tensor((3, 8, 6), "float32")
    ) -> R.Tensor((3, "tokens", 6), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            y = R.matmul(x, w)
            R.output(y)
        return y


@I.ir_module
class Vector:
    @R.function
    def main(x: R.Tensor(("tokens", 8), "float32"), w: R.Tensor((8,), "float32")) -> R.Tensor(
        ("tokens",), "float32"
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            y = R.matmul(x, w)
            R.output(y)
        return y


@pytest.mark.parametrize("module", [Activations, Stacked, Vector])
def test_leaves_alone(module):
    assert_unchanged(fc_transpose, program(module))
