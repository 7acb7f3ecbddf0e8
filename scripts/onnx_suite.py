"""Run ONNX's own backend tests through the compiler, and say what passes.

python scripts/onnx_suite.py [REGEX] [--expanded] [--all] [--json results.json] [--write]

The suites `node`, `simple`, `pytorch-converted` and `pytorch-operator` of the installed onnx
package, as far as their tensors are booleans, integers or floats of 32 or 64 bits. Every case is
compiled without --verify, run, and compared with the suite's expected outputs. A case ends in one
of five ways: `pass`; `refused`, by an error that is meant for users; `wrong`; `internal`, any other
error; `crash`, the end of the process. Many cases give a shape or axes as an input: where a case is
refused for that, it is tried again with all inputs but the first as constants, as models have them.

`--write` stores the refusals in tests/onnx_suite_refusals.txt. The test that reads it accepts no
other failure, and no refusal that passes by now.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests

import sparse_tvm
from sparse_tvm.errors import BuildError, SparseTvmError

REFUSALS = Path(__file__).parent.parent / "tests" / "onnx_suite_refusals.txt"
SUITES = ("node", "simple", "pytorch-converted", "pytorch-operator")
TYPES = {
    onnx.TensorProto.DataType.Value(name)
    for name in (
        *("BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64"),
        *("FLOAT", "DOUBLE"),
    )
}
ABSOLUTE = 1e-5  # beside the suite's relative tolerance
SECONDS = 120.0  # after which a case counts as a crash
# Their outputs are random.
RANDOM = re.compile(r"test_(bernoulli|training_dropout|multinomial|random)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("regex", nargs="?", default="")
    parser.add_argument("--expanded", action="store_true", help="the _expanded cases only")
    parser.add_argument("--all", action="store_true", help="show each case that does not pass")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    names = [n for n in cases(expanded=arguments.expanded) if re.search(arguments.regex, n)]
    results: dict[str, tuple[str, str]] = {}
    for name, (outcome, why) in run(names):
        results[name] = outcome, why
        if outcome != "pass" and (arguments.all or outcome != "refused"):
            print(f"{outcome:8} {name}: {why}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    if arguments.write:
        write_refusals(results)
    counted = collections.Counter(outcome for outcome, _ in results.values())
    constant = sum(why == "constant inputs" for _, why in results.values())
    print(f"{dict(counted)} of {len(results)}; {constant} of them passed with constant inputs")


def cases(*, expanded: bool = False) -> dict[str, Any]:
    """Return the cases whose tensors are of types that are compiled, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [case for suite in SUITES for case in load_model_tests(kind=suite)]
    return {
        case.name: case
        for case in found
        if ("_expanded" in case.name) == expanded
        and not RANDOM.match(case.name)
        and _has_only_known_types(model_of(case))
    }


def model_of(case: Any) -> onnx.ModelProto:
    return case.model or onnx.load(Path(case.model_dir) / "model.onnx")


def _has_only_known_types(model: onnx.ModelProto) -> bool:
    values = (*model.graph.input, *model.graph.output)
    if any(not value.type.HasField("tensor_type") for value in values):
        return False
    types = {value.type.tensor_type.elem_type for value in values}
    types |= {tensor.data_type for tensor in model.graph.initializer}
    domains = {entry.domain for entry in model.opset_import}
    return types <= TYPES and domains <= {"", "ai.onnx"}


def data_sets(case: Any) -> Iterator[tuple[list[np.ndarray], list[np.ndarray]]]:
    if case.data_sets is not None:
        yield from (([_array(v) for v in i], [_array(v) for v in o]) for i, o in case.data_sets)
        return
    for directory in sorted(Path(case.model_dir).glob("test_data_set_*")):
        yield _arrays(directory, "input"), _arrays(directory, "output")


def _array(value: Any) -> np.ndarray:
    is_tensor = isinstance(value, onnx.TensorProto)
    return numpy_helper.to_array(value) if is_tensor else np.asarray(value)


def _arrays(directory: Path, kind: str) -> list[np.ndarray]:
    count = len(list(directory.glob(f"{kind}_*.pb")))
    tensors = [onnx.load_tensor(directory / f"{kind}_{index}.pb") for index in range(count)]
    return [numpy_helper.to_array(tensor) for tensor in tensors]


