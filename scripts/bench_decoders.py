"""Time models with rotary positions, and steps of decoders with a cache, against ONNX Runtime.

python scripts/bench_decoders.py FOLDER [--threads 1] [--duration 1.0] [--compile-only]

All have 4 layers of 768 features in 12 heads, as many as BERT-base, and random weights of which
90 % are zeros. Whole texts are of 1 x 128 tokens; a step is one token after a cache of 512, which
each engine gets as it came out of its own step before. ONNX Runtime runs the same files. The
environment is that of scripts/zoo.py; FOLDER keeps models and artifacts for later runs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from zoo_doors import DYNAMO, TorchModel, quietly, torch_door
from zoo_text import tokens, with_cache

import sparse_tvm
from sparse_tvm.cli.console import stdout_console
from sparse_tvm.cli.tables import plain_table
from sparse_tvm.cpu import cpu_model
from sparse_tvm.interleave import interleave
from sparse_tvm.random_inputs import random_inputs
from sparse_tvm.reference import Reference
from sparse_tvm.report.content import human_threads

HIDDEN, LAYERS, HEADS, PAST, TOKENS = 768, 4, 12, 512, 128
TOLERANCE = 1e-4  # of the largest value of an output
SIZES = {
    "vocab_size": 8000,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 2048,
    "max_position_embeddings": 1024,
}
GPT = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 1024}
GROUPED = {**SIZES, "num_key_value_heads": 4}
TEXTS = {
    "ModernBERT": ("ModernBertConfig", "ModernBertModel", SIZES),
    "Llama": ("LlamaConfig", "LlamaModel", GROUPED),
    "Qwen2": ("Qwen2Config", "Qwen2Model", GROUPED),
    "GPT-NeoX": ("GPTNeoXConfig", "GPTNeoXModel", SIZES),
}
STEPS = {
    "GPT-2": ("GPT2Config", "GPT2LMHeadModel", {**SIZES, **GPT}),
    "Llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED),
}


def built(name: str, family: Callable[[], TorchModel], folder: Path) -> tuple[Path, Path]:
    """Return model and artifact, which are made unless they are there."""
    inside = folder / name
    model, artifact = inside / "model.onnx", inside / "model.so"
    if not artifact.exists():
        inside.mkdir(parents=True, exist_ok=True)
        with quietly():
            torch_door(DYNAMO, family)(inside)
        sparse_tvm.compile(model, artifact)
    return model, artifact


def feeds_of(model: Any, new: int, past: int) -> dict[str, np.ndarray]:
    """Inputs of one text, all of whose tokens count."""
    named = {d for spec in model.inputs for d in spec.shape if isinstance(d, str)}
    sizes = {"batch": 1, "sequence": new, "past": past, "past + sequence": past + new}
    sizes = {name: size for name, size in sizes.items() if name in named}
    feeds = random_inputs(model.inputs, sizes=sizes)
    feeds["attention_mask"][:] = 1
    if "position_ids" in feeds:
        feeds["position_ids"][:] = past + np.arange(new)
    return feeds


def with_own_cache(model: Any, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same step after the caches that this engine returns from the step before."""
    before = dict(feeds)
    for key, array in feeds.items():
        if key.startswith("past"):
            before[key] = np.ascontiguousarray(array[:, :, 1:])
    before["attention_mask"] = feeds["attention_mask"][:, 1:]
    if "position_ids" in feeds:
        before["position_ids"] = feeds["position_ids"] - 1
    outputs = list(model.run(before).values())
    caches = [key for key in feeds if key.startswith("past")]
    return {**feeds, **dict(zip(caches, outputs[-len(caches) :], strict=True))}


def check(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], name: str) -> None:
    for output, wanted in expected.items():
        difference = np.abs(found[output] - wanted).max() / np.abs(wanted).max()
        if not difference <= TOLERANCE:
            raise SystemExit(f"{name}: {output} differs by {difference:.2g} of its largest value")


def main(
    folder: Annotated[Path, typer.Argument(help="Where models are kept for later runs.")],
    threads: int = 1,
    duration: Annotated[float, typer.Option(help="Seconds per engine and model.")] = 1.0,
    compile_only: bool = False,
) -> None:
    columns = ("ms", "ONNX Runtime's ms", "times faster")
    table = plain_table("model", "tokens", "cache", *columns, numbers=columns)
    rows = [
        *((name, partial(tokens, *given), TOKENS, 0) for name, given in TEXTS.items()),
        *((f"{name}, step", partial(with_cache, *given), 1, PAST) for name, given in STEPS.items()),
    ]
    for name, family, new, past in rows:
        path, artifact = built(name.replace(", ", "-"), family, folder)
        if compile_only:
            continue
        ours = sparse_tvm.load(artifact, threads=threads)
        theirs = Reference(path, threads=threads)
        feeds = feeds_of(ours, new, past)
        check(ours.run(feeds), theirs.run(feeds), name)
        engines = {"ours": ours, "theirs": theirs}
        runs = {
            which: partial(engine.run, with_own_cache(engine, feeds) if past else feeds)
            for which, engine in engines.items()
        }
        medians = [statistics.median(t) for t in interleave(runs, duration=duration).values()]
        cells = [f"{1e3 * seconds:.2f}" for seconds in medians]
        table.add_row(name, str(new), str(past), *cells, f"{medians[1] / medians[0]:.2f}")
    if not compile_only:
        stdout_console().print(f"{cpu_model()}, {human_threads(threads)}, 90 % zeros")
        stdout_console().print(table)


if __name__ == "__main__":
    typer.run(main)
