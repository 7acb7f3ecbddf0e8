"""Damage artifacts, .npz files and ONNX models at random: all must be refused in one line.

Each case runs in a process of its own, so that a crash is counted and not suffered. Exits with 1
after a crash, a hang, a traceback, an internal error, or damage that `verify` did not find.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import sparse_tvm
from sparse_tvm.artifact import verify_artifact
from sparse_tvm.cli import main as command_line
from sparse_tvm.cli.app import EXIT_INTERNAL
from sparse_tvm.errors import ArtifactError, InputError, SparseTvmError
from sparse_tvm.frontends.detect import open_source
from sparse_tvm.inspection import inspect
from sparse_tvm.models.bert import BertConfig, build_bert
from sparse_tvm.npz import read_npz
from sparse_tvm.random_inputs import random_inputs
from sparse_tvm.runtime import load

FLIPS, CUTS, ARCHIVES, MODELS = 1000, 500, 2000, 2000
TIMEOUT = 60  # seconds per case
COMPILED = 25  # of so many models one is compiled, the others imported
CASES_PER_PROCESS = 50  # of .npz files, where a case takes microseconds

Random = np.random.Generator


def outcome(job: Callable[[], str]) -> str:
    """Run `job` in a forked process and return its result, its exception, or its signal."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(TIMEOUT)
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        try:
            result = job()
        except BaseException as error:
            result = f"raised {type(error).__name__}: {str(error)[:150]}"
        os.write(writer, result.encode(errors="replace"))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as pipe:
        result = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == -signal.SIGALRM:
        return "hung"
    return f"crashed with {signal.Signals(-code).name}" if code < 0 else result


def show(what: str, results: Counter[str], good: set[str]) -> int:
    """Print how often each result came, and return how many are not good."""
    print(f"{what}: {', '.join(f'{count} {name}' for name, count in results.most_common())}")
    return sum(count for name, count in results.items() if name not in good)


def mutant(data: bytes, rng: Random) -> bytes:
    """Return `data` with a few bits flipped, bytes overwritten, cut out or repeated."""
    damaged = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at, size = int(rng.integers(len(damaged))), int(rng.integers(1, 9))
        match rng.integers(4):
            case 0:
                damaged[at] ^= 1 << int(rng.integers(8))
            case 1:
                damaged[at : at + size] = rng.bytes(size)
            case 2 if len(damaged) > 16:
                del damaged[at : at + size]
            case _:
                damaged[at:at] = damaged[at : at + size]
    return bytes(damaged)


