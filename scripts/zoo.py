"""Compile a zoo of model families, and compare each with its own framework.

python scripts/zoo.py [--only REGEX] [--jobs 1] [--results zoo.jsonl] [--keep FOLDER]

Every family is small, has random weights of which 90 % are zeros, and is compiled and verified in
a process of its own. Then it runs on inputs other than those of `--verify`: other batches and
lengths, masks that end early or begin late, other magnitudes. It ends in one of these ways:

    pass      equal to its framework's outputs, everywhere
    refused   by an error that is meant for users
    wrong     another result
    internal  any other error
    crash     the process ended, or did not in 300 s of CPU time
    unbuilt   the framework itself cannot export or run the family

The environment is that of scripts/test_sources.sh, with torchvision and timm. Results are added to
the file as they come; families that are there are not run again, unless they are named by --redo.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
from zoo_doors import TENSORFLOW, Family, Subject, Unbuilt, quietly, torchvision

os.environ.update(OMP_NUM_THREADS="1", TF_CPP_MIN_LOG_LEVEL="3")

SECONDS = 300  # of CPU time
WALL_SECONDS = 3600
TOLERANCE = 1e-3  # of the largest value of an output
SIZES = ((2, 19), (5, 40), (1, 1), (3, 64))  # of first and other symbolic dimensions
ORDER = ("pass", "refused", "wrong", "internal", "crash", "unbuilt")

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
HEAD = """# Families

What becomes of small models of many families, with random weights of which 90 % are zeros. This
page is made by `python scripts/zoo.py --page` from what `python scripts/zoo.py` saw so far, which
is {count} of the {listed} families that it lists{unbuilt}.
{passed} of them compile, are verified, and equal their own framework on other inputs too: other
batches and lengths, masks that end early or begin late, other magnitudes.
{runs}
*Difference* is the largest from the framework, relative to an output's largest value.

