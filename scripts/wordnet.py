"""Real English for calibration, distillation and scores: the glosses of WordNet 3.0.

Debian has them in the package wordnet-base; any folder with WordNet's data files will do.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

DIRECTORY = Path("/usr/share/wordnet")
PARTS = ("noun", "verb", "adj", "adv")
HELD_OUT = 1000
MIN_WORDS = 5


def glosses_by_part(directory: Path = DIRECTORY) -> dict[str, set[str]]:
    """Return the glosses, without their examples, of each part of speech."""
    found: dict[str, set[str]] = {}
    for part in PARTS:
        path = directory / f"data.{part}"
        if not path.is_file():
            sys.exit(f"error: no {path}: apt-get install wordnet-base, or give --wordnet")
        found[part] = set()
        for line in path.read_text(encoding="latin-1").splitlines():
            if not line.startswith("  "):  # the licence
                gloss = line.partition("| ")[2].partition('; "')[0].strip()
                if len(gloss.split()) >= MIN_WORDS:
                    found[part].add(gloss)
    return found


def glosses(directory: Path = DIRECTORY) -> tuple[list[str], list[str]]:
    """Return the glosses to train with and those held out, shuffled."""
    shuffled = sorted(set().union(*glosses_by_part(directory).values()))
    random.Random(0).shuffle(shuffled)
    return shuffled[HELD_OUT:], shuffled[:HELD_OUT]
