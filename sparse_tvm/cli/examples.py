"""What ``--help`` shows below the options: commands that people begin with."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "compile": (
        "sparse-tvm compile pruned.onnx -o model.so",
        "sparse-tvm compile pruned.onnx -o model.so --input-shape input_ids:1,128",
        "sparse-tvm compile path/to/checkpoint -o model.so --target neoverse-n1",
        "sparse-tvm compile pruned.onnx -o model.so --precision int8 --min-cosine 0.98",
        "sparse-tvm compile pruned.onnx -o model.so --layer 'pooler=dense'",
        "sparse-tvm compile pruned.onnx --dry-run",
    ),
    "run": (
        "sparse-tvm run model.so --random",
        "sparse-tvm run model.so --random --shape batch=8",
        "sparse-tvm run model.so -i inputs.npz -o outputs.npz",
    ),
    "bench": (
        "sparse-tvm bench model.so --against pruned.onnx --threads 2",
        "sparse-tvm bench model.so --shape input_ids:8,128 --profile --report report.html",
        "sparse-tvm bench model.so --shape batch=1,8,32 --against pruned.onnx",
    ),
    "serve": (
        "sparse-tvm serve model.so",
        "sparse-tvm serve models/ --port 8000 --grpc-port 8001",
    ),
    "inspect": ("sparse-tvm inspect pruned.onnx", "sparse-tvm inspect model.so --json"),
    "verify": ("sparse-tvm verify model.so",),
    "plan": (
        "sparse-tvm plan model.onnx --latency 5ms -o plan.json",
        "sparse-tvm plan model.onnx --speedup 4x --threads 2 -o plan.json --report plan.html",
        "sparse-tvm plan model.onnx --size 20MB --structure 4x1 -o plan.json",
        "sparse-tvm plan model.onnx --what-if 90%:4x1",
        "sparse-tvm plan --shapes shapes.csv --what-if 80%:unstructured",
    ),
    "prune": ("sparse-tvm prune model.onnx -o pruned.onnx --sparsity 0.9 --structure 4x1",),
    "tune": ("sparse-tvm tune pruned.onnx -o records.jsonl --time 10m",),
    "targets": ("sparse-tvm targets",),
    "doctor": ("sparse-tvm doctor",),
}


def epilog(verb: str) -> str:
    """The examples of a verb, each on a line of its own."""
    return "\n\n".join(("Examples:", *EXAMPLES[verb]))
