"""The zoo's language models: encoders, heads, decoders with and without a cache, translators."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from zoo_doors import (
    DYNAMO,
    LEGACY,
    MODULE,
    PT2,
    Family,
    Feeds,
    TorchModel,
    huggingface,
    torch_door,
)

VOCABULARY, HIDDEN, LAYERS, HEADS, INNER, POSITIONS = 100, 64, 2, 4, 128, 128
USUAL = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BATCH_AND_LENGTH = {0: "batch", 1: "sequence"}


def transformer(config: str, head: str, /, **options: Any) -> Any:
    """A model of transformers with random weights. An option that is None is not given."""
    import transformers

    given = {name: value for name, value in {**USUAL, **options}.items() if value is not None}
    return getattr(transformers, head)(getattr(transformers, config)(**given))


# Configuration, class, and what differs from the usual sizes.
ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertModel", {}),
    "bert-tokens": ("BertConfig", "BertForTokenClassification", {}),
    "bert-answers": ("BertConfig", "BertForQuestionAnswering", {}),
    "bert-masked-lm": ("BertConfig", "BertForMaskedLM", {}),
    "roberta": ("RobertaConfig", "RobertaModel", {"pad_token_id": 1, "bos_token_id": 0}),
    "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaForSequenceClassification", {}),
    "camembert": ("CamembertConfig", "CamembertModel", {}),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        {"dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": INNER},
    ),
    "albert": ("AlbertConfig", "AlbertModel", {"embedding_size": 32}),
    "electra": ("ElectraConfig", "ElectraForPreTraining", {"embedding_size": 32}),
    "mpnet": ("MPNetConfig", "MPNetModel", {}),
    "deberta": (
        "DebertaConfig",
        "DebertaModel",
        {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ),
    "deberta-v2": (
        "DebertaV2Config",
        "DebertaV2Model",
        {
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_buckets": 16,
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
        },
    ),
    "ernie": ("ErnieConfig", "ErnieModel", {}),
    "megatron-bert": ("MegatronBertConfig", "MegatronBertModel", {}),
    "modernbert": (
        "ModernBertConfig",
        "ModernBertModel",
        {"local_attention": 16, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "nystromformer": (
        "NystromformerConfig",
        "NystromformerModel",
        {"num_landmarks": 16, "segment_means_seq_len": 16},
    ),
    "roformer": ("RoFormerConfig", "RoFormerModel", {"embedding_size": HIDDEN}),
    "rembert": (
        "RemBertConfig",
        "RemBertModel",
        {"input_embedding_size": 32, "output_embedding_size": 32},
    ),
    "convbert": ("ConvBertConfig", "ConvBertModel", {"embedding_size": HIDDEN}),
    "squeezebert": ("SqueezeBertConfig", "SqueezeBertModel", {"embedding_size": HIDDEN}),
    "mobilebert": (
        "MobileBertConfig",
        "MobileBertModel",
        {"embedding_size": 32, "true_hidden_size": 32, "intra_bottleneck_size": 32},
    ),
    "funnel": (
        "FunnelConfig",
        "FunnelBaseModel",
        {
            "num_hidden_layers": None,
            "block_sizes": [1, 1],
            "d_model": HIDDEN,
            "n_head": HEADS,
            "d_head": 16,
            "d_inner": INNER,
        },
    ),
    "big-bird": ("BigBirdConfig", "BigBirdModel", {"attention_type": "original_full"}),
    "data2vec-text": ("Data2VecTextConfig", "Data2VecTextModel", {}),
    "esm": (
        "EsmConfig",
        "EsmModel",
        {"position_embedding_type": "rotary", "mask_token_id": 3, "emb_layer_norm_before": True},
    ),
    "ibert": ("IBertConfig", "IBertModel", {}),
    "xlm": ("XLMConfig", "XLMModel", {"emb_dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS}),
    "flaubert": (
        "FlaubertConfig",
        "FlaubertModel",
        {"emb_dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS},
    ),
    "t5-encoder": (
        "T5Config",
        "T5EncoderModel",
        {"d_model": HIDDEN, "d_kv": 16, "d_ff": INNER, "num_layers": LAYERS, "num_heads": HEADS},
    ),
    "clip-text": ("CLIPTextConfig", "CLIPTextModel", {"projection_dim": 32, "eos_token_id": 99}),
    "siglip-text": ("SiglipTextConfig", "SiglipTextModel", {"projection_size": HIDDEN}),
    "luke": ("LukeConfig", "LukeModel", {"entity_vocab_size": 20, "entity_emb_size": 16}),
    "eurobert": ("EuroBertConfig", "EuroBertModel", {"num_key_value_heads": 2}),
}

FEW_KEYS = {"num_key_value_heads": 2}
GPT = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS}
DECODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT),
    "gpt-neo": (
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        {
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
        },
    ),
    "gpt-neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {}),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", {**GPT, "rotary_dim": 8}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", FEW_KEYS),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**FEW_KEYS, "sliding_window": 8}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", FEW_KEYS),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**FEW_KEYS, "head_dim": 16}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**FEW_KEYS, "head_dim": 16}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**FEW_KEYS, "head_dim": 16, "sliding_window": 8},
    ),
    "phi": ("PhiConfig", "PhiForCausalLM", {}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", FEW_KEYS),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {"ffn_dim": INNER, "word_embed_proj_dim": HIDDEN},
    ),
    "bloom": ("BloomConfig", "BloomForCausalLM", {"n_layer": LAYERS, "n_head": HEADS}),
    "falcon": ("FalconConfig", "FalconForCausalLM", {"multi_query": True, "alibi": False}),
    "mpt": (
        "MptConfig",
        "MptForCausalLM",
        {"d_model": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": POSITIONS},
    ),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", FEW_KEYS),
    "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", FEW_KEYS),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", FEW_KEYS),
    "cohere": ("CohereConfig", "CohereForCausalLM", FEW_KEYS),
    "granite": ("GraniteConfig", "GraniteForCausalLM", FEW_KEYS),
}


def with_cache(config: str, head: str, options: dict[str, Any]) -> TorchModel:
    """A decoder that takes the past's keys and values, and returns all of them."""
    import torch
    from transformers import DynamicCache

    model = transformer(config, head, **options)
    given = model.config
    groups = getattr(given, "num_key_value_heads", None) or given.num_attention_heads
    size = getattr(given, "head_dim", None) or given.hidden_size // given.num_attention_heads
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    class Cached(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self, input_ids: Any, attention_mask: Any, position_ids: Any, past: Any
        ) -> tuple[Any, ...]:
            cache = DynamicCache()
            for layer, (key, value) in enumerate(past):
                cache.update(key, value, layer)
            positions = {"position_ids": position_ids} if takes_positions else {}
            found = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                past_key_values=cache,
                use_cache=True,
                **positions,
            )
            kept = [t for layer in found.past_key_values.layers for t in (layer.keys, layer.values)]
            return (found.logits, *kept)

    batch, new, past = 2, 3, 5
    count = given.num_hidden_layers
    layers = [tuple(torch.randn(batch, groups, past, size) for _ in range(2)) for _ in range(count)]
    names = [f"past_key_values.{i}.{part}" for i in range(count) for part in ("key", "value")]
    axes = {
        "input_ids": BATCH_AND_LENGTH,
        "attention_mask": {0: "batch", 1: "past + sequence"},
        "position_ids": BATCH_AND_LENGTH,
        **{name: {0: "batch", 2: "past"} for name in names},
    }
    inputs = (
        torch.ones(batch, new, dtype=torch.int64),
        torch.ones(batch, past + new, dtype=torch.int64),
        torch.arange(past, past + new).expand(batch, new).contiguous(),
        layers,
    )
    return TorchModel(
        Cached(), inputs, ["input_ids", "attention_mask", "position_ids", *names], axes
    )


