"""The zoo of model families: what it lists, and how it tells their ends apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zoo
import zoo_doors


def test_it_lists_families_of_all_kinds_and_doors() -> None:
    families = zoo.families()
    assert len(families) >= 120
    kinds = {family.kind for family in families.values()}
    assert kinds >= {
        "text encoder",
        "decoder",
        "decoder with cache",
        "vision",
        "detection",
        "segmentation",
        "audio",
        "recurrent",
        "recommendation",
    }
    doors = {family.door for family in families.values()}
    assert doors == {"Hugging Face", *zoo_doors._DOORS, *zoo_doors.TENSORFLOW}


def test_masks_begin_or_end_with_zeros() -> None:
    mask = zoo._padded(np.ones((6, 40), np.int64), np.random.default_rng(0))
    assert (mask[:, 20] == 1).all()
    assert (mask[::2, -1] == 1).all()
    assert (mask[1::2, 0] == 1).all()
    assert (mask == 0).any(1).sum() >= 4


@pytest.mark.parametrize(
    ("found", "wanted", "least"),
    [
        ([1.0, np.nan], [1.0, np.nan], 0.0),
        ([1.0, 2.2], [1.0, 2.0], 0.1),
        ([-np.inf, 1.0], [-np.inf, 1.0], 0.0),
        ([True], [False], np.inf),
    ],
)
def test_differences_are_of_the_largest_value(
    found: list[float], wanted: list[float], least: float
) -> None:
    assert zoo._difference(np.array(found), np.array(wanted)) == pytest.approx(least)


def test_a_nan_where_none_is_due_is_wrong() -> None:
    assert not zoo._difference(np.array([np.nan]), np.array([1.0])) <= zoo.TOLERANCE


CRASHES = """
import json, os, sys
from pathlib import Path
import zoo, zoo_doors

def crashes(folder):
    os.write(2, b"about to end\\n")
    os._exit(6)

family = zoo_doors.Family("crashes", "none", zoo_doors.LEGACY, crashes)
zoo.families = lambda: {"crashes": family}
zoo._import_once = lambda: None
(result,) = zoo.results_of([family], 1, Path(sys.argv[1]))
print(json.dumps(result))
"""


def test_a_process_that_ends_is_a_crash(tmp_path: Path) -> None:
    """The log of one that fails is kept, and its last line is the reason.

    In a fresh process, as the zoo forks: this one may have grown too large to be copied.
    """
    command = [sys.executable, "-c", CRASHES, str(tmp_path)]
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout)
    assert (result["end"], result["why"]) == ("crash", "6: about to end")
    assert "about to end" in (tmp_path / "crashes.log").read_text()


def test_the_page_tells_which_commit_its_rows_are_of() -> None:
    listed = {name: zoo_doors.Family(name, "vision", zoo_doors.PT2, Path) for name in "abcde"}
    ends = {"a": "4f", "b": "4f", "c": "2e", "d": "", "e": "4f"}
    results = {
        name: {"end": "pass", "why": "", "difference": 1e-7, "commit": commit}
        for name, commit in ends.items()
    }
    results["e"]["end"] = "unbuilt"
    text = zoo.page(results, listed)
    assert "By the commit that was run: 2 on `4f`, 1 on `2e`, 1 before." in text
    assert "4 of the 5 families that it lists, but for 1 that" in text
