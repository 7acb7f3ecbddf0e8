"""Random inputs fit any model, and reach what it reads."""

from __future__ import annotations

import numpy as np
import pytest

from sparse_tvm.errors import OptionError
from sparse_tvm.random_inputs import random_inputs, sizes_of, typical_sizes
from sparse_tvm.spec import TensorSpec

IDS = TensorSpec("input_ids", "int64", ("batch", "sequence"), values=(0, 30522))
MASK = TensorSpec("attention_mask", "int64", ("batch", "sequence"))


def test_they_fit_any_model() -> None:
    specs = [
        TensorSpec("pixels", "float32", ("batch", 3)),
        TensorSpec("input_ids", "int64", (1, 200)),
        TensorSpec("token_type_ids", "int32", (1, 4)),
        TensorSpec("flag", "bool", (50,)),
    ]
    first, again = random_inputs(specs), random_inputs(specs)
    for spec in specs:
        assert first[spec.name].dtype == spec.dtype
        np.testing.assert_array_equal(first[spec.name], again[spec.name])
    assert first["pixels"].shape == (1, 3)
    assert set(first["input_ids"].ravel()) == {0, 1}
    assert not first["token_type_ids"].any()
    assert not np.array_equal(random_inputs(specs, seed=1)["pixels"], first["pixels"])


def test_integers_spread_over_the_rows_of_their_table() -> None:
    ids = random_inputs([IDS], sizes={"batch": 8, "sequence": 128})["input_ids"]
    assert ids.shape == (8, 128)
    assert ids.min() >= 0
    assert 15000 < ids.max() < 30522
    assert len(np.unique(ids)) > 900
    types = TensorSpec("token_type_ids", "int64", (4, 64), values=(0, 2))
    assert set(random_inputs([types])["token_type_ids"].ravel()) == {0, 1}


def test_masks_end_in_zeros_in_some_rows() -> None:
    mask = random_inputs([MASK], sizes={"batch": 64, "sequence": 32})["attention_mask"]
    lengths = mask.sum(axis=1)
    np.testing.assert_array_equal(mask, np.arange(32) < lengths[:, None])
    assert lengths.min() >= 16
    assert lengths.max() == 32
    assert len(set(lengths)) > 5
    single = random_inputs([MASK], sizes={"batch": 9, "sequence": 1})["attention_mask"]
    assert single.all()
    wide = TensorSpec("mask", "bool", (1, 1, 4, 4))
    assert random_inputs([wide])["mask"].all()


def test_typical_sizes_stay_in_bounds() -> None:
    assert typical_sizes([IDS, MASK], {}) == {"batch": 1, "sequence": 128}
    assert typical_sizes([IDS], {"sequence": (1, 77)}) == {"batch": 1, "sequence": 77}
    assert typical_sizes([IDS], {"batch": (4, 8)}, others=7) == {"batch": 4, "sequence": 7}
    assert typical_sizes([TensorSpec("x", "float32", (1, 2))], {}) == {}
    image = TensorSpec("x", "float32", (1, "h", "w"), multiples=(1, 32, 5))
    assert TensorSpec.from_json(image.as_json()).multiples == image.multiples
    assert typical_sizes([image], {"h": (33, 1000), "w": (1, 7)}) == {"h": 128, "w": 5}
    assert typical_sizes([image], {"h": (33, 1000)}, others=33) == {"h": 64, "w": 30}


def test_specs_survive_json() -> None:
    for spec in (IDS, MASK):
        again = TensorSpec.from_json(spec.as_json())
        assert again == spec
        assert again.values == spec.values


def test_sizes_are_taken_from_shapes() -> None:
    specs = [TensorSpec("ids", "int64", ("batch", "n")), TensorSpec("x", "float32", ("batch", 4))]
    assert sizes_of(specs, {"ids": (2, 8)}) == {"batch": 2, "n": 8}
    assert sizes_of(specs, {"ids": (2, 8), "x": (2, 4)}) == {"batch": 2, "n": 8}


@pytest.mark.parametrize(
    "shapes", [{"y": (1,)}, {"ids": (1,)}, {"x": (1, 5)}, {"ids": (2, 8), "x": (3, 4)}]
)
def test_shapes_that_do_not_fit_are_refused(shapes: dict[str, tuple[int, ...]]) -> None:
    specs = [TensorSpec("ids", "int64", ("batch", "n")), TensorSpec("x", "float32", ("batch", 4))]
    with pytest.raises(OptionError, match="--shape"):
        sizes_of(specs, shapes)
