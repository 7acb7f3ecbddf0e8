"""BERT encoders as ONNX graphs, built without PyTorch, from real or random weights.

The graph is spelled the way PyTorch's TorchScript exporter spells Hugging Face's ``BertModel``;
:class:`Style` switches to other exporters' spellings of the same arithmetic.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnx

from sparse_tvm.errors import ModelError, OptionError
from sparse_tvm.models.graph import Graph, draw_weights

if TYPE_CHECKING:
    from numpy.typing import NDArray

Activation = Literal["gelu", "gelu_tanh", "relu"]

_ACTIVATIONS: dict[str, Activation] = {  # Hugging Face's hidden_act
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


@dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT encoder; the defaults are BERT-base's (uncased).

    Without token types the model does not take ``token_type_ids``.
    """

    layers: int = 12
    hidden: int = 768
    heads: int = 12
    intermediate: int = 3072
    vocabulary: int = 30522
    max_positions: int = 512
    token_types: int = 2
    activation: Activation = "gelu"
    epsilon: float = 1e-12

    def __post_init__(self) -> None:
        if self.hidden % self.heads:
            raise OptionError(f"{self.heads} heads do not divide the hidden size {self.hidden}")

    @property
    def head_size(self) -> int:
        """Features per attention head."""
        return self.hidden // self.heads

    @classmethod
    def from_json(cls, path: str | Path) -> BertConfig:
        """Read a Hugging Face ``config.json``.

        Raises
        ------
        ModelError
            When the file cannot be read, or describes something else than a BERT encoder.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            activation = values["hidden_act"]
            positions = values.get("position_embedding_type", "absolute")
            if activation not in _ACTIVATIONS or positions != "absolute":
                raise ModelError(
                    f"{path}: unsupported hidden_act {activation!r} or positions {positions!r}",
                    hint=f"supported are {', '.join(_ACTIVATIONS)} with 'absolute' positions",
                )
            return cls(
                layers=values["num_hidden_layers"],
                hidden=values["hidden_size"],
                heads=values["num_attention_heads"],
                intermediate=values["intermediate_size"],
                vocabulary=values["vocab_size"],
                max_positions=values["max_position_embeddings"],
                token_types=values["type_vocab_size"],
                activation=_ACTIVATIONS[activation],
                epsilon=values["layer_norm_eps"],
            )
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: not a readable JSON file: {error}") from error
        except (KeyError, TypeError) as error:
            raise ModelError(f"{path}: not a BERT configuration: {error}") from error


DISTILBERT = BertConfig(layers=6, token_types=0)
"""DistilBERT: half of BERT-base's layers, no token types."""


@dataclass(frozen=True)
class Style:
    """How an exporter spells the same arithmetic; the defaults are PyTorch's TorchScript exporter.

    Attributes
    ----------
    dense
        ``matmul``: weight stored ``[in, out]``, then Add; ``gemm``: weight stored ``[out, in]``,
        between Reshapes to and from two dimensions.
    layer_norm
        ``op``: LayerNormalization (opset 17); ``decomposed``: ReduceMean, Sub, Pow, Sqrt, Div.
    gelu
        ``decomposed``: Erf or Tanh and arithmetic; ``op``: Gelu (opset 20).
    scale
        Scores are divided by sqrt(d) (``div``) or multiplied by its inverse (``mul``).
    opset
        Version of the ONNX operator set, 11 or later.
    """

    dense: Literal["matmul", "gemm"] = "matmul"
    layer_norm: Literal["op", "decomposed"] = "op"
    gelu: Literal["decomposed", "op"] = "decomposed"
    scale: Literal["div", "mul"] = "div"
    opset: int = 17

    def __post_init__(self) -> None:
        needed = max(11, 17 if self.layer_norm == "op" else 0, 20 if self.gelu == "op" else 0)
        if self.opset < needed:
            raise OptionError(f"{self} needs opset {needed} or later")


