"""Low precision in whole models: BERT-base beside engines that round as well.

``bench_models.py --precision`` runs it. OpenVINO takes part as it comes, which computes in bf16
where the CPU has it, and with the model quantised by nncf; ONNX Runtime with float32, and with
weights and activations quantised by its dynamic int8. Outputs are compared with float32's.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
from bench_engines import ONNX_RUNTIME, OUTPUT, Feed, Run, Workload, of
from bench_tables import Variant

from sparse_tvm.reference import Reference
from sparse_tvm.schedules.x86.units import AMX_FEATURES, AVX512_BF16
from sparse_tvm.targets import get_target

VARIANTS = (
    "0%@int8",
    "90%:unstructured@fp32",
    "90%:unstructured@int8",
    "90%:4x1@fp32",
    "90%:1x4@int8",
    "90%:4x4@int8",
)
BF16_VARIANTS = ("0%@bf16", "90%:unstructured@bf16")
DOT_VARIANTS = ("90%:4x2@bf16",)
AMX_VARIANTS = (
    "90%:16x2@bf16",
    "90%:16x4@int8",
    "90%:32x4@int8",
    "90%:16x64@int8",
)


def variants() -> list[Variant]:
    """What this machine has instructions for."""
    target = get_target("native")
    found = [*VARIANTS]
    if target.has(*AMX_FEATURES):
        found += [*BF16_VARIANTS, *AMX_VARIANTS]
    elif target.has(*AVX512_BF16.features):
        found += [*BF16_VARIANTS, *DOT_VARIANTS]
    return [Variant(text) for text in found]


def engines(workload: Workload, dense: Path, threads: int, feed: Feed) -> dict[str, Run]:
    """The engines, with the unpruned model."""
    found = {ONNX_RUNTIME: of(Reference(dense, threads=threads))}
    found["ONNX Runtime dynamic int8"] = of(Reference(_dynamic(dense), threads=threads))
    if find_spec("openvino"):
        found["OpenVINO as it comes"] = _openvino(dense, threads)
    if find_spec("openvino") and find_spec("nncf"):
        found["OpenVINO int8 (nncf)"] = _openvino(_nncf(dense, feed), threads)
    return found


def _dynamic(dense: Path) -> Path:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = dense.with_suffix(".dynamic.onnx")
    if not path.exists():
        model = onnx.load(dense)
        quantize_dynamic(model, path, weight_type=QuantType.QInt8, per_channel=True)
    return path


def _openvino(path: Path, threads: int) -> Run:
    import openvino

    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(path, "CPU", options)
    return lambda feed: compiled(feed)[OUTPUT]


def _nncf(dense: Path, feed: Feed) -> Path:
    """The model as nncf quantises it, calibrated on one input."""
    import nncf
    import openvino

    path = dense.with_suffix(".nncf.xml")
    if not path.exists():
        model, data = openvino.Core().read_model(dense), nncf.Dataset([feed])
        quantised = nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER)
        openvino.save_model(quantised, path, compress_to_fp16=False)
    return path


def least_cosine(output: np.ndarray, expected: np.ndarray) -> float:
    """Of any token's features."""
    from sparse_tvm.verification import Similarity

    return Similarity.of(output, expected).cosine
