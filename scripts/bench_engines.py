"""The models and the engines that the benchmarks compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from sparse_tvm.models import minilm
from sparse_tvm.models.bert import DISTILBERT, BertConfig, build_bert, random_weights
from sparse_tvm.models.gpt2 import Gpt2Config, build_gpt2, gpt2_weight_shapes
from sparse_tvm.models.graph import draw_weights
from sparse_tvm.models.vit import VitConfig, build_vit, vit_weight_shapes
from sparse_tvm.reference import Reference
from sparse_tvm.runtime import Model

OUTPUT = "last_hidden_state"
SEQUENCE = 128
VOCABULARY = 30522  # the smallest of the models'
ONNX_RUNTIME = f"ONNX Runtime {metadata.version('onnxruntime')}"

Feed = Mapping[str, np.ndarray]
Run = Callable[[Feed], np.ndarray]
"""One run of a model: inputs to last hidden state."""


@dataclass(frozen=True)
class Workload:
    """A model and the input it is timed on.

    Attributes
    ----------
    title : str
        For tables.
    build : Callable[[], onnx.ModelProto]
        Makes the ONNX graph.
    torch : Callable[[], Any]
        Makes the same model of Hugging Face's classes, with the same weights.
    variants : tuple[str, ...]
        What is pruned by default, as ``SPARSITY%:STRUCTURE``.
    inputs : tuple[str, ...]
        Names of the inputs.
    """

    title: str
    build: Callable[[], onnx.ModelProto]
    torch: Callable[[], Any]
    variants: tuple[str, ...]
    inputs: tuple[str, ...] = ("input_ids", "attention_mask", "token_type_ids")

    def feed(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        if "pixel_values" in self.inputs:
            return {"pixel_values": rng.standard_normal((1, 3, 224, 224), np.float32)}
        feed = text_feed(rng, 1, SEQUENCE)
        return {name: feed[name] for name in self.inputs}


def text_feed(rng: np.random.Generator, batch: int, sequence: int) -> dict[str, np.ndarray]:
    """Random tokens without padding."""
    ids = rng.integers(0, VOCABULARY, (batch, sequence))
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
    }


def _torch_bert() -> Any:
    import transformers

    model = transformers.BertModel(transformers.BertConfig(), add_pooling_layer=False)
    return _with_weights(model, random_weights(BertConfig()))


def _torch_distilbert() -> Any:
    import transformers

    names = {
        "encoder.layer": "transformer.layer",
        "attention.self.query": "attention.q_lin",
        "attention.self.key": "attention.k_lin",
        "attention.self.value": "attention.v_lin",
        "attention.output.dense": "attention.out_lin",
        "attention.output.LayerNorm": "sa_layer_norm",
        "intermediate.dense": "ffn.lin1",
        "output.dense": "ffn.lin2",
        "output.LayerNorm": "output_layer_norm",
    }
    weights = {}
    for name, array in random_weights(DISTILBERT).items():
        for theirs, here in names.items():
            name = name.replace(theirs, here)
        weights[name] = array
    return _with_weights(transformers.DistilBertModel(transformers.DistilBertConfig()), weights)


def _torch_minilm() -> Any:
    import transformers

    transformers.logging.set_verbosity_error()  # the unused pooler is no surprise
    transformers.logging.disable_progress_bar()
    directory = minilm.model_directory()
    return transformers.BertModel.from_pretrained(directory, add_pooling_layer=False)


def _torch_vit() -> Any:
    import transformers

    model = transformers.ViTModel(transformers.ViTConfig(), add_pooling_layer=False)
    return _with_weights(model, draw_weights(vit_weight_shapes(VitConfig()), 0))


def _torch_gpt2() -> Any:
    import transformers

    model = transformers.GPT2Model(transformers.GPT2Config(use_cache=False))
    return _with_weights(model, draw_weights(gpt2_weight_shapes(Gpt2Config()), 0))


def _with_weights(model: Any, weights: Mapping[str, np.ndarray]) -> Any:
    import torch

    state = {name: torch.from_numpy(array) for name, array in weights.items()}
    missing = model.load_state_dict(state, strict=False).missing_keys
    if any(name.endswith((".weight", ".bias")) for name in missing):
        raise ValueError(f"no weights for {missing}")
    return model


BERT_VARIANTS = (
    "0%",
    *(f"{sparsity}%:unstructured" for sparsity in (80, 90, 95)),
    *(f"{sparsity}%:4x1" for sparsity in (80, 90, 95)),
)
WORKLOADS = {
    "bert": Workload(
        "BERT-base, 1 x 128 tokens", lambda: build_bert(BertConfig()), _torch_bert, BERT_VARIANTS
    ),
    "minilm": Workload(
        "MiniLM-L6 (real weights), 1 x 128 tokens",
        minilm.build_minilm,
        _torch_minilm,
        ("90%:4x1",),
    ),
    "distilbert": Workload(
        "DistilBERT, 1 x 128 tokens",
        lambda: build_bert(DISTILBERT),
        _torch_distilbert,
        ("90%:unstructured", "90%:4x1"),
        ("input_ids", "attention_mask"),
    ),
    "vit": Workload(
        "ViT-base, 224 x 224 pixels",
        lambda: build_vit(VitConfig()),
        _torch_vit,
        ("90%:unstructured", "90%:4x1"),
        ("pixel_values",),
    ),
    "gpt2": Workload(
        "GPT-2 prefill, 1 x 128 tokens",
        lambda: build_gpt2(Gpt2Config()),
        _torch_gpt2,
        ("90%:unstructured", "90%:4x1"),
        ("input_ids",),
    ),
}


def of(model: Model | Reference) -> Run:
    """One of our artifacts, or ONNX Runtime, as a function."""
    return lambda feed: model.run(feed)[OUTPUT]


def dense_engines(workload: Workload, path: Path, threads: int) -> dict[str, Run]:
    """ONNX Runtime, and every other engine that is installed, with the unpruned model."""
    engines = {ONNX_RUNTIME: of(Reference(path, threads=threads))}
    if find_spec("openvino"):
        engines[f"OpenVINO {metadata.version('openvino')}"] = _openvino(path, threads)
    if find_spec("torch") and find_spec("transformers"):
        engines[f"PyTorch {metadata.version('torch')}"] = _pytorch(workload, threads)
    return engines


def _openvino(path: Path, threads: int) -> Run:
    import openvino

    options = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = openvino.Core().compile_model(path, "CPU", options)
    return lambda feed: compiled(feed)[OUTPUT]


def _pytorch(workload: Workload, threads: int) -> Run:
    import torch

    model = workload.torch().eval()

    def run(feed: Feed) -> np.ndarray:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            inputs = {name: torch.from_numpy(array) for name, array in feed.items()}
            return model(**inputs).last_hidden_state.numpy()

    return run
