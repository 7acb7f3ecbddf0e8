"""Calibration data: arrays from an ``.npz``, sentences from a text file, or a folder of images."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from sparse_tvm.errors import InputError, OptionError
from sparse_tvm.frontends.detect import read_json
from sparse_tvm.frontends.onnx.detach import model_inputs
from sparse_tvm.frontends.onnx.read import first_few
from sparse_tvm.frontends.source import require
from sparse_tvm.npz import read_npz
from sparse_tvm.spec import TensorSpec

SAMPLES = 512
"""Sentences or images that are used where a file has more, unless told otherwise."""

_BATCH = 32
_TOKENS = 128  # per sentence
_IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, of torchvision

Batch = dict[str, np.ndarray]
Data = str | os.PathLike[str] | Mapping[str, np.ndarray]


@dataclass(frozen=True)
class _Input:
    """A graph input: what its batches must look like."""

    name: str
    dtype: np.dtype
    dims: tuple[int | None, ...]

    @classmethod
    def of(cls, spec: TensorSpec) -> _Input:
        """Of a model that was imported."""
        dims = tuple(dim if isinstance(dim, int) else None for dim in spec.shape)
        return cls(spec.name, np.dtype(spec.dtype), dims)

    def takes(self, array: np.ndarray) -> bool:
        """Whether a call takes an array of this shape."""
        return array.ndim == len(self.dims) and all(
            dim in (None, size) for size, dim in zip(array.shape, self.dims, strict=True)
        )

    @property
    def batch(self) -> int:
        """How many samples go into the model at a time."""
        return (self.dims[0] if self.dims else None) or _BATCH

    def __str__(self) -> str:
        dims = ", ".join("any" if dim is None else str(dim) for dim in self.dims)
        return f"{self.name}: {self.dtype} [{dims}]"


def read_calibration(
    data: Data,
    model: onnx.ModelProto,
    *,
    samples: int = SAMPLES,
    tokenizer: str | os.PathLike[str] | None = None,
) -> list[Batch]:
    """Return calibration data as batches of the model's inputs.

    Sentences come in batches of equal length where the model's shape leaves that open, so that
    there is no padding. Elsewhere ``attention_mask`` tells it.

    Parameters
    ----------
    data : path or mapping
        An ``.npz`` with an array per input, ``[samples, ...]``; such arrays; a text file with a
        sentence per line; or a folder of images.
    model : onnx.ModelProto
        Whose inputs they are.
    samples : int
        At most so many of them, the first ones.
    tokenizer : path | None
        The ``tokenizer.json`` for sentences.

    Raises
    ------
    InputError, OptionError
        When the data is no such thing or does not fit the model.
    """
    inputs = [_input(value) for value in model_inputs(model)]
    if isinstance(data, Mapping):
        arrays, where = dict(data), "the calibration data"
    else:
        path, where = Path(data), os.fspath(data)
        if path.is_dir():
            return _images(path, inputs, samples)
        if path.suffix == ".npz":
            arrays = read_npz(path)
        elif path.suffix == ".txt":
            return _sentences(path, inputs, samples, tokenizer)
        else:
            raise OptionError(
                f"{where} is no calibration data" if path.exists() else f"{where}: no such file",
                hint="give an .npz with an array per input, a .txt with a sentence per line, or a "
                "folder of images",
            )
    _check(arrays, inputs, where)
    return _split({name: array[:samples] for name, array in arrays.items()}, inputs)


def calls_of(
    arrays: Mapping[str, np.ndarray], specs: Sequence[TensorSpec], where: str
) -> list[Batch]:
    """Return arrays as one call's inputs where they fit, else as samples for several calls.

    Raises
    ------
    InputError
        When names, types or shapes are not those of the model's inputs, or values are no numbers.
    """
    inputs = [_Input.of(spec) for spec in specs]
    fits = all(each.takes(arrays[each.name]) for each in inputs if each.name in arrays)
    _check(arrays, inputs, where, whole=fits)
    return [dict(arrays)] if fits else _split(dict(arrays), inputs)


def padding_rows(batch: Batch) -> np.ndarray | None:
    """Return which rows of a batch's activations are padding, flattened; None where none are."""
    mask = batch.get("attention_mask")
    if mask is None or mask.ndim != 2 or mask.all():
        return None
    padding: np.ndarray = mask.ravel() == 0
    return padding