CACHED = ("gpt2", "gpt-neox", "llama", "mistral", "qwen2", "gemma", "phi", "opt")


def encoder_and_decoder(config: str, head: str, **options: Any) -> TorchModel:
    """A translator: a whole text and what was said of it so far, at once."""
    import torch

    model = transformer(config, head, **options)

    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, decoder_input_ids: Any) -> Any:
            return self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                decoder_input_ids=decoder_input_ids,
                use_cache=False,
            ).logits

    ones = torch.ones(2, 8, dtype=torch.int64)
    axes = {
        "input_ids": BATCH_AND_LENGTH,
        "attention_mask": BATCH_AND_LENGTH,
        "decoder_input_ids": {0: "batch", 1: "said"},
    }
    return TorchModel(Both(), (ones, ones, ones[:, :5].clone()), list(axes), axes, adapt=_tokens)


def _tokens(feeds: Feeds) -> Feeds:
    """Mask only ends: what is at the beginning decides where embeddings of position start."""
    mask = feeds["attention_mask"]
    return {**feeds, "attention_mask": -np.sort(-mask, axis=1)}


ADAPTED = {"clip-text": {"adapt": _tokens}}
"""Its first token, which sees only itself, may stand for a whole text: it must not be masked."""

BOTH = {
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
    "decoder_start_token_id": 2,
}
T5 = {
    "d_model": HIDDEN,
    "d_kv": 16,
    "d_ff": INNER,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "decoder_start_token_id": 0,
}
TRANSLATORS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "t5": ("T5Config", "T5ForConditionalGeneration", T5, LEGACY),
    "bart": ("BartConfig", "BartForConditionalGeneration", BOTH, LEGACY),
    "marian": ("MarianConfig", "MarianMTModel", BOTH, DYNAMO),
    "pegasus": ("PegasusConfig", "PegasusForConditionalGeneration", BOTH, DYNAMO),
    "m2m100": ("M2M100Config", "M2M100ForConditionalGeneration", BOTH, MODULE),
}


