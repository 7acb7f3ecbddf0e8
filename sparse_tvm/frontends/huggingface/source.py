"""Hugging Face as a source: a local model directory, or a hub id where there is network."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from sparse_tvm.collection import without_collection
from sparse_tvm.errors import ModelError, OutputError
from sparse_tvm.frontends.detect import read_json
from sparse_tvm.frontends.huggingface.checkpoint import Checkpoint
from sparse_tvm.frontends.huggingface.quantised import InputRounding
from sparse_tvm.frontends.onnx.in_memory import InMemoryTensors
from sparse_tvm.frontends.onnx.prune_outputs import drop_outputs_of
from sparse_tvm.frontends.onnx.quantised import mark_quantised
from sparse_tvm.frontends.onnx.read import first_few, one_line
from sparse_tvm.frontends.source import Source, require
from sparse_tvm.frontends.torch.export import quiet, to_onnx
from sparse_tvm.frontends.torch.source import export, output_names
from sparse_tvm.reference import ReferenceModel

_COMPANIONS = (
    "added_tokens.json",
    "bpe.codes",
    "config.json",
    "config_sentence_transformers.json",
    "merges.txt",
    "modules.json",
    "preprocessor_config.json",
    "processor_config.json",
    "sentence_bert_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "1_Pooling/config.json",
    "2_Normalize/config.json",
)
_EXAMPLE_BATCH, _EXAMPLE_SEQUENCE = 2, 16
_WRAPPED = "model."


class HuggingFaceSource(Source):
    """A directory with ``config.json`` and safetensors."""

    kind = "Hugging Face model"

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), path)
        self._directory = path
        self._arrays = InMemoryTensors()
        self._missing: list[str] = []  # weights that the class has and the checkpoint lacks
        self._dropped: list[str] = []  # outputs that need them

    @classmethod
    def from_hub(cls, hub_id: str) -> HuggingFaceSource:
        """Download a model, or find it in the hub's cache.

        Raises
        ------
        ModelError
            When there is no network, or no such model.
        """
        hub = require("huggingface_hub", "huggingface", hub_id)
        patterns = ["*.safetensors", "*.safetensors.index.json", *_COMPANIONS]
        try:
            return cls(Path(hub.snapshot_download(hub_id, allow_patterns=patterns)))
        except Exception as error:
            raise ModelError(
                f"{hub_id}: no such file or directory, and it cannot be downloaded from the "
                f"Hugging Face hub: {one_line(error, 160)}",
                hint="give a local directory, or check the name and the network",
            ) from error

    @cached_property
    def config(self) -> dict[str, Any]:
        """The contents of ``config.json``."""
        return read_json(self._directory / "config.json")

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The weights as they are stored."""
        quantisation = self.config.get("quantization_config") or {}
        compression = self.config.get("compression_config") or {}
        method = quantisation.get("quant_method", "compressed-tensors")
        if method != "compressed-tensors":
            raise ModelError(
                f"{self.name}: quantised models are not supported: quant_method {method}",
                hint="give the float32 model",
            )
        self._rounding = InputRounding(quantisation or compression, self.name)
        sparsity = (
            quantisation.get("sparsity_config")
            or compression.get("sparsity_config")
            or self.config.get("sparsity_config")
            or {}
        )
        return Checkpoint(self._directory, sparsity)

    @cached_property
    def model(self) -> Any:
        """The transformers model with the head that ``config.json`` names, in float32."""
        with quiet(), without_collection():
            transformers = require("transformers", "huggingface", self.name)
            torch = require("torch", "huggingface", self.name)
            head = self._head(transformers)
        checkpoint = self.checkpoint
        transformers.utils.logging.disable_progress_bar()
        try:
            with quiet(), without_collection():
                config = transformers.AutoConfig.from_pretrained(
                    self._directory, local_files_only=True, trust_remote_code=False
                )
                weights: dict[str, Any] = {"local_files_only": True}
                where: Path | None = self._directory
                if checkpoint.compressed or checkpoint.quantised:
                    config = head.config_class.from_dict(_without_compression(config.to_dict()))
                    where = None
                    weights = {
                        "state_dict": {
                            name: torch.from_numpy(np.array(checkpoint[name], np.float32))
                            for name in checkpoint.names()
                        }
                    }
                model, loading = head.from_pretrained(
                    where,
                    config=config,
                    dtype=torch.float32,
                    output_loading_info=True,
                    **weights,
                )
        except Exception as error:
            raise ModelError(
                f"{self.name}: transformers {transformers.__version__} cannot load it: "
                f"{one_line(error)}"
            ) from error
        self._missing = sorted(loading["missing_keys"])
        for name, layer in self._quantised_layers(model):
            self._rounding.apply(layer, *checkpoint.input_rounding(name))
        return model.eval()

    def _quantised_layers(self, model: Any) -> Iterator[tuple[str, Any]]:
        """The layers whose weights are stored as integers, and those weights' names."""
        prefix = f"{model.base_model_prefix}."
        for path, layer in model.named_modules():
            for stem in (path, path.removeprefix(prefix), prefix + path):
                if f"{stem}.weight" in self.checkpoint.quantised:
                    yield f"{stem}.weight", layer
                    break

    def _head(self, transformers: Any) -> Any:
        names = self.config.get("architectures") or []
        head = getattr(transformers, names[0], None) if names else None
        if head is None:
            raise ModelError(
                f"{self.name}: config.json names "
                + (f"the unknown architecture {names[0]}" if names else "no architecture"),
                hint=f"transformers {transformers.__version__} is installed; models with code of "
                "their own are not supported",
            )
        return head

    @cached_property
    def _program(self) -> Any:
        wrapper, examples, dynamic = _wrap(self.model, self.name)
        return export(wrapper, (), examples, dynamic_shapes=dynamic)

    @cached_property
    def _onnx(self) -> onnx.ModelProto:
        names = output_names(self._program)
        model = to_onnx(self._program, self.name, names, {}, self._arrays, strip=_WRAPPED)
        if self.checkpoint.quantised:
            mark_quantised(model)
        if self._missing:
            # Fine-tuned encoders are often saved without the pooler that nobody uses.
            self._dropped = drop_outputs_of(model.graph, self._missing)
            if not model.graph.output:
                raise ModelError(
                    f"{self.name}: {len(self._missing)} weights of {type(self.model).__name__} "
                    f"are missing, and all its outputs need them: {first_few(self._missing)}",
                    hint="the checkpoint must have the head that config.json names in "
                    "architectures",
                )
        return model

    def notes(self) -> list[str]:
        """See `Source.notes`."""
        self.as_onnx()
        if not self._dropped:
            return []
        return [
            f"left out {', '.join(self._dropped)}: the checkpoint lacks {first_few(self._missing)}"
        ]

    def as_onnx(self) -> onnx.ModelProto:
        """See `Source.as_onnx`."""
        return self._onnx

    def origins(self) -> Mapping[str, str]:
        """See `Source.origins`."""
        stored = self._stored_names()
        found = {name: self.checkpoint.origin(key) for name, key in stored.items()}
        return {name: origin for name, origin in found.items() if origin}

    def _stored_names(self) -> dict[str, str]:
        """Match the model's names to the checkpoint's, which may lack the base model's prefix."""
        stored = self.checkpoint.names()
        prefix = f"{self.model.base_model_prefix}."
        names = {}
        for tensor in self.as_onnx().graph.initializer:
            for key in (tensor.name, tensor.name.removeprefix(prefix), prefix + tensor.name):
                if key in stored:
                    names[tensor.name] = key
                    break
        return names

    def companions(self) -> list[Path]:
        """Return the tokenizer's files."""
        return [Path(name) for name in _COMPANIONS if (self._directory / name).is_file()]

    def reference(self, threads: int) -> ReferenceModel:
        """Return the model in transformers."""
        outputs = [value.name for value in self.as_onnx().graph.output]
        return TransformersReference(self.model, self._program, outputs, threads)

    def write_pruned(self, weights: Mapping[str, np.ndarray], output: Path) -> None:
        """Write a directory, with tokenizer and all, and the pruned weights in safetensors."""
        import torch

        if self.checkpoint.quantised:
            raise ModelError(
                f"{self.name}: weights that are stored as int8 cannot be pruned",
                hint="prune the float32 model, then quantise it",
            )
        if output.exists() and output.samefile(self._directory):
            raise OutputError(f"cannot write {output}: it is the model's own directory")
        state = self.model.state_dict()
        with quiet():
            pruned = {n: torch.from_numpy(np.array(values)) for n, values in weights.items()}
            self.model.load_state_dict({**state, **pruned})
            try:
                # It undoes the renaming of weights that loading does.
                kept = self.model.state_dict()
                for name in self._missing:
                    kept.pop(name, None)
                self.model.save_pretrained(output, state_dict=kept)
                self._copy_others(output)
            except OSError as error:
                raise OutputError(f"cannot write {output}: {error.strerror or error}") from error

    def _copy_others(self, output: Path) -> None:
        """Copy what is neither weights nor written already: the tokenizer, the model card."""
        for path in self._directory.rglob("*"):
            target = output / path.relative_to(self._directory)
            hidden = any(part.startswith(".") for part in target.relative_to(output).parts)
            if path.is_file() and not (hidden or target.exists()) and not _is_weights(path):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)


