"""The zoo's models of sound and of other series, and its recurrent models."""

from __future__ import annotations

from functools import partial
from typing import Any

from zoo_doors import (
    DYNAMO,
    KERAS,
    LEGACY,
    MODULE,
    PT2,
    SAVED_MODEL,
    Family,
    TorchModel,
    keras_door,
    torch_door,
)

HIDDEN, LAYERS, HEADS, INNER = 64, 2, 4, 128
WAVES = {
    "vocab_size": 32,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "conv_dim": (32, 32, 32),
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 3),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
SERIES = {0: "batch", 1: "length"}


def first_output(
    config: str,
    head: str,
    name: str,
    shape: tuple[int, ...],
    axes: dict[int, str],
    /,
    **options: Any,
) -> TorchModel:
    """A model of transformers that has one input, and its first output."""
    import torch
    import transformers

    model = getattr(transformers, head)(getattr(transformers, config)(**options))

    class First(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Any) -> Any:
            found = self.model(**{name: x}, return_dict=True)
            return next(value for value in found.values() if isinstance(value, torch.Tensor))

    return TorchModel(First(), (torch.randn(*shape),), [name], {name: axes} if axes else {})


def waves(config: str, head: str, **options: Any) -> TorchModel:
    """A model of waveforms of any length."""
    model = first_output(config, head, "input_values", (2, 1200), SERIES, **{**WAVES, **options})
    model.sizes = {"length": 900, "input_values_dim_1": 900, "s77": 900}
    return model


WHISPER = {
    "num_mel_bins": 16,
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "max_source_positions": 50,
}


def whisper_encoder() -> TorchModel:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    return _hidden(WhisperEncoder(WhisperConfig(**WHISPER)), "input_features", (2, 16, 100))


def whisper() -> TorchModel:
    """Features of sound and what was said so far."""
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        **WHISPER,
        vocab_size=100,
        decoder_layers=LAYERS,
        decoder_attention_heads=HEADS,
        decoder_ffn_dim=INNER,
        max_target_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = WhisperForConditionalGeneration(config)

    class Speech(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_features: Any, decoder_input_ids: Any) -> Any:
            return self.model(
                input_features, decoder_input_ids=decoder_input_ids, use_cache=False
            ).logits

    inputs = (torch.randn(2, 16, 100), torch.ones(2, 5, dtype=torch.int64))
    axes = {"input_features": {0: "batch"}, "decoder_input_ids": {0: "batch", 1: "said"}}
    return TorchModel(Speech(), inputs, list(axes), axes)


def spectrogram_transformer() -> TorchModel:
    return first_output(
        "ASTConfig", "ASTForAudioClassification", "input_values", (2, 64, 32), {0: "batch"},
        hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=INNER, max_length=64, num_mel_bins=32,
    )  # fmt: skip


def hifi_gan() -> TorchModel:
    """A vocoder: transposed convolutions from a spectrogram to a waveform."""
    import torch
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    config = SpeechT5HifiGanConfig(
        model_in_dim=16, upsample_initial_channel=32, upsample_rates=[4, 4],
        upsample_kernel_sizes=[8, 8], resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3]],
    )  # fmt: skip
    axes = {"spectrogram": {0: "batch", 1: "frames"}}
    return TorchModel(SpeechT5HifiGan(config), (torch.randn(2, 20, 16),), ["spectrogram"], axes)


def patch_series(config: str, head: str, **options: Any) -> TorchModel:
    return first_output(
        config, head, "past_values", (2, 64, 3), {0: "batch"},
        num_input_channels=3, context_length=64, prediction_length=8, patch_length=8,
        patch_stride=8, d_model=32, num_hidden_layers=2, num_layers=2, num_attention_heads=2,
        ffn_dim=64, **options,
    )  # fmt: skip


def _hidden(model: Any, name: str, shape: tuple[int, ...]) -> TorchModel:
    import torch

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Any) -> Any:
            return self.model(x).last_hidden_state

    return TorchModel(Hidden(), (torch.randn(*shape),), [name], {name: {0: "batch"}})


def recurrent(kind: str, bidirectional: bool, layers: int = 1) -> TorchModel:
    """A tagger: embeddings, recurrence, scores per word."""
    import torch
    from torch import nn

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embeddings = nn.Embedding(100, 32)
            self.recurrence = getattr(nn, kind)(
                32, 48, layers, batch_first=True, bidirectional=bidirectional
            )
            self.scores = nn.Linear(96 if bidirectional else 48, 5)

        def forward(self, input_ids: Any) -> Any:
            return self.scores(self.recurrence(self.embeddings(input_ids))[0])

    axes = {"input_ids": SERIES}
    return TorchModel(Tagger(), (torch.ones(2, 9, dtype=torch.int64),), ["input_ids"], axes)


