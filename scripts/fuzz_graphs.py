"""Compile random small graphs of supported operators, and compare them with ONNX Runtime.

python scripts/fuzz_graphs.py [--count 2000] [--seed 0] [--keep FOLDER]

Hypothesis draws the graphs: a few inputs, some of whose sizes are symbolic, and nodes that take
what is there. Each is compiled once and run with several sizes. A graph ends in one of four ways:
`pass`; `refused`, by an error that is meant for users; `wrong`; `internal`, any other error. Graphs
whose values get too large to compare are drawn again. `--keep` stores those that fail, as ONNX.
"""

from __future__ import annotations

import argparse
import collections
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from random_graphs import graphs
from random_values import SIZES

import sparse_tvm
from sparse_tvm.errors import BuildError, SparseTvmError

LARGEST = 1e4
RELATIVE, ABSOLUTE = 1e-3, 1e-4

Runs = list[tuple[dict[str, np.ndarray], list[np.ndarray]]]


def runs_of(model: onnx.ModelProto) -> Runs:
    """Return inputs and ONNX Runtime's outputs; none if they are too large to be compared."""
    runs = [(feeds, _expected(model, feeds)) for feeds in map(_feeds, [model] * 3, SIZES)]
    results = [array for _, outputs in runs for array in outputs]
    return runs if all(y.size and np.abs(y).max() < LARGEST for y in results) else []


def outcome(model: onnx.ModelProto, runs: Runs) -> tuple[str, str]:
    """Compile and run a model: how it ends, and why."""
    try:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "model.so"
            sparse_tvm.compile(model, path, verify=False, threads=1)
            compiled = sparse_tvm.load(path)
            for feeds, expected in runs:
                found = compiled.run(feeds)
                for value, wanted in zip(model.graph.output, expected, strict=True):
                    if why := _difference(found[value.name], wanted):
                        sizes = {name: array.shape for name, array in feeds.items()}
                        return "wrong", f"{value.name} of {sizes}: {why}"
    except SparseTvmError as error:
        return ("internal" if isinstance(error, BuildError) else "refused"), str(error)
    except Exception as error:
        return "internal", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return "pass", ""


def _feeds(model: onnx.ModelProto, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {
        value.name: [sizes.get(d.dim_param, d.dim_value) for d in value.type.tensor_type.shape.dim]
        for value in model.graph.input
    }
    return {n: random.uniform(-2, 2, s).astype(np.float32) for n, s in shapes.items()}


def _expected(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, feeds)


def _difference(found: np.ndarray, wanted: np.ndarray) -> str:
    if found.shape != wanted.shape:
        return f"shape {found.shape}, not {wanted.shape}"
    scale = max(1.0, float(np.abs(wanted).max(initial=0)))
    if np.allclose(found, wanted, rtol=RELATIVE, atol=ABSOLUTE * scale):
        return ""
    return f"differs by {np.abs(found - wanted).max():.3g} of {scale:.3g}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    arguments = parser.parse_args()
    if arguments.keep:
        arguments.keep.mkdir(parents=True, exist_ok=True)
    counted: collections.Counter[str] = collections.Counter()
    started = time.perf_counter()

    @seed(arguments.seed)
    @given(graphs())
    @settings(
        max_examples=arguments.count,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    def run(model: onnx.ModelProto) -> None:
        if arguments.keep:  # what ends the process is this one
            onnx.save(model, arguments.keep / "last.onnx")
        runs = runs_of(model)
        assume(runs)
        end, why = outcome(model, runs)
        counted[end] += 1
        if end != "pass":
            number = sum(counted.values())
            print(f"{end:8} {number}: {' '.join(why.split())[:240]}", flush=True)
            if arguments.keep:
                onnx.save(model, arguments.keep / f"{end}_{arguments.seed}_{number}.onnx")
        if sum(counted.values()) % 100 == 0:
            print(dict(counted), flush=True)

    run()
    print(f"{dict(counted)} in {time.perf_counter() - started:.0f} s")
    return 1 if counted["wrong"] or counted["internal"] else 0


if __name__ == "__main__":
    sys.exit(main())
