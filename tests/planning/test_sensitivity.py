"""The error of a setting is what pruning really removes."""

from __future__ import annotations

import numpy as np
import pytest

from sparse_tvm.errors import OptionError
from sparse_tvm.planning.sensitivity import errors_of, measured_errors
from sparse_tvm.planning.settings import DENSE, Setting, settings_of
from sparse_tvm.sparsity.masks import prune_array

RNG = np.random.default_rng(0)
SETTINGS = [
    Setting("unstructured", 0.8),
    Setting("unstructured", 0.5),
    Setting("4x1", 0.9),
    Setting("16x1", 0.75),
    Setting.parse("2:4"),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_errors_are_those_of_the_pruned_weight(setting: Setting) -> None:
    w = RNG.standard_normal((48, 64), np.float32)
    pruned = prune_array(w, setting.sparsity, setting.structure)
    lost = np.sum(np.square(w - pruned)) / np.sum(np.square(w))
    assert errors_of(w, SETTINGS)[setting] == pytest.approx(lost, rel=1e-5)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_measured_errors_are_those_of_the_outputs(setting: Setting) -> None:
    w = RNG.standard_normal((48, 64), np.float32)
    mixed = RNG.standard_normal((64, 64), np.float32)
    x = RNG.standard_normal((500, 64), np.float32) @ mixed
    pruned = prune_array(w, setting.sparsity, setting.structure)
    lost = np.sum(np.square(x @ (w - pruned).T)) / np.sum(np.square(x @ w.T))
    found = measured_errors(w, [DENSE, *SETTINGS], x.T @ x / len(x))
    assert found[setting] == pytest.approx(lost, rel=1e-4)
    assert found[DENSE] == 0


def test_a_layer_left_alone_has_no_error_and_one_of_zeros_neither() -> None:
    w = RNG.standard_normal((16, 16), np.float32)
    assert errors_of(w, [DENSE])[DENSE] == 0
    assert errors_of(np.zeros_like(w), SETTINGS)[SETTINGS[0]] == 0


@pytest.mark.parametrize(
    ("text", "structure", "sparsity"),
    [
        ("90%:4x1", "4x1", 0.9),
        ("0.9:4x1", "4x1", 0.9),
        ("80%", "unstructured", 0.8),
        ("92.5%:16x1", "16x1", 0.925),
        ("2:4", "2:4", 0.5),
    ],
)
def test_settings_are_read(text: str, structure: str, sparsity: float) -> None:
    found = Setting.parse(text)
    assert (found.structure, found.sparsity) == (structure, pytest.approx(sparsity))
    assert Setting.parse(str(found)) == found


@pytest.mark.parametrize("text", ["", "90", "x%:4x1", "100%", "90%:4", "90%:2:4", "4x1", "4:2"])
def test_other_settings_are_refused(text: str) -> None:
    with pytest.raises(OptionError):
        Setting.parse(text)


def test_n_of_m_has_one_setting() -> None:
    assert settings_of("2:4") == [Setting("2:4", 0.5)]
    assert len(settings_of("4x1")) > 5