def run(names: list[str]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield outcome and reason of cases, from a process that is replaced when it dies."""
    context = multiprocessing.get_context("spawn")
    left = list(names)
    while left:
        ours, theirs = context.Pipe()
        worker = context.Process(target=_work, args=(theirs, left), daemon=True)
        worker.start()
        theirs.close()
        try:
            ours.recv()  # it has started, which takes a while on a busy machine
            while left:
                if not ours.poll(SECONDS):
                    raise EOFError
                outcome = ours.recv()
                yield left.pop(0), outcome
        except EOFError:
            worker.kill()
            worker.join()
            yield left.pop(0), ("crash", f"exit code {worker.exitcode}")
        worker.join(5)


def _work(pipe: Any, names: list[str]) -> None:
    found = {**cases(), **cases(expanded=True)}
    pipe.send("ready")
    with tempfile.TemporaryDirectory() as directory:
        for name in names:
            pipe.send(outcome(found[name], Path(directory) / "model.so"))


def outcome(case: Any, artifact: Path) -> tuple[str, str]:
    """Compile and run one case."""
    try:
        return _outcome(case, artifact, constants=False)
    except SparseTvmError as error:
        refusal = str(error)
        if isinstance(error, BuildError):
            return "internal", refusal
    except Exception as error:
        return "internal", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    try:
        return _outcome(case, artifact, constants=True)
    except SparseTvmError as error:
        why = refusal if str(error).startswith("there is") else str(error)
        return ("internal" if isinstance(error, BuildError) else "refused"), why
    except Exception as error:
        return "internal", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _outcome(case: Any, artifact: Path, *, constants: bool) -> tuple[str, str]:
    for inputs, expected in data_sets(case):
        model = onnx.ModelProto()
        model.CopyFrom(model_of(case))
        stored = {tensor.name for tensor in model.graph.initializer}
        given = [value for value in model.graph.input if value.name not in stored]
        feeds = {value.name: array for value, array in zip(given, inputs, strict=False)}
        if constants:
            _store(model.graph, feeds)
        sparse_tvm.compile(model, artifact, verify=False, threads=1)
        results = sparse_tvm.load(artifact).run(feeds)
        for value, wanted in zip(model.graph.output, expected, strict=True):
            if why := _difference(results[value.name], np.asarray(wanted), case.rtol):
                return "wrong", f"{value.name}: {why}"
    return "pass", "constant inputs" if constants else ""


def _store(graph: onnx.GraphProto, feeds: dict[str, np.ndarray]) -> None:
    """Make constants of all inputs but the first of floats, or the first of all."""
    floats = [n for n, array in feeds.items() if array.dtype.kind == "f" and array.ndim]
    first = next(iter([*floats, *feeds]), None)
    names = [name for name in feeds if name != first]
    kept = [value for value in graph.input if value.name not in names]
    if not names:
        raise SparseTvmError("there is no other input")
    for name in names:
        graph.initializer.append(numpy_helper.from_array(feeds.pop(name), name))
    del graph.input[:]
    graph.input.extend(kept)


def _difference(found: np.ndarray, wanted: np.ndarray, relative: float) -> str:
    if found.shape != wanted.shape:
        return f"shape {found.shape}, not {wanted.shape}"
    if found.dtype != wanted.dtype:
        return f"{found.dtype}, not {wanted.dtype}"
    if np.allclose(found, wanted, rtol=relative, atol=ABSOLUTE, equal_nan=True):
        return ""
    with np.errstate(all="ignore"):
        worst = np.nanmax(np.abs(found.astype(np.float64) - wanted.astype(np.float64)))
    return f"differs by {worst:.3g}; {found.reshape(-1)[:4]}, not {wanted.reshape(-1)[:4]}"


def write_refusals(results: dict[str, tuple[str, str]]) -> None:
    lines = [
        f"{name}: {why.removeprefix(f'{name}: ')}"
        for name, (outcome, why) in results.items()
        if outcome == "refused"
    ]
    REFUSALS.write_text("\n".join(sorted(lines)) + "\n", encoding="utf-8")


def expected_refusals() -> set[str]:
    return {line.partition(":")[0] for line in REFUSALS.read_text("utf-8").splitlines()}


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
