"""Static scales: activations rounded by one scale for all tokens, found on calibration data.

ONNX Runtime's calibrator finds the range of each layer's input; the model is then written with
``QuantizeLinear`` and ``DequantizeLinear`` in front of its layers, as any quantised model is, and
compiled like one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sparse_tvm.errors import InputError
from sparse_tvm.frontends.onnx.detach import as_array, stored_tensors
from sparse_tvm.frontends.onnx.weights import canonical, replace_data, stored
from sparse_tvm.frontends.onnx.write import weight_bytes, write_onnx
from sparse_tvm.frontends.source import Source
from sparse_tvm.quantising.sites import Site
from sparse_tvm.reference import ReferenceModel
from sparse_tvm.sparsity.quantise import quantise_rows

_LARGEST_INLINE = 1 << 30
"""Bytes of weights beyond which the calibrator is to keep them in a file of their own."""


@dataclass(frozen=True)
class Scale:
    """How far a step goes, and which of 0 to 255 stands for 0."""

    step: float
    zero: int


def static_scales(
    model: onnx.ModelProto, tensors: Collection[str], feeds: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, Scale]:
    """Find the scale of each tensor, by its smallest and largest value on some data.

    Raises
    ------
    InputError
        When a tensor becomes infinite or NaN on it.
    """
    from onnxruntime.quantization.quant_utils import compute_scale_zp

    scales = {}
    for name, (low, high) in _ranges(model, tensors, feeds).items():
        if not np.isfinite([low, high]).all():
            raise InputError(
                f"the calibration data takes {name} from {low} to {high}",
                hint="leave out the samples on which the model overflows",
            )
        ends = (np.array(end, np.uint8) for end in (0, 255))
        zero, step = compute_scale_zp(np.float32(low), np.float32(high), *ends)
        scales[name] = Scale(float(step), int(zero))
    return scales


def _ranges(
    model: onnx.ModelProto, tensors: Collection[str], feeds: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, tuple[float, float]]:
    """The smallest and the largest value of each tensor."""
    from onnxruntime.quantization import CalibrationMethod, create_calibrator

    external = weight_bytes(model) > _LARGEST_INLINE
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.onnx"
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        write_onnx(copy, path, external=external)
        calibrator = create_calibrator(
            path,
            augmented_model_path=str(Path(directory) / "augmented.onnx"),
            calibrate_method=CalibrationMethod.MinMax,
            use_external_data_format=external,
        )
        calibrator.collect_data(_Reader(feeds))
        found = calibrator.compute_data()
        ends = {name: found[name].range_value for name in tensors}
        return {
            name: (np.asarray(low).item(), np.asarray(high).item())
            for name, (low, high) in ends.items()
        }


class _Reader:
    """Feeds as ONNX Runtime's calibrators read them."""

    def __init__(self, feeds: Sequence[Mapping[str, np.ndarray]]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Mapping[str, np.ndarray] | None:
        """The next feed, if there is one."""
        return next(self._feeds, None)


class CalibratedSource(Source):
    """A source whose layers round their inputs by static scales.

    Parameters
    ----------
    source : Source
        What was given; it stays the reference.
    model : onnx.ModelProto
        What it became.
    note : str
        What reports say of it.
    """

    def __init__(self, source: Source, model: onnx.ModelProto, note: str) -> None:
        super().__init__(source.name, source.path)
        self.kind = source.kind
        self._source, self._model, self._note = source, model, note

    def as_onnx(self) -> onnx.ModelProto:
        """See `Source.as_onnx`."""
        return self._model

    def reference(self, threads: int) -> ReferenceModel:
        """The given model's, which rounds nothing."""
        return self._source.reference(threads)

    def origins(self) -> Mapping[str, str]:
        """See `Source.origins`."""
        return self._source.origins()

    def notes(self) -> list[str]:
        """See `Source.notes`."""
        return [*self._source.notes(), self._note]

    def describe(self) -> dict[str, Any]:
        """See `Source.describe`."""
        return self._source.describe()

    def companions(self) -> list[Path]:
        """See `Source.companions`."""
        return self._source.companions()


def with_scales(
    model: onnx.ModelProto, scales: Mapping[str, Scale], sites: Sequence[Site]
) -> onnx.ModelProto:
    """Return a model whose layers multiply integers: rounded weights, and inputs by these scales.

    Parameters
    ----------
    model : onnx.ModelProto
        Left as it is; of opset 10 or newer.
    scales : Mapping[str, Scale]
        By tensor.
    sites : Sequence[Site]
        The layers' nodes. No other node may read their weights.
    """
    written = onnx.ModelProto()
    written.CopyFrom(model)
    graph = written.graph
    tensors = dict(stored_tensors(graph))
    for ref in {site.ref.initializer: site.ref for site in sites}.values():
        tensor = tensors[ref.initializer]
        values, steps = quantise_rows(canonical(ref, as_array(tensor)))
        rounded = values.astype(np.float32) * steps[:, None]
        replace_data(tensor, stored(ref, rounded, tuple(tensor.dims)))
    places = {site.output: site.x for site in sites}
    given = list(graph.node)
    del graph.node[:]
    made: dict[str, str] = {}
    for node in given:
        place = places.get(next(iter(node.output), ""))
        if place is not None:
            name = node.input[place]
            if name not in made:
                made[name] = f"{name}.rounded"
                graph.node.extend(_rounding(graph, name, scales[name], made[name]))
            node.input[place] = made[name]
        graph.node.append(node)
    return written


def _rounding(
    graph: onnx.GraphProto, name: str, scale: Scale, out: str
) -> tuple[onnx.NodeProto, onnx.NodeProto]:
    step, zero, steps = f"{name}.scale", f"{name}.zero_point", f"{name}.steps"
    graph.initializer.append(numpy_helper.from_array(np.array(scale.step, np.float32), step))
    graph.initializer.append(numpy_helper.from_array(np.array(scale.zero, np.uint8), zero))
    return (
        helper.make_node("QuantizeLinear", [name, step, zero], [steps]),
        helper.make_node("DequantizeLinear", [steps, step, zero], [out]),
    )