def _input(value: onnx.ValueInfoProto) -> _Input:
    kind = value.type.tensor_type
    dims = tuple(dim.dim_value or None for dim in kind.shape.dim)
    return _Input(value.name, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type), dims)


def _check(
    arrays: Mapping[str, np.ndarray], inputs: Sequence[_Input], where: str, *, whole: bool = False
) -> None:
    """Refuse arrays of other names, types, shapes or counts, and values that are no numbers.

    ``whole`` arrays are one call's, whose inputs need not agree in their first axis.
    """
    names = [each.name for each in inputs]
    wrong = [name for name in arrays if name not in names]
    missing = [name for name in names if name not in arrays]
    if wrong or missing:
        what = f"has no {first_few(missing)}" if missing else f"has {first_few(wrong)}"
        raise InputError(
            f"{where} {what}, and the model takes {', '.join(map(str, inputs))}",
            hint="name each array as the input it is for",
        )
    counts = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    for each in inputs:
        array = arrays[each.name]
        if array.dtype != each.dtype:
            raise InputError(f"{where}: {each.name} is {array.dtype}, and the model takes {each}")
        fits = array.ndim == len(each.dims) and all(
            dim is None or size == dim
            for size, dim in zip(array.shape[1:], each.dims[1:], strict=True)
        )
        if not fits:
            shape = ", ".join(map(str, array.shape))
            raise InputError(
                f"{where}: {each.name} has shape [{shape}], and the model takes {each}",
                hint="the first axis counts samples, of which there may be any number",
            )
        if bad := array.size - int(np.isfinite(array).sum()):
            raise InputError(f"{where}: {each.name} holds {bad} NaN or infinite values")
    if whole:
        return
    if len(set(counts.values())) > 1:
        raise InputError(f"{where} has different numbers of samples: {counts}")
    batch = inputs[0].batch if inputs[0].dims and inputs[0].dims[0] else 1
    if min(counts.values(), default=0) < batch:
        raise InputError(
            f"{where} has {min(counts.values(), default=0)} samples, and the model takes {batch} "
            "at a time"
        )


def _split(arrays: Batch, inputs: Sequence[_Input]) -> list[Batch]:
    """Cut arrays into batches; a model of a fixed batch size does not see what is left over."""
    size = inputs[0].batch
    count = len(next(iter(arrays.values())))
    if inputs[0].dims[0]:
        count -= count % size
    return [
        {name: array[start : min(start + size, count)] for name, array in arrays.items()}
        for start in range(0, count, size)
    ]


def _sentences(
    path: Path,
    inputs: Sequence[_Input],
    samples: int,
    tokenizer: str | os.PathLike[str] | None,
) -> list[Batch]:
    names = {each.name: each for each in inputs}
    if "input_ids" not in names or len(names["input_ids"].dims) != 2:
        raise OptionError(
            f"{path} has sentences, and the model takes {', '.join(map(str, inputs))}",
            hint="give an .npz with an array per input",
        )
    lines = _lines(path)[:samples]
    fixed = names["input_ids"].dims[1]
    encoded = _encode(lines, tokenizer, fixed or _TOKENS)
    if fixed is None:
        encoded.sort(key=lambda each: len(each["input_ids"]))
    size = names["input_ids"].batch
    batches: list[Batch] = []
    for group in _groups(encoded, size, fixed, exact=names["input_ids"].dims[0] is not None):
        arrays = {}
        for name, each in names.items():
            if name not in group[0]:
                raise OptionError(
                    f"{path} has sentences, and the model also takes {each}",
                    hint="give an .npz with an array per input",
                )
            arrays[name] = np.array([row[name] for row in group], each.dtype)
        batches.append(arrays)
    if not batches:
        raise InputError(
            f"{path} has {len(encoded)} sentences, and the model takes {size} at a time",
            hint="give a file with a sentence per line",
        )
    return batches


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason}") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise InputError(f"{path} has no sentences", hint="give a file with a sentence per line")
    return lines


