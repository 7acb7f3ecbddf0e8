"""Speed on a GPU: layers beside cuBLAS and cuSPARSELt, BERT-base beside ``torch.compile``.

    python scripts/cuda_speed.py [--layers] [--bert] [--sparselt] [--jobs 8] [--batches 1,16,64,256]

Needs a GPU and PyTorch with CUDA. Models are compiled first, as many at once as ``--jobs`` says.
A layer's time is its kernel's on the device, by CUPTI (PyTorch's profiler), from the end of the
kernel before where it was launched early, the median of 20 calls, between kernels that make float16
of its input and read its output; it has a bias, as cuBLAS's.
cuSPARSELt's is the fastest of its algorithms. A model's time is the wall clock's over ten runs one
after another in one stream, with inputs and outputs on the device, the median of seven such;
engines take turns. Outputs are compared with ONNX Runtime's in float32 where the batch is small,
and the largest differences are printed beside the times.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sparse_tvm.cuda_device import capability_of
from sparse_tvm.errors import DeviceError

TARGET = "cuda-sm90"

LAYERS = ((768, 768), (3072, 768), (768, 3072), (4096, 4096))
TOKENS = (16, 128, 1024, 4096)
FORMS = {
    "dense": (0.0, "", "=dense"),
    "2:4": (0.5, "2:4", ""),
    "32x32 75 %": (0.75, "32x32", "=bsr:32x32"),
    "32x32 90 %": (0.9, "32x32", "=bsr:32x32"),
    "64x64 90 %": (0.9, "64x64", "=bsr:64x64"),
    "csr 90 %": (0.9, "unstructured", "=csr"),
    "csr 95 %": (0.95, "unstructured", "=csr"),
    "csr 98 %": (0.98, "unstructured", "=csr"),
}
"""Zeros, structure, and the layer rule that keeps to it."""

MODELS = ("dense", "2:4", "32x32 90 %", "64x64 90 %")
SEQUENCE = 128
_SPARSELT_TOKENS = 1024
"""From which on cuSPARSELt is asked: below, launching decides."""

_REFERENCE_BATCH = 16
_GRAPHS_BATCH = 16
"""Up to which launches may decide, so that PyTorch is also timed with CUDA graphs."""

_LINEAR = re.compile(r"encoder.*(query|key|value|dense)\.weight")


def pruned(w: np.ndarray, form: str) -> np.ndarray:
    """A weight in a form."""
    from sparse_tvm.sparsity.masks import prune_array

    sparsity, structure, _ = FORMS[form]
    return prune_array(w, sparsity, structure) if sparsity else w


def layer_model(n: int, k: int, tokens: int, form: str) -> onnx.ModelProto:
    """``x w^T + b`` in float16, read by a layer of 16 outputs that stands for the next one."""
    rng = np.random.default_rng([n, k])
    w = pruned(rng.standard_normal((n, k)).astype(np.float32) * k**-0.5, form)
    arrays = {"w": w.T, "b": rng.standard_normal(n), "v": rng.standard_normal((n, 16))}
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["product"]),
            helper.make_node("Add", ["product", "b"], ["sum"]),
            helper.make_node("MatMul", ["sum", "v"], ["y"]),
        ],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [tokens, k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [tokens, 16])],
        [
            numpy_helper.from_array(np.ascontiguousarray(a, np.float32), name)
            for name, a in arrays.items()
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def compile_layer(n: int, k: int, tokens: int, form: str, path: Path) -> None:
    """Compile one layer in one form."""
    import sparse_tvm

    rule = FORMS[form][2]
    rules = [f"w{rule}"] if rule else []
    sparse_tvm.compile(
        layer_model(n, k, tokens, form), path, target=TARGET, layer_rules=rules, verify=False
    )


def bert_model(form: str, batch: int) -> onnx.ModelProto:
    """BERT-base with random weights, pruned."""
    from sparse_tvm.models.bert import BertConfig, build_bert, random_weights

    config = BertConfig()
    weights = random_weights(config)
    for name, w in weights.items():
        if _LINEAR.search(name):
            weights[name] = pruned(w, form)
    return build_bert(config, weights, batch=batch, sequence=SEQUENCE)


def bert_inputs(batch: int) -> dict[str, np.ndarray]:
    """Random tokens, the same for every batch; every second sequence is padded."""
    rng = np.random.default_rng(0)
    mask = np.ones((max(batch, 256), SEQUENCE), np.int64)
    mask[1::2, 100:] = 0
    ids = rng.integers(0, 30000, mask.shape)
    arrays = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(mask)}
    return {name: np.ascontiguousarray(array[:batch]) for name, array in arrays.items()}


def compile_bert(form: str, batch: int, path: Path) -> None:
    """Compile BERT-base, and let ONNX Runtime compute what a small batch must give."""
    import onnxruntime

    import sparse_tvm

    model = bert_model(form, batch)
    rule = FORMS[form][2]
    rules = [rule] if rule and form != "dense" else []
    sparse_tvm.compile(model, path, target=TARGET, layer_rules=rules, verify=False)
    if batch <= _REFERENCE_BATCH:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 2
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        np.save(path.with_suffix(".npy"), session.run(None, bert_inputs(batch))[0])


def compile_all(jobs: list[tuple[Any, ...]], workers: int) -> None:
    """Run jobs in processes of their own; print those that fail."""
    started = time.perf_counter()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(*job): job for job in jobs}
        for future, job in futures.items():
            error = future.exception()
            if error is not None:
                print(f"not compiled: {job[1:-1]}: {error}", flush=True)
    print(f"compiled {len(jobs)} models in {time.perf_counter() - started:.0f} s\n", flush=True)


def kernel_seconds(call: Callable[[], Any], which: int = 0, repeats: int = 20) -> float:
    """Seconds on the device of one of the kernels that a call launches in order."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    found = [e for e in profiler.events() if e.device_time > 0 and not e.name.startswith("Mem")]
    found.sort(key=lambda event: event.time_range.start)
    each = len(found) // repeats
    ends = [float("-inf"), *(event.time_range.end for event in found)]
    alone = [
        event.time_range.end - max(event.time_range.start, end)
        for event, end in zip(found, ends, strict=False)
    ]
    return median(alone[which::each]) * 1e-6