class TransformersReference(ReferenceModel):
    """A model in transformers, called as its documentation says."""

    engine = "transformers"

    def __init__(self, model: Any, program: Any, outputs: list[str], threads: int) -> None:
        import torch
        import transformers

        self.version = transformers.__version__
        self.inputs = list(program.graph_signature.user_inputs)
        self.outputs = outputs
        self._model = model
        torch.set_num_threads(threads)

    def run(
        self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """See `ReferenceModel.run`."""
        import torch

        tensors = {name: torch.from_numpy(np.array(inputs[name])) for name in self.inputs}
        with torch.no_grad():
            found = self._model(**tensors, **_call_options(self._model))
        names = self.outputs if outputs is None else list(outputs)
        return {name: found[name].numpy() for name in names}

    def compared(
        self, inputs: Mapping[str, np.ndarray], output: np.ndarray, expected: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `ReferenceModel.compared`: of tokens, those that the mask does not drop.

        A masked token may see no token at all, as in a sliding window. What becomes of it then is
        one thing where transformers calls PyTorch's attention, and another where it exports it.
        """
        mask = inputs.get("attention_mask")
        if mask is None or output.shape != expected.shape or output.shape[:2] != mask.shape:
            return output, expected
        return output[mask != 0], expected[mask != 0]


def _is_weights(path: Path) -> bool:
    return path.suffix in (".safetensors", ".bin", ".h5", ".msgpack") or path.name.endswith(
        (".safetensors.index.json", ".bin.index.json")
    )


def _without_compression(config: dict[str, Any]) -> dict[str, Any]:
    dropped = ("quantization_config", "compression_config", "sparsity_config")
    return {key: value for key, value in config.items() if key not in dropped}


def _wrap(model: Any, name: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Return a module to trace, example inputs, and which of their dimensions are symbolic.

    Attention masks come in as the tokenizer makes them and reach the model as what they become
    there anyway: the general code that transformers has for that traces to much slower programs.
    """
    import torch

    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name}: {type(model).__name__} has an encoder and a decoder",
            hint="encoders can be compiled: text encoders and image models",
        )
    dynamic = torch.export.Dim.DYNAMIC
    options = _call_options(model)

    class Pixels(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: Any) -> dict[str, Any]:
            return _tensors(self.model(pixel_values=pixel_values, **options))

    class Tokens(Pixels):
        def forward(  # type: ignore[override]
            self, input_ids: Any, attention_mask: Any, token_type_ids: Any = None
        ) -> dict[str, Any]:
            mask = _additive(attention_mask) if additive else attention_mask
            segments = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
            return _tensors(
                self.model(input_ids=input_ids, attention_mask=mask, **segments, **options)
            )

    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(config, "num_channels", 3)
        pixels = torch.zeros(_EXAMPLE_BATCH, channels, height, width)
        return Pixels().eval(), {"pixel_values": pixels}, {"pixel_values": {0: dynamic}}
    if model.main_input_name != "input_ids":
        raise ModelError(
            f"{name}: {type(model).__name__} takes {model.main_input_name}",
            hint="text encoders (input_ids) and image models (pixel_values) can be compiled",
        )
    shape = (_EXAMPLE_BATCH, _EXAMPLE_SEQUENCE)
    names = ["input_ids", "attention_mask"]
    if getattr(config, "type_vocab_size", 0) > 1 and _takes(model, "token_type_ids"):
        names.append("token_type_ids")
    examples = {key: torch.ones(shape, dtype=torch.int64) for key in names}
    additive = _takes_additive_mask(model, options)
    return Tokens().eval(), examples, {key: {0: dynamic, 1: dynamic} for key in names}


