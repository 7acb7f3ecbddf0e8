"""How the inputs of each layer vary together, on the user's data."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx

from sparse_tvm.cpu import usable_cores
from sparse_tvm.errors import InputError
from sparse_tvm.frontends.onnx.weights import WeightRef
from sparse_tvm.sparsity.calibration import Batch, Data, padding_rows, read_calibration
from sparse_tvm.sparsity.layer_inputs import LayerInput, find_inputs
from sparse_tvm.sparsity.stages import StagedModel


def input_products(
    model: onnx.ModelProto,
    refs: list[WeightRef],
    data: Data,
    *,
    tokenizer: Path | None = None,
    progress: Callable[[str], None] = lambda phase: None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield layers, and the mean product of each two of their inputs in the model as it is.

    Layers whose inputs cannot be told apart (shared by several, or in groups) are left out.
    Memory holds one matrix at a time.

    Yields
    ------
    tuple[str, np.ndarray]
        A layer's name and a float32 ``[K, K]``. Where the layer has a bias, which can take up
        what mean outputs lose, inputs count from their means.

    Raises
    ------
    InputError, OptionError
        When the data do not fit the model, or give values that are not finite.
    """
    batches = read_calibration(data, model, tokenizer=tokenizer)
    inputs, _ = find_inputs(model, refs)
    features = {ref.layer: ref.shape[1] for ref in refs}
    by_tensor: dict[str, list[str]] = {}
    for layer, source in inputs.items():
        by_tensor.setdefault(source.tensor, []).append(layer)
    with tempfile.TemporaryDirectory(prefix="sparse-tvm-plan-") as directory:
        stages = StagedModel(model, batches, by_tensor, Path(directory), usable_cores())
        for tensor, layers in by_tensor.items():
            stages.advance(tensor)
            for layer in layers:
                progress(f"calibrate {layer}")
                products = _products(inputs[layer], features[layer], batches, stages)
                if not np.isfinite(products).all():
                    raise InputError(
                        f"the inputs of layer {layer} are not finite on the calibration data",
                        hint="is it the data that the model was made for?",
                    )
                yield layer, products
            stages.forget(tensor)


def _products(
    source: LayerInput, features: int, batches: Sequence[Batch], stages: StagedModel
) -> np.ndarray:
    total, products, count = np.zeros(features), np.zeros((features, features)), 0
    for batch, x in zip(batches, stages.read(source.tensor), strict=True):
        padding = padding_rows(batch)
        for rows in source.rows(x):
            if padding is not None and len(padding) == len(rows):
                rows = rows[~padding]
            rows = np.ascontiguousarray(rows, np.float32)
            total += rows.sum(axis=0, dtype=np.float64)
            products += rows.T @ rows
            count += len(rows)
    products /= max(count, 1)
    if source.bias is not None:
        mean = total / max(count, 1)
        products -= np.outer(mean, mean)
    return products.astype(np.float32)
