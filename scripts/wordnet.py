"""Real English for calibration, distillation and scores: the glosses of WordNet 3.0.

Debian has them in the package wordnet-base; any folder with WordNet's data files will do.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

DIRECTORY = Path("/usr/share/wordnet")
PARTS = ("noun", "verb", "adj", "adv")
HELD_OUT = 1000
MIN_WORDS = 5
FIELDS = 45
"""WordNet's lexicographer files: noun.animal, verb.motion and so on."""


def glosses_by_part(directory: Path = DIRECTORY) -> dict[str, set[str]]:
    """Return the glosses, without their examples, of each part of speech."""
    return {part: {gloss for gloss, _ in _entries(directory, part)} for part in PARTS}


def glosses(directory: Path = DIRECTORY) -> tuple[list[str], list[str]]:
    """Return the glosses to train with and those held out, shuffled."""
    shuffled = sorted(set().union(*glosses_by_part(directory).values()))
    random.Random(0).shuffle(shuffled)
    return shuffled[HELD_OUT:], shuffled[:HELD_OUT]


def fields_of_glosses(directory: Path = DIRECTORY) -> dict[str, int]:
    """Return which of the `FIELDS` each gloss is in; those in several are left out."""
    found: dict[str, set[int]] = {}
    for part in PARTS:
        for gloss, field in _entries(directory, part):
            found.setdefault(gloss, set()).add(field)
    return {gloss: fields.pop() for gloss, fields in found.items() if len(fields) == 1}


def _entries(directory: Path, part: str) -> Iterator[tuple[str, int]]:
    """Yield the glosses of a part of speech, each with the number of its lexicographer file."""
    path = directory / f"data.{part}"
    if not path.is_file():
        sys.exit(f"error: no {path}: apt-get install wordnet-base, or give --wordnet")
    for line in path.read_text(encoding="latin-1").splitlines():
        if line.startswith("  "):  # the licence
            continue
        gloss = line.partition("| ")[2].partition('; "')[0].strip()
        if len(gloss.split()) >= MIN_WORDS:
            yield gloss, int(line.split(maxsplit=2)[1])