def fuzz_artifacts(folder: Path, rng: Random, scale: float) -> int:
    """Flip single bits of an artifact, and cut it short."""
    path, damaged = folder / "model.so", folder / "damaged.so"
    sparse_tvm.compile(_perceptron(rng, 256), path, threads=1, format="csr")
    data, model = path.read_bytes(), load(path)
    inputs = random_inputs(model.inputs)
    expected = model.run(inputs)["y"]

    def verified() -> str:
        try:
            verify_artifact(damaged)
        except ArtifactError:
            return "found"
        return "missed"

    def run() -> str:
        try:
            result = load(damaged, threads=1).run(inputs)["y"]
        except SparseTvmError:
            return "refused"
        return "right" if np.array_equal(result, expected) else "wrong"

    bad = 0
    flips = rng.choice(8 * len(data), int(FLIPS * scale), replace=False)
    cuts = rng.choice(len(data), int(CUTS * scale), replace=False)
    for what, cases in (("flipped bits", flips), ("truncations", cuts)):
        found, loaded = Counter[str](), Counter[str]()
        for case in map(int, cases):
            content = bytearray(data)
            if what == "truncations":
                del content[case:]
            else:
                content[case // 8] ^= 1 << case % 8
            damaged.write_bytes(content)
            found[outcome(verified)] += 1
            loaded[outcome(run)] += 1
        bad += show(f"{len(cases)} {what}, verify", found, {"found"})
        # A wrong floating-point weight may be unnoticed where nobody asked for verification.
        bad += show(f"{len(cases)} {what}, load and run", loaded, {"refused", "right", "wrong"})
    return bad


def fuzz_archives(folder: Path, rng: Random, scale: float) -> int:
    """Damage .npz files, stored and compressed."""
    path = folder / "damaged.npz"
    originals = []
    for save in (np.savez, np.savez_compressed):
        file = io.BytesIO()
        save(file, ids=np.arange(50), x=rng.random((8, 8)), name=np.array(["a", "b"]))
        originals.append(file.getvalue())

    def read() -> str:
        results = []
        for _ in range(CASES_PER_PROCESS):
            path.write_bytes(mutant(originals[rng.integers(2)], rng))
            try:
                read_npz(path)
                results.append("read")
            except InputError:
                results.append("refused")
        return " ".join(results)

    results = Counter[str]()
    for _ in range(int(ARCHIVES * scale) // CASES_PER_PROCESS or 1):
        result = outcome(read)
        is_sound = set(result.split()) <= {"read", "refused"}
        results.update(result.split() if is_sound else [result])
        rng.integers(1, size=1000)  # each process has a copy of the generator
    return show(f"{results.total()} damaged .npz files", results, {"read", "refused"})


def fuzz_models(folder: Path, rng: Random, scale: float) -> int:
    """Damage ONNX models: their bytes, and nodes, names, shapes and attributes."""
    path = folder / "damaged.onnx"
    config = BertConfig(layers=1, hidden=16, heads=2, intermediate=32, vocabulary=50)
    originals = [_perceptron(rng, 16), build_bert(config, batch=1, sequence=8)]

    def read() -> str:
        try:
            inspect(path)
            open_source(path).load()
        except SparseTvmError:
            return "refused"
        return "imported"

    def compile() -> str:
        code = command_line(["compile", str(path), "-o", str(folder / "out.so"), "--quiet"])
        if code == EXIT_INTERNAL:
            return "internal error"
        return "refused" if code else "compiled"

    results = Counter[str]()
    for case in range(int(MODELS * scale)):
        original = originals[rng.integers(2)]
        if rng.integers(2):
            path.write_bytes(mutant(original.SerializeToString(), rng))
        else:
            path.write_bytes(_edited(original, rng).SerializeToString())
        result = outcome(read if case % COMPILED else compile)
        results[result] += 1
        if result not in ("refused", "imported", "compiled") and "FUZZ_KEEP" in os.environ:
            path.rename(Path(os.environ["FUZZ_KEEP"]) / f"{case}.onnx")
    return show(f"{results.total()} ONNX mutants", results, {"refused", "imported", "compiled"})


def _perceptron(rng: Random, width: int) -> onnx.ModelProto:
    """Return two layers whose weights are zero in nine places of ten."""
    weights = rng.standard_normal((2, width, width)).astype(np.float32)
    weights *= rng.random(weights.shape) < 0.1
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["h"]),
        helper.make_node("Relu", ["h"], ["a"]),
        helper.make_node("MatMul", ["a", "second"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", width]) for n in "xy")
    names = ("first", "second")
    initializers = [numpy_helper.from_array(w, n) for w, n in zip(weights, names, strict=True)]
    graph = helper.make_graph(nodes, "perceptron", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _edited(original: onnx.ModelProto, rng: Random) -> onnx.ModelProto:
    """Return the model with one to three of its parts replaced by others."""
    model = onnx.ModelProto()
    model.CopyFrom(original)
    graph = model.graph
    names = [name for node in graph.node for name in (*node.input, *node.output)]
    for _ in range(rng.integers(1, 4)):
        node = graph.node[rng.integers(len(graph.node))]
        tensor = graph.initializer[rng.integers(len(graph.initializer))]
        number = int(rng.choice([-(2**63), -1, 0, 1, 2, 7, 10**10, 2**63 - 1]))
        match rng.integers(9):
            case 0:
                del node.output[:]
            case 1 if node.input:
                node.input[rng.integers(len(node.input))] = str(rng.choice(names))
            case 2 if node.output:
                node.output[0] = str(rng.choice(names))
            case 3:
                node.op_type = graph.node[rng.integers(len(graph.node))].op_type
            case 4 if tensor.dims:
                tensor.dims[rng.integers(len(tensor.dims))] = number
            case 5:
                tensor.data_type = int(rng.integers(0, 24))
            case 6 if node.attribute:
                node.attribute[0].i = number
                node.attribute[0].type = int(rng.integers(0, 15))
            case 7:
                dims = graph.input[0].type.tensor_type.shape.dim
                dims[rng.integers(len(dims))].dim_value = number
            case _:
                graph.node.remove(node)
        if not graph.node or not graph.initializer:
            break
    return model


FUZZERS = {"artifacts": fuzz_artifacts, "npz": fuzz_archives, "onnx": fuzz_models}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="share of the cases to run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=FUZZERS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chosen = [options.only] if options.only else FUZZERS
        rng = np.random.default_rng(options.seed)
        bad = [FUZZERS[name](Path(folder), rng, options.scale) for name in chosen]
    return 1 if sum(bad) else 0


if __name__ == "__main__":
    sys.exit(main())