def _encode(
    lines: Sequence[str], tokenizer: str | os.PathLike[str] | None, tokens: int
) -> list[dict[str, list[int]]]:
    if tokenizer is None or not Path(tokenizer).is_file():
        raise OptionError(
            f"no tokenizer at {tokenizer}" if tokenizer else "the model comes without a tokenizer",
            hint="give its tokenizer.json with --tokenizer",
        )
    library = require("tokenizers", "prune", "calibration with sentences")
    try:
        loaded = library.Tokenizer.from_file(os.fspath(tokenizer))
    except Exception as error:  # of no class of its own
        raise OptionError(f"{tokenizer} is no tokenizer.json: {error}") from error
    loaded.enable_truncation(tokens)
    loaded.no_padding()
    return [
        {
            "input_ids": each.ids,
            "attention_mask": each.attention_mask,
            "token_type_ids": each.type_ids,
        }
        for each in loaded.encode_batch(list(lines))
    ]


def _groups(
    encoded: list[dict[str, list[int]]], size: int, fixed: int | None, *, exact: bool
) -> Iterator[list[dict[str, list[int]]]]:
    """Yield rows of one length: padded to the model's, or sorted into batches of equals."""
    if fixed is not None:
        encoded = [
            {name: row + [0] * (fixed - len(row)) for name, row in each.items()} for each in encoded
        ]
    start = 0
    while start < len(encoded):
        length = len(encoded[start]["input_ids"])
        group = [each for each in encoded[start : start + size] if len(each["input_ids"]) == length]
        start += len(group)
        if not exact or len(group) == size:
            yield group


def _images(path: Path, inputs: Sequence[_Input], samples: int) -> list[Batch]:
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in _IMAGE_SUFFIXES)[:samples]
    if not files:
        raise InputError(
            f"{path} has no images",
            hint=f"images end in {', '.join(_IMAGE_SUFFIXES)}",
        )
    each = inputs[0]
    if len(inputs) != 1 or len(each.dims) != 4 or each.dims[1] not in (1, 3):
        raise OptionError(
            f"{path} has images, and the model takes {', '.join(map(str, inputs))}",
            hint="images fit models with one input [batch, 3, height, width]; give an .npz",
        )
    height, width = (dim or 224 for dim in each.dims[2:])
    arrays = [_image(file, each.dims[1] or 3, height, width) for file in files]
    stacked = {each.name: np.stack(arrays).astype(each.dtype)}
    _check(stacked, inputs, str(path))
    return _split(stacked, inputs)


def _image(file: Path, channels: int, height: int, width: int) -> np.ndarray:
    """Return an image as most classifiers take it: the shorter side scaled, and cut to the middle.

    Colours are normalised as torchvision's models want them, or as the ``image_mean`` and
    ``image_std`` of a ``preprocessor_config.json`` beside the images say.
    """
    image_library = require("PIL.Image", "prune", "calibration with images")
    image_ops = require("PIL.ImageOps", "prune", "calibration with images")
    try:
        with image_library.open(file) as image:
            fitted = image_ops.fit(image.convert("RGB" if channels == 3 else "L"), (width, height))
    except OSError as error:
        raise InputError(f"{file} is no readable image: {error}") from error
    values = np.asarray(fitted, np.float32).reshape(height, width, channels) / 255
    settings = file.parent / "preprocessor_config.json"
    config = read_json(settings) if settings.is_file() else {}
    mean = np.array(config.get("image_mean", _MEAN)[:channels], np.float32)
    deviation = np.array(config.get("image_std", _DEVIATION)[:channels], np.float32)
    normalised: np.ndarray = ((values - mean) / deviation).transpose(2, 0, 1)
    return normalised