def _additive(attention_mask: Any) -> Any:
    """Return what is added to attention scores: 0 where a token counts, else a huge negative."""
    import torch

    lowest = torch.finfo(torch.float32).min
    return (1.0 - attention_mask[:, None, None, :].to(torch.float32)) * lowest


def _takes_additive_mask(model: Any, options: dict[str, Any]) -> bool:
    """Whether a mask that is added to the scores does the same as the tokenizer's.

    It does not where the model is causal, or looks at the mask in other places.
    """
    import torch

    count = _EXAMPLE_BATCH * _EXAMPLE_SEQUENCE
    ids = torch.arange(count).reshape(_EXAMPLE_BATCH, _EXAMPLE_SEQUENCE)
    ids = ids % getattr(model.config, "vocab_size", count)
    mask = torch.ones_like(ids)
    mask[1, _EXAMPLE_SEQUENCE // 2 :] = 0
    try:
        with torch.no_grad(), quiet():
            plain, added = (
                _tensors(model(input_ids=ids, attention_mask=given, **options))
                for given in (mask, _additive(mask))
            )
    except Exception:
        return False
    return all(torch.allclose(plain[name], added[name], atol=1e-4) for name in plain)


def _takes(model: Any, name: str) -> bool:
    import inspect

    return name in inspect.signature(model.forward).parameters


def _call_options(model: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"return_dict": True}
    if _takes(model, "use_cache"):
        options["use_cache"] = False
    return options


def _tensors(outputs: Any) -> dict[str, Any]:
    import torch

    return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}