def tokens(config: str, head: str, options: dict[str, Any]) -> TorchModel:
    """An encoder by another door."""
    import torch

    model = transformer(config, head, **options)

    class Tokens(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]

    ones = torch.ones(2, 8, dtype=torch.int64)
    axes = {"input_ids": BATCH_AND_LENGTH, "attention_mask": BATCH_AND_LENGTH}
    return TorchModel(Tokens(), (ones, ones), list(axes), axes)


def torch_encoder(*, length: bool) -> TorchModel:
    """PyTorch's own encoder, with padding masks; the legacy exporter fixes its length anyway."""
    import torch
    from torch import nn

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embeddings = nn.Embedding(VOCABULARY, HIDDEN)
            layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, INNER, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
            self.scores = nn.Linear(HIDDEN, 5)

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            padding = attention_mask == 0
            found = self.encoder(self.embeddings(input_ids), src_key_padding_mask=padding)
            return self.scores(found)

    ones = torch.ones(2, 8, dtype=torch.int64)
    symbolic = BATCH_AND_LENGTH if length else {0: "batch"}
    axes = {"input_ids": symbolic, "attention_mask": symbolic}
    return TorchModel(Encoder(), (ones, ones), list(axes), axes)


def text_convolution() -> TorchModel:
    """Kim's convolutions over words."""
    import torch
    from torch import nn

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embeddings = nn.Embedding(VOCABULARY, 32)
            self.convolutions = nn.ModuleList(nn.Conv1d(32, 32, size) for size in (3, 4, 5))
            self.scores = nn.Linear(96, 4)

        def forward(self, input_ids: Any) -> Any:
            x = self.embeddings(input_ids).transpose(1, 2)
            pooled = [torch.relu(c(x)).amax(2) for c in self.convolutions]
            return self.scores(torch.cat(pooled, 1))

    ids = torch.ones(2, 12, dtype=torch.int64)
    return TorchModel(Words(), (ids,), ["input_ids"], {"input_ids": BATCH_AND_LENGTH})


def _of(make: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[[], Any]:
    return partial(make, *arguments, **options)


FAMILIES: list[Family] = [
    *(
        Family(
            name,
            "text encoder",
            "Hugging Face",
            huggingface(_of(transformer, c, h, **o), **ADAPTED.get(name, {})),
        )
        for name, (c, h, o) in ENCODERS.items()
    ),
    *(
        Family(name, "decoder", "Hugging Face", huggingface(_of(transformer, c, h, **o)))
        for name, (c, h, o) in DECODERS.items()
    ),
    *(
        Family(
            f"{name}-cache-{short}",
            "decoder with cache",
            door,
            torch_door(door, _of(with_cache, *DECODERS[name])),
        )
        for index, name in enumerate(CACHED)
        for short, door in (("legacy", LEGACY), ("dynamo", DYNAMO))
        if index < 3 or (index % 2 == 0) == (door == DYNAMO)
    ),
    *(
        Family(name, "translator", door, torch_door(door, _of(encoder_and_decoder, c, h, **o)))
        for name, (c, h, o, door) in TRANSLATORS.items()
    ),
    *(
        Family(
            f"{name}-{short}", "text encoder", door, torch_door(door, _of(tokens, *ENCODERS[name]))
        )
        for name, short, door in (
            ("bert", "legacy", LEGACY),
            ("roberta", "dynamo", DYNAMO),
            ("distilbert", "pt2", PT2),
            ("deberta-v2", "legacy", LEGACY),
            ("modernbert", "dynamo", DYNAMO),
        )
    ),
    Family(
        "torch-encoder",
        "text encoder",
        LEGACY,
        torch_door(LEGACY, partial(torch_encoder, length=False)),
    ),
    Family(
        "torch-encoder-dynamo",
        "text encoder",
        DYNAMO,
        torch_door(DYNAMO, partial(torch_encoder, length=True)),
    ),
    Family("text-cnn", "text encoder", DYNAMO, torch_door(DYNAMO, text_convolution)),
]
