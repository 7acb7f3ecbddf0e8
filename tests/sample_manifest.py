from __future__ import annotations

from typing import Any


def sample_layer(name: str, sparsity: float, **changes: Any) -> dict[str, Any]:
    layer = {
        "name": name,
        "op": "dense",
        "shape": [3072, 768],
        "sparsity": sparsity,
        "nnz": round((1 - sparsity) * 3072 * 768),
        "structure": "4x1 blocks (fill 1.00)",
        "format": "bsr",
        "block": [4, 1],
        "kernel": "bsr_4x1_3072x768_bias_gelu_residual",
        "epilogue": ["bias", "gelu"],
        "reason": "rule value=csr; 7.6x faster than dense (predicted)",
        "bytes": 1_200_000,
        "precision": "float32",
        "basis": "predicted",
        "times": {"tokens": 128, "predicted": {"seconds": 1e-5, "dense_seconds": 7.6e-5}},
    }
    return {**layer, **changes}


def sample_manifest(depth: int = 2) -> dict[str, Any]:
    layers = []
    for index in range(depth):
        prefix = f"bert.encoder.layer.{index}"
        layers += [
            sample_layer(f"{prefix}.attention.self.query", 0.9, shape=[768, 768]),
            sample_layer(f"{prefix}.intermediate.dense", 0.95, block=None, format="csr"),
        ]
    layers.append(
        sample_layer(
            "pooler|<dense>",
            0.0,
            block=None,
            format="dense",
            structure="dense",
            epilogue=[],
            reason="sparsity 0.000: every sparse format is predicted slower",
        )
    )
    return {
        "format_version": 2,
        "versions": {"sparse_tvm": "0.1.0", "tvm": "0.27.0.post1", "tvm_ffi": "0.1.14.post1"},
        "model": {
            "name": "bert_base",
            "source": "bert_base.onnx",
            "kind": "ONNX model",
            "sha256": "0" * 64,
        },
        "backend": "cpu",
        "device": "cpu",
        "target": {
            "name": "x86-64-v3",
            "triple": "x86_64-linux-gnu",
            "cpu": "znver3",
            "features": ["avx2", "fma"],
            "vector_bits": 256,
        },
        "threads": 2,
        "inputs": [{"name": "input_ids", "dtype": "int64", "shape": [1, 128]}],
        "outputs": [{"name": "last_hidden_state", "dtype": "float32", "shape": [1, 128, 768]}],
        "layers": layers,
        "notes": ["attention at lv7 runs unfused: v is scaled"],
        "totals": {
            "parameters": 109_482_240,
            "nonzeros": 32_345_678,
            "weight_bytes": 143_000_000,
            "file_bytes": 145_200_000,
        },
        "compile": {
            "seconds": 41.25,
            "peak_memory_bytes": 2_100_000_000,
            "phases": [{"name": "read", "seconds": 0.8}, {"name": "build", "seconds": 21.5}],
        },
        "verification": {
            "reference": "ONNX Runtime 1.31.1",
            "tolerance": 1e-4,
            "max_abs_diff": {"last_hidden_state": 3.1e-6},
        },
        "weights": [],
        "kernels": {},
    }
