"""What entering through PyTorch costs: compile time and speed beside the ONNX file's.

python scripts/bench_sources.py [--layers 12] [--sparsity 0.9] [--rounds 2]

Sources take turns, both when they compile and when their artifacts run. Of the times to
compile, the least counts: the first round also waits for the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertModel

import sparse_tvm
from sparse_tvm.interleave import interleave
from sparse_tvm.random_inputs import random_inputs
from sparse_tvm.sparsity.masks import prune_array

SEQUENCE = 128
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
COMPILE = "import sys; from sparse_tvm.cli import main; sys.exit(main())"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        # In a process of its own: the peak of this one's memory would count as its children's.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            saved = pool.submit(save_sources, directory, arguments.layers, arguments.sparsity)
        sources = saved.result()
        artifacts = {source: directory / f"{source}.so" for source in sources}
        rounds = [
            {
                source: compile_in_new_process(path, artifacts[source])
                for source, path in sources.items()
            }
            for _ in range(arguments.rounds)
        ]
        threads = len(os.sched_getaffinity(0))
        models = {
            source: sparse_tvm.load(path, threads=threads) for source, path in artifacts.items()
        }
        feed = random_inputs(models["onnx"].inputs)
        times = interleave(
            {source: lambda m=model: m.run(feed) for source, model in models.items()}, duration=5.0
        )
        for source, model in models.items():
            manifest = model.manifest
            median = statistics.median(times[source])
            wall, cpu = least(rounds, source)
            onnx_wall, onnx_cpu = least(rounds, "onnx")
            print(
                f"{source:12} {wall:6.1f} s ({wall / onnx_wall:.2f}x), "
                f"CPU {cpu:6.1f} s ({cpu / onnx_cpu:.2f}x), "
                f"import {phase(manifest, 'import'):5.1f} s, "
                f"peak {manifest['compile']['peak_memory_bytes'] / 2**20:6.0f} MiB, "
                f"runs in {1e3 * median:.2f} ms "
                f"({median / statistics.median(times['onnx']):.2f}x)"
            )


def save_sources(directory: Path, layers: int, sparsity: float) -> dict[str, Path]:
    """Save one pruned BERT as a Hugging Face directory, a program and an ONNX file."""
    torch.manual_seed(0)
    model = BertModel(BertConfig(num_hidden_layers=layers, architectures=["BertModel"])).eval()
    with torch.no_grad():
        for module in model.encoder.modules():
            if isinstance(module, torch.nn.Linear):
                pruned = prune_array(module.weight.numpy(), sparsity, "4x1")
                module.weight.copy_(torch.from_numpy(pruned))
    paths = {
        "onnx": directory / "bert.onnx",
        "pt2": directory / "bert.pt2",
        "huggingface": directory / "bert",
    }
    model.save_pretrained(paths["huggingface"])
    examples = {key: torch.ones((1, SEQUENCE), dtype=torch.int64) for key in INPUTS}
    program = torch.export.export(model, (), examples, strict=False)
    torch.export.save(program, paths["pt2"])
    names = ["last_hidden_state", "pooler_output"]
    exported = torch.onnx.export(program, dynamo=True, verbose=False, output_names=names)
    exported.save(paths["onnx"])
    return paths


def least(rounds: list[dict[str, tuple[float, float]]], source: str) -> tuple[float, float]:
    """Return the least wall and the least CPU seconds of a source."""
    walls, cpus = zip(*(seconds[source] for seconds in rounds), strict=True)
    return min(walls), min(cpus)


def compile_in_new_process(path: Path, artifact: Path) -> tuple[float, float]:
    """Return the wall and CPU seconds that the command takes, all imports included."""
    shapes = [f"--input-shape={name}:1,{SEQUENCE}" for name in INPUTS]
    command = [sys.executable, "-c", COMPILE, "compile", str(path), "-o", str(artifact), "-q"]
    started, cpu = time.perf_counter(), cpu_seconds()
    subprocess.run([*command, *shapes], check=True)
    return time.perf_counter() - started, cpu_seconds() - cpu


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def phase(manifest: dict[str, object], name: str) -> float:
    compiled = json.loads(json.dumps(manifest["compile"]))
    return float(np.sum([p["seconds"] for p in compiled["phases"] if p["name"] == name]))


if __name__ == "__main__":
    main()