def streaming() -> TorchModel:
    """One step of an LSTM that gets its state and returns it, as voice activity detectors do."""
    import torch
    from torch import nn

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv1d(1, 32, 8, 4)
            self.lstm = nn.LSTM(32, 32, batch_first=True)
            self.score = nn.Linear(32, 1)

        def forward(self, wave: Any, hidden: Any, cell: Any) -> Any:
            x = torch.relu(self.convolution(wave[:, None])).transpose(1, 2)
            y, (hidden, cell) = self.lstm(x, (hidden, cell))
            return self.score(y).sigmoid().mean(1), hidden, cell

    inputs = (torch.randn(2, 64), torch.zeros(1, 2, 32), torch.zeros(1, 2, 32))
    axes = {"wave": {0: "batch"}, "hidden": {1: "batch"}, "cell": {1: "batch"}}
    return TorchModel(Step(), inputs, list(axes), axes)


def read_aloud() -> TorchModel:
    """DeepSpeech's way: convolutions over a spectrogram, GRUs in both directions, letters."""
    import torch
    from torch import nn

    class Speech(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(1, 8, (5, 5), (2, 2), (2, 2))
            self.norm = nn.BatchNorm2d(8)
            self.recurrence = nn.GRU(8 * 16, 32, 2, batch_first=True, bidirectional=True)
            self.letters = nn.Linear(64, 29)

        def forward(self, spectrogram: Any) -> Any:
            x = torch.clamp(self.norm(self.convolution(spectrogram[:, None])), 0, 20)
            x = self.recurrence(x.permute(0, 3, 1, 2).flatten(2))[0]
            return self.letters(x).log_softmax(2)

    axes = {"spectrogram": {0: "batch", 2: "length"}}
    return TorchModel(Speech(), (torch.randn(2, 32, 40),), ["spectrogram"], axes)


def reading_text() -> TorchModel:
    """CRNN: a convolutional network over a line of text, and LSTMs over its columns."""
    import torch
    from torch import nn

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(
                nn.Conv2d(1, 16, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2),
                nn.Conv2d(16, 32, 3, 1, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d((2, 1)),
                nn.Conv2d(32, 32, (8, 1)), nn.ReLU(),
            )  # fmt: skip
            self.recurrence = nn.LSTM(32, 32, bidirectional=True, batch_first=True)
            self.letters = nn.Linear(64, 37)

        def forward(self, line: Any) -> Any:
            x = self.features(line).squeeze(2).transpose(1, 2)
            return self.letters(self.recurrence(x)[0])

    axes = {"line": {0: "batch"}}
    return TorchModel(Reader(), (torch.randn(2, 1, 32, 64),), ["line"], axes)


def temporal_convolution(width: int = 32, levels: int = 4, length: int = 40) -> TorchModel:
    """TCN: causal convolutions whose dilation doubles."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, dilation: int) -> None:
            super().__init__()
            self.padding = 2 * dilation
            self.first = nn.Conv1d(width, width, 3, dilation=dilation)
            self.second = nn.Conv1d(width, width, 1)

        def forward(self, x: Any) -> Any:
            y = nn.functional.pad(x, (self.padding, 0))
            return x + self.second(torch.relu(self.first(y)))

    blocks = [Block(2**i) for i in range(levels)]
    layers = [nn.Conv1d(4, width, 1), *blocks, nn.Conv1d(width, 3, 1)]
    axes = {"series": {0: "batch", 2: "length"}}
    return TorchModel(nn.Sequential(*layers), (torch.randn(2, 4, length),), ["series"], axes)


def separation() -> TorchModel:
    """Conv-TasNet's way: an encoder, masks per speaker, a decoder back to waves."""
    import torch
    from torch import nn

    class Separation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Conv1d(1, 64, 16, 8, bias=False)
            self.norm = nn.GroupNorm(1, 64)
            blocks = []
            for i in range(3):
                blocks += [nn.Conv1d(64, 64, 1), nn.PReLU(), nn.GroupNorm(1, 64)]
                blocks += [nn.Conv1d(64, 64, 3, padding=2**i, dilation=2**i, groups=64)]
            self.blocks = nn.Sequential(*blocks)
            self.masks = nn.Conv1d(64, 128, 1)
            self.decoder = nn.ConvTranspose1d(64, 1, 16, 8, bias=False)

        def forward(self, wave: Any) -> Any:
            coded = self.encoder(wave)
            masks = self.masks(self.blocks(self.norm(coded))).sigmoid()
            parts = [self.decoder(coded * mask) for mask in masks.chunk(2, 1)]
            return torch.cat(parts, 1)

    return TorchModel(Separation(), (torch.randn(2, 1, 400),), ["wave"], {"wave": {0: "batch"}})


def translation_by_attention() -> TorchModel:
    """Bahdanau's way: a GRU reads, another one writes, attention between them."""
    import torch
    from torch import nn

    class Translation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.said = nn.Embedding(100, 32), nn.Embedding(100, 32)
            self.encoder = nn.GRU(32, 32, batch_first=True, bidirectional=True)
            self.decoder = nn.GRU(32, 64, batch_first=True)
            self.scores = nn.Linear(128, 100)

        def forward(self, input_ids: Any, decoder_input_ids: Any) -> Any:
            keys, state = self.encoder(self.read(input_ids))
            state = torch.cat([state[0], state[1]], 1)[None]
            queries = self.decoder(self.said(decoder_input_ids), state)[0]
            weights = (queries @ keys.transpose(1, 2)).softmax(2)
            return self.scores(torch.cat([queries, weights @ keys], 2))

    ones = torch.ones(2, 7, dtype=torch.int64)
    axes = {"input_ids": SERIES, "decoder_input_ids": {0: "batch", 1: "said"}}
    return TorchModel(Translation(), (ones, ones[:, :4].clone()), list(axes), axes)


def conformer() -> TorchModel:
    return waves("Wav2Vec2ConformerConfig", "Wav2Vec2ConformerModel", conv_depthwise_kernel_size=7)


def keras_recurrent(layer: str, bidirectional: bool) -> Any:
    import keras
    from keras import layers

    x = inputs = keras.Input((20,), dtype="int32", name="words")
    x = layers.Embedding(100, 32)(x)
    recurrence = getattr(layers, layer)(32, return_sequences=True)
    x = layers.Bidirectional(recurrence)(x) if bidirectional else recurrence(x)
    return keras.Model(inputs, layers.Dense(5, "softmax", name="tags")(x))


def keras_series() -> Any:
    """Convolutions over a series, in Keras."""
    import keras
    from keras import layers

    x = inputs = keras.Input((64, 4), name="series")
    for rate in (1, 2, 4):
        x = layers.Conv1D(32, 3, padding="causal", dilation_rate=rate, activation="relu")(x)
    x = layers.SeparableConv1D(32, 3, padding="same", activation="swish")(x)
    x = layers.GlobalMaxPooling1D()(x)
    return keras.Model(inputs, layers.Dense(3)(x))


FAMILIES: list[Family] = [
    *(
        Family(name, kind, door, torch_door(door, make))
        for name, kind, door, make in (
            ("wav2vec2", "audio", LEGACY, partial(waves, "Wav2Vec2Config", "Wav2Vec2ForCTC")),
            ("hubert", "audio", DYNAMO, partial(waves, "HubertConfig", "HubertModel")),
            ("wavlm", "audio", LEGACY, partial(waves, "WavLMConfig", "WavLMModel")),
            ("unispeech", "audio", MODULE, partial(waves, "UniSpeechConfig", "UniSpeechModel")),
            ("wav2vec2-conformer", "audio", LEGACY, conformer),
            ("whisper-encoder", "audio", DYNAMO, whisper_encoder),
            ("whisper", "audio", DYNAMO, whisper),
            ("spectrogram-transformer", "audio", MODULE, spectrogram_transformer),
            ("hifi-gan", "audio", DYNAMO, hifi_gan),
            ("conv-tasnet", "audio", PT2, separation),
            ("deep-speech", "audio", LEGACY, read_aloud),
            ("voice-activity", "recurrent", LEGACY, streaming),
            ("crnn", "recurrent", DYNAMO, reading_text),
            ("lstm", "recurrent", LEGACY, partial(recurrent, "LSTM", False)),
            ("lstm-both-ways", "recurrent", DYNAMO, partial(recurrent, "LSTM", True, 2)),
            ("gru", "recurrent", DYNAMO, partial(recurrent, "GRU", False)),
            ("gru-both-ways", "recurrent", LEGACY, partial(recurrent, "GRU", True, 2)),
            ("rnn", "recurrent", LEGACY, partial(recurrent, "RNN", False)),
            ("attention-rnn", "recurrent", LEGACY, translation_by_attention),
            ("tcn", "series", DYNAMO, temporal_convolution),
            ("patch-tst", "series", MODULE,
             partial(patch_series, "PatchTSTConfig", "PatchTSTForPrediction", loss="mse")),
            ("patch-ts-mixer", "series", DYNAMO,
             partial(patch_series, "PatchTSMixerConfig", "PatchTSMixerForPrediction", loss="mse")),
        )
    ),
    Family("keras-lstm", "recurrent", KERAS,
           keras_door(KERAS, partial(keras_recurrent, "LSTM", True))),
    Family("keras-gru", "recurrent", SAVED_MODEL,
           keras_door(SAVED_MODEL, partial(keras_recurrent, "GRU", False))),
    Family("keras-tcn", "series", KERAS, keras_door(KERAS, keras_series)),
]  # fmt: skip
