"""Attention on tensor cores: heads, masks and rows of every kind, against NumPy."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes  # noqa: F401 - NumPy has bfloat16 by it
import numpy as np
import pytest
from gpu_harness import run

from sparse_tvm.families import Extents
from sparse_tvm.operators import PRECISIONS, Attention
from sparse_tvm.schedules.cuda.attention import AttentionProblem, attention

pytestmark = pytest.mark.usefixtures("gpu")

LOWEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class Case:
    """Extents of an attention."""

    batch: int = 1
    heads: int = 2
    queries: int = 16
    keys: int = 16
    size: int = 32
    value_size: int = 32
    mask: tuple[bool, bool, bool, bool] | None = None
    known: bool = True
    dtype: str = "float16"
    out: str = "float16"


def expected(case: Case, q, k, v, mask, scale: float) -> np.ndarray:
    """The definition, in float64."""

    def heads(x: np.ndarray, size: int) -> np.ndarray:
        batch, rows, _ = x.shape
        return x.astype(np.float64).reshape(batch, rows, case.heads, size).swapaxes(1, 2)

    scores = heads(q, case.size) @ heads(k, case.size).swapaxes(2, 3) * scale
    if mask is not None:
        scores = scores + mask
    with np.errstate(invalid="ignore"):
        powers = np.exp(scores - scores.max(-1, keepdims=True))
        weights = np.nan_to_num(powers / powers.sum(-1, keepdims=True))
    merged = (weights @ heads(v, case.value_size)).swapaxes(1, 2)
    return merged.reshape(case.batch, case.queries, -1)


def compare(case: Case, mask: np.ndarray | None = None, factor: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng([case.batch, case.heads, case.queries, case.keys, case.size])

    def draw(rows: int, size: int) -> np.ndarray:
        return rng.standard_normal((case.batch, rows, case.heads * size)).astype(case.dtype)

    q, k = (draw(case.queries, case.size) * factor).astype(case.dtype), draw(case.keys, case.size)
    v = draw(case.keys, case.value_size)
    extents = (case.batch, case.heads, case.queries, case.keys)
    if case.mask is not None and mask is None:
        shape = [n if has else 1 for n, has in zip(extents, case.mask, strict=True)]
        mask = np.where(rng.random(shape) < 0.3, LOWEST, rng.standard_normal(shape))
    op = Attention(
        heads=case.heads,
        scale=case.size**-0.5,
        mask=case.mask,
        types=PRECISIONS["fp16" if case.dtype == "float16" else "bf16"],
        sizes=(case.size, case.value_size),
    )
    arrays = [q, k, v] if mask is None else [q, k, v, mask.astype(np.float32)]
    y = np.empty((case.batch, case.queries, case.heads * case.value_size), case.out)

    def described(array: np.ndarray) -> Extents:
        shape = array.shape
        if not case.known:
            axes = case.mask if len(shape) == 4 else (True, True, False)
            shape = tuple(None if has else n for n, has in zip(shape, axes, strict=True))
        return Extents(shape, str(array.dtype))

    described_mask = described(arrays[3]) if mask is not None else None
    problem = AttentionProblem(op, *map(described, (q, k, v)), described_mask, described(y))
    found = run(attention(problem), arrays, y).astype(np.float64)
    wanted = expected(case, q, k, v, mask, op.scale)
    tolerance = 2e-3 if case.dtype == "float16" else 1.6e-2
    np.testing.assert_allclose(found, wanted, atol=tolerance * max(1.0, np.abs(wanted).max()))
    return found


@pytest.mark.parametrize("size", [8, 32, 40, 64, 80, 96, 128])
def test_heads(size):
    compare(Case(size=size, value_size=size, queries=17, keys=33))


def test_values_of_another_size():
    compare(Case(size=24, value_size=56))
    compare(Case(size=64, value_size=16, out="float32"))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 130), (70, 64), (197, 197), (130, 128)])
def test_rows(queries, keys, known):
    compare(Case(queries=queries, keys=keys, known=known, heads=1))


@pytest.mark.parametrize("batch", [3, 20])
def test_batches(batch):
    compare(Case(batch=batch, heads=3, queries=40, keys=70))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "mask",
    [tuple(bool(number >> bit & 1) for bit in range(4)) for number in range(1, 16)],
)
def test_masks(mask, known):
    compare(Case(batch=2, heads=2, queries=21, keys=69, mask=mask, known=known))


def test_more_queries_than_a_small_block_has():
    compare(Case(batch=60, heads=2, queries=100, keys=16, size=16, value_size=16))


def test_a_query_without_any_key():
    case = Case(queries=20, keys=70, mask=(False, False, True, True))
    mask = np.zeros((1, 1, 20, 70))
    mask[..., 3, :], mask[..., 4, :], mask[..., 5, 7:] = -np.inf, LOWEST, -np.inf
    found = compare(case, mask)
    np.testing.assert_array_equal(found[:, 3], 0)  # as where a guard replaces NaN


def test_parts_of_one_tensor():
    case = Case(batch=2, queries=19, keys=19, size=24, value_size=32)
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 2, 19, 48)).astype(np.float16)
    v = rng.standard_normal((2, 19, 64)).astype(np.float16)
    op = Attention(
        heads=2, scale=0.2, types=PRECISIONS["fp16"], sizes=(24, 32), starts=(64, 112, 0)
    )
    packed = np.concatenate([v, q, k], axis=-1)
    x, y = Extents((2, 19, 160), "float16"), np.empty((2, 19, 64), np.float16)
    kernel = attention(AttentionProblem(op, x, x, x, None, Extents(y.shape, "float16")))
    wanted = expected(case, q, k, v, None, 0.2)
    np.testing.assert_allclose(run(kernel, [packed] * 3, y), wanted, atol=4e-3)


@pytest.mark.parametrize("out", ["bfloat16", "float32"])
def test_bfloat16(out):
    compare(Case(queries=40, keys=70, size=64, value_size=64, dtype="bfloat16", out=out))


def test_large_scores():
    compare(Case(queries=18, keys=100), factor=100)
