"""Orders of inputs in which N:M keeps more, and models that compute the same in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx_models import build

from sparse_tvm.cli import main
from sparse_tvm.errors import OptionError
from sparse_tvm.frontends.onnx.weights import find_weights
from sparse_tvm.models.bert import BertConfig, build_bert
from sparse_tvm.sparsity.channels import reorder
from sparse_tvm.sparsity.masks import keep_n_of_m
from sparse_tvm.sparsity.pattern import Goal
from sparse_tvm.sparsity.permutation import better_order, kept_share
from sparse_tvm.sparsity.pruning import own_copy, prune


def drawn(*shape: int) -> np.ndarray:
    """Values whose last axis has channels of very different size."""
    rng = np.random.default_rng(shape)
    scale = rng.lognormal(0, 1, shape[-1])
    return (rng.standard_normal(shape) * scale).astype(np.float32)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (3, 8)])
def test_more_is_kept(n, m):
    w = drawn(48, 96)
    order = better_order(w, n, m)
    np.testing.assert_array_equal(np.sort(order), np.arange(96))
    assert kept_share(w[:, order], n, m) > kept_share(w, n, m) + 0.01


def test_the_best_order_of_a_weight_made_for_one():
    rng = np.random.default_rng(0)
    w = rng.uniform(1, 2, (32, 64)).astype(np.float32)
    w *= keep_n_of_m(rng.random(w.shape), 2, 4)
    mixed = w[:, rng.permutation(64)]
    assert kept_share(mixed, 2, 4) < 0.9
    assert kept_share(mixed[:, better_order(mixed, 2, 4)], 2, 4) > 0.93


def test_what_cannot_be_better():
    w = np.zeros((4, 8), np.float32)
    assert kept_share(w, 2, 4) == 1.0
    np.testing.assert_array_equal(np.sort(better_order(w, 2, 4)), np.arange(8))
    one = drawn(4, 4)
    np.testing.assert_array_equal(np.sort(better_order(one, 2, 4)), np.arange(4))


def feed_forward() -> onnx.ModelProto:
    """``gelu(x w^T + b) v^T + x`` spelled out, gated, and a Gemm with another function."""
    return build(
        "(float[N,16] x) => (float[N,16] y, float[N,8] z) {"
        " m = MatMul(x,w) s = Add(m,b) d = Div(s,root) e = Erf(d) o = Add(e,one) p = Mul(s,o)"
        " g = MatMul(x,u) a = Mul(p,g) h = Mul(a,half) c = Mul(h,scales)"
        " r = MatMul(c,v) y = Add(r,x)"
        " q = Gemm<transB=1>(x,i,j) l = Relu(q) z = Gemm<transB=1>(l,k) }",
        w=drawn(16, 32),
        u=drawn(16, 32),
        b=drawn(32),
        scales=drawn(1, 32),
        root=np.float32(2**0.5),
        one=np.float32(1),
        half=np.full(1, 0.5, np.float32),
        v=drawn(32, 16),
        i=drawn(24, 16),
        j=drawn(24),
        k=drawn(8, 24),
    )


def outputs(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})


def test_the_model_computes_the_same():
    model = own_copy(feed_forward())
    before = own_copy(model)
    refs = find_weights(model)
    goals = {ref.layer: Goal.parse("2:4", None) for ref in refs}
    found, changed = reorder(model, refs, refs, goals)
    by_name = {one.name: one for one in found}
    assert {name for name, one in by_name.items() if not one.reason} == {"v", "k"}
    assert all(by_name[name].after > by_name[name].before for name in "vk")
    assert by_name["w"].reason == "x is an input of the model"
    assert changed == ["b", "i", "j", "k", "scales", "u", "v", "w"]
    x = drawn(5, 16)
    for ours, theirs in zip(outputs(model, x), outputs(before, x), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        ("h = MatMul(x,w) y = MatMul(h,v) z = Softmax(h)", "Softmax reads its inputs, too"),
        ("h = MatMul(x,w) y = MatMul(h,v) z = Relu(h)", "z is an output of the model"),
        ("m = MatMul(x,w) h = Softmax(m) y = MatMul(h,v) z = Relu(x)", "come out of Softmax"),
        ("m = MatMul(x,w) h = Add(m,c) y = MatMul(h,v) z = Mul(x,c)", "c is used elsewhere, too"),
        ("h = MatMul(x,w) g = MatMul(h,v) y = MatMul(g,v) z = Relu(x)", "v is shared by several"),
        ("h = MatMul(x,w) t = Transpose(h) y = Gemm<transA=1>(t,v) z = Relu(x)", "channels first"),
    ],
)
def test_what_ties_channels(graph, reason):
    text = "(float[8,8] x) => (float[8,8] y, float[8,8] z) {" + graph + "}"
    model = build(text, w=drawn(8, 8), v=drawn(8, 8), c=drawn(8))
    before = own_copy(model)
    refs = find_weights(model)
    goals = {ref.layer: Goal.parse("2:4", None) for ref in refs}
    found, changed = reorder(model, refs, refs, goals)
    assert reason in next(one.reason for one in found if one.name == "v")
    assert not changed
    assert model == before


def test_layers_with_other_goals_stay():
    model = own_copy(feed_forward())
    refs = find_weights(model)
    goals = {ref.layer: Goal.parse("4x1", 0.5) for ref in refs}
    assert reorder(model, refs, refs, goals) == ([], [])


def test_prune(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = BertConfig(
        layers=2, hidden=32, heads=2, intermediate=64, vocabulary=50, max_positions=16
    )
    onnx.save(build_bert(config, sequence=8), tmp_path / "bert.onnx")
    source, output = str(tmp_path / "bert.onnx"), str(tmp_path / "pruned.onnx")
    assert main(["prune", source, "-o", output, "--structure", "2:4", "--permute"]) == 0
    shown = capsys.readouterr().out
    assert "reordered" in shown
    report = prune(source, output, structure="2:4", permute=True)
    done = [one for one in report.reordered if not one.reason]
    assert len(done) == 2
    assert all("output" in one.name and one.after > one.before for one in done)
    assert all(layer.structure.startswith("2:4") for layer in report.layers)


def test_blocks_have_no_order(tmp_path: Path):
    with pytest.raises(OptionError, match="does nothing for structure 4x1"):
        prune(feed_forward(), tmp_path / "y.onnx", structure="4x1", sparsity=0.5, permute=True)