| family | kind | door | ends | difference |
|---|---|---|---|---|
"""

Result = dict[str, Any]


def families() -> dict[str, Family]:
    """Return all families by name, those of the same kind beside each other."""
    import zoo_audio
    import zoo_tables
    import zoo_text
    import zoo_vision

    listed = [*zoo_text.FAMILIES, *zoo_vision.FAMILIES, *zoo_audio.FAMILIES, *zoo_tables.FAMILIES]
    return {family.name: family for family in listed}


def outcome(family: Family, folder: Path) -> Result:
    """Build, compile and compare a family: how it ends, why, and by how much it differs."""
    import sparse_tvm
    from sparse_tvm.errors import BuildError, SparseTvmError, VerificationError
    from sparse_tvm.frontends.detect import open_source
    from sparse_tvm.frontends.source import SourceOptions

    try:
        with quietly():
            subject = family.build(folder)
    except Exception as error:
        return {"end": "unbuilt", "why": _one_line(error)}
    try:
        started = time.perf_counter()
        path = folder / "model.so"
        source = open_source(subject.model, SourceOptions(**subject.options))
        compiled = sparse_tvm.compile(source, path, threads=1, **subject.options)
        seconds = time.perf_counter() - started
        found = compare(subject, sparse_tvm.load(path), source.reference(threads=1))
    except Unbuilt as error:
        return {"end": "unbuilt", "why": _one_line(error)}
    except VerificationError as error:
        return {"end": "wrong", "why": _one_line(error)}
    except BuildError as error:
        return {"end": "internal", "why": _one_line(error)}
    except SparseTvmError as error:
        return {"end": "refused", "why": _one_line(error)}
    except Exception as error:
        import traceback

        traceback.print_exc()
        return {"end": "internal", "why": f"{type(error).__name__}: {_one_line(error)}"}
    layers = compiled.manifest["layers"]
    return {**found, "layers": len(layers), "seconds": round(seconds, 1)}


def compare(subject: Subject, model: Any, reference: Any) -> Result:
    """Run the artifact and the framework on other inputs."""
    from sparse_tvm.errors import InputError

    largest, moved, previous = 0.0, False, None
    compared = 0
    for sizes, feeds in _other_inputs(model, subject):
        try:
            outputs = model.run(feeds)
        except InputError as error:
            if compared or not sizes:
                raise
            print(f"{sizes}: {error}")  # sizes below the least: the next ones fit
            continue
        try:
            expected = reference.run(feeds, list(outputs))
        except Exception as error:
            if _too_small(sizes):
                continue  # exporters do not promise batches and lengths of 1
            raise Unbuilt(f"{reference.engine} fails with {sizes}: {_one_line(error)}") from error
        compared += 1
        for name, wanted in expected.items():
            at = f"{name} with {sizes}" if sizes else name
            if outputs[name].shape != wanted.shape:
                return {"end": "wrong", "why": f"{at}: {outputs[name].shape}, not {wanted.shape}"}
            seen = slice(None) if subject.compares_padding else _tokens_seen(feeds, wanted)
            difference = _difference(outputs[name][seen], wanted[seen])
            largest = max(largest, difference)
            if not difference <= TOLERANCE:
                return {"end": "wrong", "why": f"{at} differs by {difference:.3g} of its largest"}
        first = next(iter(expected.values()))
        moved |= previous is not None and (
            first.shape != previous.shape or not np.array_equal(first, previous)
        )
        previous = first
    if not compared:
        raise Unbuilt("no inputs could be compared")
    if not moved:
        raise Unbuilt("its outputs do not depend on its inputs")
    return {"end": "pass", "why": "", "difference": largest, "compared": compared}


def _other_inputs(model: Any, subject: Subject) -> Iterator[tuple[dict[str, int], dict[str, Any]]]:
    """Yield sizes and inputs that `--verify` does not use."""
    from sparse_tvm.random_inputs import random_inputs, typical_sizes

    seen: list[dict[str, int]] = []
    for seed, (first, others) in enumerate(SIZES, start=11):
        sizes = typical_sizes(model.inputs, model.bounds, first=first, others=others)
        sizes.update({n: s for n, s in subject.sizes.items() if n in sizes and first > 1})
        if sizes and sizes in seen:
            continue
        seen.append(sizes)
        rng = np.random.default_rng(seed)
        feeds = random_inputs(model.inputs, seed=seed, sizes=sizes)
        for name, array in feeds.items():
            if "attention_mask" in name and array.ndim == 2 and subject.padded:
                feeds[name] = _padded(array, rng)
            elif np.issubdtype(array.dtype, np.floating):
                feeds[name] = array * np.float32(rng.choice([0.3, 1.0, 2.0]))
        yield sizes, subject.adapt(feeds)


def _tokens_seen(feeds: dict[str, Any], output: np.ndarray) -> Any:
    """Index what an output says of tokens that are not masked, if it is one of tokens."""
    mask = feeds.get("attention_mask")
    return mask != 0 if mask is not None and output.shape[:2] == mask.shape else slice(None)


def _padded(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mask the beginnings of half of the rows, and the ends of the others."""
    rows, columns = mask.shape
    padding = rng.integers(0, columns // 2 + 1, (rows, 1))
    left = np.arange(columns) >= padding
    right = np.arange(columns) < columns - padding
    return np.where(np.arange(rows)[:, None] % 2 == 0, left, right).astype(mask.dtype)


def _too_small(sizes: dict[str, int]) -> bool:
    return any(size == 1 for size in sizes.values())


def _difference(found: np.ndarray, wanted: np.ndarray) -> float:
    if wanted.dtype == bool or np.issubdtype(wanted.dtype, np.integer):
        return 0.0 if np.array_equal(found, wanted) else float("inf")
    scale = max(float(np.abs(wanted[np.isfinite(wanted)]).max(initial=0)), 1e-3)
    same = (found == wanted) | (np.isnan(found) & np.isnan(wanted))
    with np.errstate(invalid="ignore"):
        return float(np.where(same, 0, np.abs(found - wanted)).max(initial=0)) / scale


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__


@dataclass
class Running:
    """A family that runs in a process of its own."""

    name: str
    process: Any
    folder: tempfile.TemporaryDirectory[str]
    started: float

    @classmethod
    def start(cls, family: Family) -> Running:
        folder = tempfile.TemporaryDirectory()
        # TensorFlow must come before what is imported here already.
        way = "spawn" if family.door in TENSORFLOW else "fork"
        context: Any = multiprocessing.get_context(way)
        process = context.Process(target=run_one, args=(family.name, Path(folder.name)))
        process.start()
        return cls(family.name, process, folder, time.perf_counter())

    def ended(self) -> bool:
        late = time.perf_counter() - self.started > WALL_SECONDS
        return late or not self.process.is_alive()

    def result(self, keep: Path | None) -> Result:
        """Return how it ended, after the process, which is killed if it still runs."""
        self.process.kill()
        self.process.join()
        seconds = round(time.perf_counter() - self.started, 1)
        folder = Path(self.folder.name)
        log, written = folder / "log", folder / "result.json"
        if written.exists():
            result = json.loads(written.read_text())
        else:
            code = self.process.exitcode
            lines = [line for line in log.read_text(errors="replace").split("\n") if line.strip()]
            result = {"end": "crash", "why": f"{code}: {lines[-1][:300] if lines else ''}"}
        if keep and result["end"] != "pass":
            keep.mkdir(parents=True, exist_ok=True)
            (keep / f"{self.name}.log").write_bytes(log.read_bytes())
        self.folder.cleanup()
        return {"family": self.name, **result, "wall": seconds, "commit": commit()}


@functools.cache
def commit() -> str:
    """Return the commit that is run, and whether it was changed since; nothing outside of Git."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude", "*"]
    said = subprocess.run(describe, cwd=PAGE.parent, capture_output=True, text=True, check=False)
    return said.stdout.strip()


def run_one(name: str, folder: Path) -> None:
    """Write a family's result, and all that is said on the way, to `folder`."""
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    with (folder / "log").open("wb") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    result = outcome(families()[name], folder)
    (folder / "result.json").write_text(json.dumps(result))
    os._exit(0)  # what frameworks do at the end is not what is tested


def results_of(
    listed: list[Family], jobs: int, keep: Path | None, seconds: float = math.inf
) -> Iterator[Result]:
    """Run families, `jobs` at a time, and start none after so many seconds."""
    began = time.perf_counter()
    if any(family.door not in TENSORFLOW for family in listed):
        _import_once()
    waiting, running = list(listed), list[Running]()
    while waiting or running:
        if time.perf_counter() - began > seconds:
            waiting.clear()
        while waiting and len(running) < jobs:
            running.append(Running.start(waiting.pop(0)))
        if running:
            connection.wait([each.process.sentinel for each in running], timeout=5)
        for each in [each for each in running if each.ended()]:
            running.remove(each)
            yield each.result(keep)


def _import_once() -> None:
    """Import what most families need, before processes are forked."""
    import importlib

    for module in ("torch", "transformers", "onnxruntime", "tvm", "sparse_tvm.compiler"):
        importlib.import_module(module)
    torchvision()
    _export_once()


def _export_once() -> None:
    """Export a model, as exporters build their tables of operators at the first."""
    import torch

    with quietly(), tempfile.TemporaryDirectory() as folder:
        program = torch.export.export(torch.nn.Linear(1, 1), (torch.ones(1, 1),))
        torch.onnx.export(program, f=f"{folder}/model.onnx", dynamo=True, verbose=False)


def page(results: dict[str, Result], listed: dict[str, Family]) -> str:
    """Return the results there are as a page."""
    rows = []
    commits: collections.Counter[str] = collections.Counter()
    for name, family in listed.items():
        if (result := results.get(name)) is None or result["end"] == "unbuilt":
            continue
        commits[result.get("commit", "")] += 1
        passes = result["end"] == "pass"
        difference = f"{result['difference']:.0e}" if passes else ""
        end = "pass" if passes else f"{result['end']}: {re.sub('/[^ ]*/', '', result['why'])}"
        rows.append(f"| {name} | {family.kind} | {family.door} | {end} | {difference} |")
    counted = _counted(results, listed)
    unbuilt = counted["unbuilt"]
    head = HEAD.format(
        count=len(rows),
        listed=len(listed),
        unbuilt=f", but for {unbuilt} that their framework could not export" if unbuilt else "",
        passed=counted["pass"],
        runs=_runs(commits),
    )
    return head + "\n".join(rows) + "\n"


def _runs(commits: collections.Counter[str]) -> str:
    """Say how many rows are of which commit, those that do not tell last."""
    named = [f"{count} on `{name}`" for name, count in commits.most_common() if name]
    before = [f"{commits['']} before"] if commits[""] else []
    return f"By the commit that was run: {', '.join([*named, *before])}."


def _counted(results: dict[str, Result], listed: dict[str, Family]) -> collections.Counter[str]:
    return collections.Counter(result["end"] for n, result in results.items() if n in listed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="families whose names match")
    parser.add_argument("--redo", action="store_true", help="run those again that did not pass")
    parser.add_argument("--again", action="store_true", help="run those again that are there")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=math.inf, help="start none after that")
    parser.add_argument("--results", type=Path, default=Path("zoo.jsonl"))
    parser.add_argument("--keep", type=Path, help="where the logs of those that fail go")
    parser.add_argument("--page", action="store_true", help="only write the results' page")
    arguments = parser.parse_args()
    listed = families()
    results: dict[str, Result] = {}
    if arguments.results.exists():
        for line in arguments.results.read_text().splitlines():
            entry = json.loads(line)
            results[entry["family"]] = entry
    chosen = [] if arguments.page else [n for n in listed if re.search(arguments.only, n)]
    if not arguments.again:
        kept = {n for n, r in results.items() if not arguments.redo or r["end"] == "pass"}
        chosen = [name for name in chosen if name not in kept]
    random.Random(0).shuffle(chosen)  # a part of them tells of all kinds
    with arguments.results.open("a") as file:
        families_chosen = [listed[name] for name in chosen]
        for result in results_of(
            families_chosen, arguments.jobs, arguments.keep, arguments.seconds
        ):
            name = result["family"]
            results[name] = result
            file.write(json.dumps(result) + "\n")
            file.flush()
            print(f"{result['end']:8} {name} ({result['wall']} s) {result['why']}", flush=True)
    if arguments.page:
        PAGE.write_text(page(results, listed), encoding="utf-8")
    counted = _counted(results, listed)
    print(f"{len(listed)} families: " + ", ".join(f"{counted[e]} {e}" for e in ORDER if counted[e]))
    return 1 if counted["wrong"] + counted["internal"] + counted["crash"] else 0


if __name__ == "__main__":
    sys.exit(main())