def weight_shapes(config: BertConfig) -> dict[str, tuple[int, ...]]:
    """Names (Hugging Face's) and shapes (linear layers ``[out, in]``) of every weight, in order."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, outputs: int, inputs: int) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        shapes[f"{name}.bias"] = (outputs,)

    def layer_norm(name: str) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (config.hidden,)

    shapes["embeddings.word_embeddings.weight"] = (config.vocabulary, config.hidden)
    shapes["embeddings.position_embeddings.weight"] = (config.max_positions, config.hidden)
    if config.token_types:
        shapes["embeddings.token_type_embeddings.weight"] = (config.token_types, config.hidden)
    layer_norm("embeddings.LayerNorm")
    for index in range(config.layers):
        layer = f"encoder.layer.{index}"
        for projection in ("query", "key", "value"):
            linear(f"{layer}.attention.self.{projection}", config.hidden, config.hidden)
        linear(f"{layer}.attention.output.dense", config.hidden, config.hidden)
        layer_norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", config.intermediate, config.hidden)
        linear(f"{layer}.output.dense", config.hidden, config.intermediate)
        layer_norm(f"{layer}.output.LayerNorm")
    linear("pooler.dense", config.hidden, config.hidden)
    return shapes


def random_weights(config: BertConfig, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Draw every weight from a normal distribution of deviation 0.02, LayerNorm's gain around 1."""
    return draw_weights(weight_shapes(config), seed)


def build_bert(
    config: BertConfig,
    weights: Mapping[str, NDArray[np.float32]] | None = None,
    *,
    seed: int = 0,
    batch: int | str = 1,
    sequence: int | str = 128,
    pooler: bool = False,
    attention_mask: bool = True,
    style: Style | None = None,
) -> onnx.ModelProto:
    """Build the ONNX graph of a BERT encoder.

    Inputs, int64 ``[batch, sequence]``: ``input_ids``, ``attention_mask`` (1 for tokens, 0 for
    padding) and ``token_type_ids``, if the model has them. Outputs, float32: ``last_hidden_state``
    ``[batch, sequence, hidden]`` and, with a pooler, ``pooler_output`` ``[batch, hidden]``.

    Parameters
    ----------
    config : BertConfig
        Sizes of the model.
    weights : mapping, optional
        float32 arrays named and shaped as :func:`weight_shapes` says; drawn at random by default.
    seed : int
        Of the random weights.
    batch, sequence : int or str
        A fixed size, or the name of a symbolic dimension.
    pooler : bool
        Also compute the tanh-activated projection of the first token.
    attention_mask : bool
        Whether the model takes and applies a padding mask.
    style : Style, optional
        The exporter's spelling.

    Raises
    ------
    ModelError
        When a weight is missing or its shape does not fit the configuration.
    OptionError
        When the sequence is longer than the position embeddings.
    """
    if isinstance(sequence, int) and sequence > config.max_positions:
        raise OptionError(
            f"sequence {sequence} is longer than the model's {config.max_positions} positions"
        )
    if weights is None:
        weights = random_weights(config, seed)
    _check_weights(config, weights, pooler)
    builder = _BertBuilder(config, weights, style or Style(), batch, sequence)
    return builder.build(pooler=pooler, attention_mask=attention_mask)


def _check_weights(
    config: BertConfig, weights: Mapping[str, NDArray[np.float32]], pooler: bool
) -> None:
    for name, shape in weight_shapes(config).items():
        if name.startswith("pooler.") and not pooler:
            continue
        if name not in weights:
            raise ModelError(f"weight {name} is missing", hint=f"its shape is {list(shape)}")
        if weights[name].shape != shape:
            raise ModelError(
                f"weight {name} has shape {list(weights[name].shape)}, expected {list(shape)}"
            )


