"""Pruned weights in a small file, and the MiniLM that the quickstart compiles."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from sparse_tvm.errors import ModelError, SparseTvmError
from sparse_tvm.models import minilm
from sparse_tvm.models.packed import load_packed, save_packed
from sparse_tvm.sparsity.masks import prune_array

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.mark.parametrize(("block", "structure"), [("4x1", "4x1"), ("1x1", "unstructured")])
def test_weights_survive(tmp_path, block, structure):
    # Neither size is a multiple of the block's.
    weight = prune_array(
        np.random.default_rng(0).standard_normal((30, 17)).astype(np.float16), 0.8, structure
    )
    weights = {"w": weight.astype(np.float32), "b": np.array([1 / 3, 0], np.float32)}
    save_packed(tmp_path / "w.npz", weights, block, {"seed": 3})
    found, facts = load_packed(tmp_path / "w.npz")
    assert facts == {"seed": 3, "block": block}
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], weight)


def test_equal_weights_make_equal_files(tmp_path):
    weights = {"w": np.eye(8, dtype=np.float32)}
    for name in ("a", "b"):
        save_packed(tmp_path / name, weights, "1x1", {})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"something else"])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "w.npz"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"w\.npz holds no packed weights"):
        load_packed(path)


def test_other_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "w.npz", x=np.zeros(3))
    with pytest.raises(ModelError, match=r"w\.npz holds no packed weights"):
        load_packed(tmp_path / "w.npz")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"none\.npz holds no packed weights"):
        load_packed(tmp_path / "none.npz")


@pytest.fixture(scope="module")
def quickstart():
    try:
        minilm.model_directory()
    except SparseTvmError as error:
        pytest.skip(str(error))
    sys.path.insert(0, str(SCRIPTS))
    try:
        import minilm as script
    finally:
        sys.path.remove(str(SCRIPTS))
    return script


@pytest.fixture(scope="module", params=[("90-4x1", 0.9, 4), ("80-unstructured", 0.8, 1)])
def pruned(quickstart, request):
    name, sparsity, rows = request.param
    path = quickstart.PRUNED.parent / f"{name}.npz"
    return minilm.build_minilm(sequence=32, pruned=path), sparsity, rows


def test_so_many_blocks_are_zero(pruned):
    model, sparsity, rows = pruned
    matrices = [
        weight
        for tensor in model.graph.initializer
        if (weight := numpy_helper.to_array(tensor)).ndim == 2
        and weight.shape in {(384, 384), (384, 1536), (1536, 384)}
    ]
    assert len(matrices) == 36
    kept, blocks = 0, 0
    for weight in matrices:  # [inputs, outputs]
        occupied = weight.reshape(len(weight), -1, rows).any(axis=-1)
        kept, blocks = kept + occupied.sum(), blocks + occupied.size
    assert 1 - kept / blocks == pytest.approx(sparsity, abs=1e-3)


def test_neighbours_stay(quickstart, pruned):
    ours, theirs = (
        embed(model, quickstart.SENTENCES)
        for model in (pruned[0], minilm.build_minilm(sequence=32))
    )
    assert quickstart.nearest(ours) == quickstart.nearest(theirs)
    assert (ours * theirs).sum(axis=1).mean() > 0.6


def test_weights_of_another_model_are_refused(quickstart, tmp_path):
    save_packed(tmp_path / "w.npz", {"encoder.x": np.eye(3, dtype=np.float32)}, "1x1", {})
    with pytest.raises(ModelError, match=r"w\.npz is of another model: encoder\.x \(3, 3\)"):
        minilm.build_minilm(pruned=tmp_path / "w.npz")


def embed(model: onnx.ModelProto, sentences: tuple[str, ...]) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return minilm.embed(lambda feed: session.run(None, feed)[0], sentences, sequence=32)