def cublas_seconds(n: int, k: int, tokens: int) -> float:
    """PyTorch's ``linear`` in float16."""
    import torch

    x = torch.randn(tokens, k, dtype=torch.float16, device="cuda")
    w = torch.randn(n, k, dtype=torch.float16, device="cuda")
    b = torch.randn(n, dtype=torch.float16, device="cuda")
    return kernel_seconds(lambda: torch.nn.functional.linear(x, w, b))


def sparselt_seconds(n: int, k: int, tokens: int) -> float:
    """The fastest of cuSPARSELt's algorithms."""
    import torch

    x = torch.randn(tokens, k, dtype=torch.float16, device="cuda")
    w = torch.randn(n, k, dtype=torch.float16, device="cuda")
    w *= torch.tensor([1, 1, 0, 0], device="cuda", dtype=torch.bool).tile(n, k // 4)
    compressed = torch._cslt_compress(w)

    def call(algorithm: int) -> Any:
        return torch._cslt_sparse_mm(compressed, x.t(), alg_id=algorithm)

    times = {}
    for algorithm in range(40):
        try:
            call(algorithm)
        except RuntimeError:
            break
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(10):
            call(algorithm)
        end.record()
        end.synchronize()
        times[algorithm] = begin.elapsed_time(end)
    best = sorted(times, key=lambda algorithm: times[algorithm])[:3]
    return min(kernel_seconds(lambda a=algorithm: call(a)) for algorithm in best)


def layer_rows(directory: Path, sparselt: bool) -> Iterator[str]:
    """Markdown rows of microseconds."""
    import torch

    import sparse_tvm

    others = ["cuBLAS", *(["cuSPARSELt"] if sparselt else [])]
    yield f"| layer | tokens | {' | '.join([*others, *FORMS])} |"
    yield "|---" * (2 + len(others) + len(FORMS)) + "|"
    for n, k in LAYERS:
        for tokens in TOKENS:
            times = [cublas_seconds(n, k, tokens)]
            if sparselt:
                few = tokens < _SPARSELT_TOKENS
                times.append(float("nan") if few else sparselt_seconds(n, k, tokens))
            for form in FORMS:
                path = layer_path(directory, n, k, tokens, form)
                if not path.exists():
                    times.append(float("nan"))
                    continue
                with sparse_tvm.load(path) as model:
                    x = {"x": torch.randn(tokens, k, device="cuda")}
                    times.append(kernel_seconds(lambda: model.run(x), 1))  # noqa: B023
            cells = " | ".join(f"{seconds * 1e6:.1f}" for seconds in times)
            yield f"| {n} x {k} | {tokens} | {cells} |"


def layer_path(directory: Path, n: int, k: int, tokens: int, form: str) -> Path:
    return directory / f"layer_{n}x{k}_{tokens}_{re.sub('[^a-z0-9]', '', form)}.so"


def bert_path(directory: Path, form: str, batch: int) -> Path:
    return directory / f"bert_{batch}_{re.sub('[^a-z0-9]', '', form)}.so"


def torch_bert() -> Any:
    """The same network in PyTorch, dense, in float16."""
    import torch
    from transformers import BertConfig, BertModel

    from sparse_tvm.models import bert

    model = BertModel(BertConfig(), add_pooling_layer=False).eval()
    weights = bert.random_weights(bert.BertConfig())
    state = {name: torch.from_numpy(w) for name, w in weights.items() if "pooler" not in name}
    model.load_state_dict(state, strict=False)
    return model.half().cuda()


def bert_rows(directory: Path, batches: list[int]) -> Iterator[str]:
    """Markdown rows of milliseconds, and of largest differences from ONNX Runtime."""
    import torch

    import sparse_tvm

    columns = ["compile", "compile, graphs", *MODELS]
    yield f"| batch | {' | '.join(columns)} | largest differences |"
    yield "|---" * (2 + len(columns)) + "|"
    network = torch_bert()
    for batch in batches:
        feed = {name: torch.from_numpy(a).cuda() for name, a in bert_inputs(batch).items()}
        calls, differences, opened = {}, [], []
        for mode in ("default", "reduce-overhead")[: 2 if batch <= _GRAPHS_BATCH else 1]:
            torch._dynamo.reset()
            calls[mode] = torch_call(torch.compile(network, mode=mode, dynamic=False), feed)
        for form in MODELS:
            path = bert_path(directory, form, batch)
            model = sparse_tvm.load(path)
            opened.append(model)
            calls[form] = our_call(model, feed)
        for form, call in calls.items():
            y = call().float().clone()
            torch.cuda.synchronize()
            reference = bert_path(directory, form if form in MODELS else "dense", batch)
            reference = reference.with_suffix(".npy")
            if reference.exists():
                expected = torch.from_numpy(np.load(reference)).cuda()
                differences.append(f"{float((y - expected).abs().max()):.4f}")
        seconds = interleaved(list(calls.values()), 3 if batch > 64 else 10)
        for model in opened:
            model.close()
        cells = [f"{s * 1e3:.3f}" for s in seconds]
        if batch > _GRAPHS_BATCH:
            cells.insert(1, "")
        yield f"| {batch} | {' | '.join(cells)} | {', '.join(differences)} |"


def torch_call(network: Any, feed: dict[str, Any]) -> Callable[[], Any]:
    import torch

    def call() -> Any:
        with torch.no_grad():
            return network(**feed).last_hidden_state

    return call


def our_call(model: Any, feed: dict[str, Any]) -> Callable[[], Any]:
    import torch

    stream = torch.cuda.current_stream()

    def call() -> Any:
        (y,) = model.run(feed, into=torch.from_dlpack, stream=stream).values()
        return y

    return call


def interleaved(calls: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Seconds of each call, the median of seven blocks that take turns."""
    import torch

    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        for _ in range(3):
            call()
    for _ in range(7):
        for call, mine in zip(calls, times, strict=True):
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(repeats):
                call()
            torch.cuda.synchronize()
            mine.append((time.perf_counter() - started) / repeats)
    return [median(mine) for mine in times]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", action="store_true")
    parser.add_argument("--bert", action="store_true")
    parser.add_argument("--sparselt", action="store_true", help="search cuSPARSELt's algorithms")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--batches", default="1,16,64,256")
    options = parser.parse_args()
    try:
        capability_of(0)
        import torch
    except (ImportError, DeviceError) as error:
        print(error)
        return 1
    batches = [int(batch) for batch in options.batches.split(",")]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        jobs: list[tuple[Any, ...]] = []
        if options.bert:
            for form in MODELS:
                for batch in batches:
                    jobs.append((compile_bert, form, batch, bert_path(directory, form, batch)))
        if options.layers:
            for n, k in LAYERS:
                for tokens in TOKENS:
                    for form in FORMS:
                        path = layer_path(directory, n, k, tokens, form)
                        jobs.append((compile_layer, n, k, tokens, form, path))
        compile_all(jobs, options.jobs)
        if options.bert:
            with torch.cuda.stream(torch.cuda.Stream()):  # every engine's
                for row in bert_rows(directory, batches):
                    print(row, flush=True)
        if options.layers:
            for row in layer_rows(directory, options.sparselt):
                print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