class _BertBuilder:
    def __init__(
        self,
        config: BertConfig,
        weights: Mapping[str, NDArray[np.float32]],
        style: Style,
        batch: int | str,
        sequence: int | str,
    ) -> None:
        self.config = config
        self.weights = weights
        self.style = style
        self.batch = batch
        self.sequence = sequence
        self.graph = Graph(style.opset)

    def build(self, *, pooler: bool, attention_mask: bool) -> onnx.ModelProto:
        mask = self.mask_bias() if attention_mask else None
        with self.graph.scope("embeddings"):
            hidden = self.embeddings()
        for index in range(self.config.layers):
            last = index == self.config.layers - 1
            with self.graph.scope("encoder"), self.graph.scope(f"layer.{index}"):
                hidden = self.encoder_layer(
                    f"encoder.layer.{index}", hidden, mask, "last_hidden_state" if last else None
                )
        if pooler:
            with self.graph.scope("pooler"):
                self.pooler(hidden)
        return self.model(pooler=pooler, attention_mask=attention_mask)

    def embeddings(self) -> str:
        graph = self.graph
        words = graph.op("Gather", self.weight("embeddings.word_embeddings.weight"), "input_ids")
        total = words
        if self.config.token_types:
            table = self.weight("embeddings.token_type_embeddings.weight")
            total = graph.op("Add", words, graph.op("Gather", table, "token_type_ids"))
        positions = graph.op(
            "Gather", self.weight("embeddings.position_embeddings.weight"), self.position_ids()
        )
        total = graph.op("Add", total, positions)
        return self.layer_norm("embeddings.LayerNorm", total)

    def position_ids(self) -> str:
        if isinstance(self.sequence, int):
            ids = np.arange(self.sequence)[None, :]
            return self.graph.initializer("embeddings.position_ids", ids)
        ids = np.arange(self.config.max_positions)[None, :]
        table = self.graph.initializer("embeddings.position_ids", ids)
        start, axis = self.graph.constant([0]), self.graph.constant([1])
        return self.graph.op("Slice", table, start, self.dimension(1), axis)

    def mask_bias(self) -> str:
        """Return 0 where the mask is 1 and the lowest float where it is 0: [batch, 1, 1, seq]."""
        graph = self.graph
        mask = graph.unsqueeze(graph.unsqueeze("attention_mask", 1), 2)
        mask = graph.op("Cast", mask, to=onnx.TensorProto.FLOAT)
        padding = graph.op("Sub", graph.constant(1.0), mask)
        return graph.op("Mul", padding, graph.constant(float(np.finfo(np.float32).min)))

    def encoder_layer(self, name: str, hidden: str, mask: str | None, output: str | None) -> str:
        with self.graph.scope("attention"):
            context = self.attention(f"{name}.attention.self", hidden, mask)
            with self.graph.scope("output"):
                hidden = self.residual(f"{name}.attention.output", context, hidden)
        with self.graph.scope("intermediate"):
            wide = self.dense(f"{name}.intermediate.dense", hidden)
            wide = self.activation(wide)
        with self.graph.scope("output"):
            return self.residual(f"{name}.output", wide, hidden, output)

    def attention(self, name: str, hidden: str, mask: str | None) -> str:
        graph = self.graph
        with graph.scope("self"):
            query = self.heads(f"{name}.query", hidden, perm=[0, 2, 1, 3])
            key = self.heads(f"{name}.key", hidden, perm=[0, 2, 3, 1])
            value = self.heads(f"{name}.value", hidden, perm=[0, 2, 1, 3])
            scores = self.scale(graph.op("MatMul", query, key))
            if mask is not None:
                scores = graph.op("Add", scores, mask)
            probabilities = graph.op("Softmax", scores, axis=-1)
            context = graph.op("MatMul", probabilities, value)
            context = graph.op("Transpose", context, perm=[0, 2, 1, 3])
            return self.reshape(context, self.config.hidden)

    def heads(self, name: str, hidden: str, perm: list[int]) -> str:
        projected = self.dense(name, hidden)
        split = self.reshape(projected, self.config.heads, self.config.head_size)
        return self.graph.op("Transpose", split, perm=perm)

    def scale(self, scores: str) -> str:
        root = math.sqrt(self.config.head_size)
        if self.style.scale == "div":
            return self.graph.op("Div", scores, self.graph.constant(root))
        return self.graph.op("Mul", scores, self.graph.constant(1 / root))

    def residual(self, name: str, value: str, skip: str, output: str | None = None) -> str:
        total = self.graph.op("Add", self.dense(f"{name}.dense", value), skip)
        return self.layer_norm(f"{name}.LayerNorm", total, output)

    def dense(self, name: str, value: str) -> str:
        """Linear layer of weight ``[out, in]`` on ``[batch, sequence, in]``."""
        graph = self.graph
        outputs, inputs = self.weights[f"{name}.weight"].shape
        with graph.scope(name.rsplit(".", 1)[-1]):
            bias = self.weight(f"{name}.bias")
            if self.style.dense == "gemm":
                flat = graph.op("Reshape", value, graph.constant([-1, inputs]))
                flat = graph.op("Gemm", flat, self.weight(f"{name}.weight"), bias, transB=1)
                return self.reshape(flat, outputs)
            kernel = graph.initializer(f"{name}.weight", self.weights[f"{name}.weight"].T)
            return graph.op("Add", bias, graph.op("MatMul", value, kernel))

    def activation(self, value: str) -> str:
        kind = self.config.activation
        with self.graph.scope("intermediate_act_fn"):
            if kind == "relu":
                return self.graph.op("Relu", value)
            if self.style.gelu == "op":
                approximate = "tanh" if kind == "gelu_tanh" else "none"
                return self.graph.op("Gelu", value, approximate=approximate)
            graph = self.graph
            return graph.gelu_tanh(value) if kind == "gelu_tanh" else graph.gelu_erf(value)

    def layer_norm(self, name: str, x: str, output: str | None = None) -> str:
        graph, epsilon = self.graph, self.config.epsilon
        with graph.scope("LayerNorm"):
            gain, shift = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
            if self.style.layer_norm == "op":
                return graph.layer_norm(x, gain, shift, epsilon, output)
            centred = graph.op("Sub", x, self.reduce_mean(x))
            variance = self.reduce_mean(graph.op("Pow", centred, graph.constant(2.0)))
            deviation = graph.op("Sqrt", graph.op("Add", variance, graph.constant(epsilon)))
            normal = graph.op("Div", centred, deviation)
            return graph.op("Add", graph.op("Mul", normal, gain), shift, output=output)

    def pooler(self, hidden: str) -> None:
        graph = self.graph
        token = graph.op("Gather", hidden, graph.constant(0), axis=1)
        weight, bias = self.weight("pooler.dense.weight"), self.weight("pooler.dense.bias")
        pooled = graph.op("Gemm", token, weight, bias, transB=1)
        graph.op("Tanh", pooled, output="pooler_output")

    def weight(self, name: str) -> str:
        return self.graph.initializer(name, self.weights[name])

    def reduce_mean(self, x: str) -> str:
        if self.style.opset < 18:
            return self.graph.op("ReduceMean", x, axes=[-1])
        return self.graph.op("ReduceMean", x, self.graph.constant([-1]))

    def dimension(self, axis: int) -> str:
        """One-element tensor that holds input_ids' size along an axis."""
        fixed = (self.batch, self.sequence)[axis]
        if isinstance(fixed, int):
            return self.graph.constant([fixed])
        return self.graph.unsqueeze(self.graph.size("input_ids", axis), 0)

    def reshape(self, x: str, *features: int) -> str:
        """Reshape to ``[batch, sequence, *features]``."""
        if isinstance(self.batch, int) and isinstance(self.sequence, int):
            return self.graph.reshape(x, self.batch, self.sequence, *features)
        return self.graph.reshape(x, self.dimension(0), self.dimension(1), *features)

    def model(self, *, pooler: bool, attention_mask: bool) -> onnx.ModelProto:
        names = ["input_ids"]
        if attention_mask:
            names.append("attention_mask")
        if self.config.token_types:
            names.append("token_type_ids")
        tokens, hidden = [self.batch, self.sequence], self.config.hidden
        integer, real = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
        outputs = {"last_hidden_state": (real, [*tokens, hidden])}
        if pooler:
            outputs["pooler_output"] = (real, [self.batch, hidden])
        return self.graph.model("bert", dict.fromkeys(names, (integer, tokens)), outputs)
