"""How much each input of each layer matters, on the user's data."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

from sparse_tvm.cpu import usable_cores
from sparse_tvm.errors import InputError
from sparse_tvm.frontends.onnx.weights import WeightRef
from sparse_tvm.sparsity.calibration import Data, padding_rows, read_calibration
from sparse_tvm.sparsity.layer_inputs import find_inputs
from sparse_tvm.sparsity.stages import StagedModel


def input_energies(
    model: onnx.ModelProto,
    refs: list[WeightRef],
    data: Data,
    *,
    tokenizer: Path | None = None,
    progress: Callable[[str], None] = lambda phase: None,
) -> dict[str, np.ndarray]:
    """The mean square of each input of layers, float32 ``[K]``, in the model as it is.

    Layers whose inputs cannot be told apart (shared by several, or in groups) are left out.

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
    found: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory(prefix="sparse-tvm-plan-") as directory:
        stages = StagedModel(model, batches, by_tensor, Path(directory), usable_cores())
        for tensor, layers in by_tensor.items():
            progress(f"calibrate {layers[0]}")
            stages.advance(tensor)
            for layer in layers:
                sums, count = np.zeros(features[layer]), 0
                for batch, x in zip(batches, stages.read(tensor), strict=True):
                    padding = padding_rows(batch)
                    for rows in inputs[layer].rows(x):
                        if padding is not None and len(padding) == len(rows):
                            rows = rows[~padding]
                        sums += np.square(rows, dtype=np.float64).sum(axis=0)
                        count += len(rows)
                if not np.isfinite(sums).all():
                    raise InputError(
                        f"the inputs of layer {layer} are not finite on the calibration data",
                        hint="is it the data that the model was made for?",
                    )
                found[layer] = (sums / max(count, 1)).astype(np.float32)
            stages.forget(tensor)
    return found
