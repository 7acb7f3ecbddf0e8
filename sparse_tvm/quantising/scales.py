"""Static scales: activations rounded by one scale for all tokens, found on calibration data.

ONNX Runtime's calibrators find the range of each layer's input; the model is then written with
``QuantizeLinear`` and ``DequantizeLinear`` in front of its layers, as any quantised model is, and
compiled like one. Images that convolutions read are rounded for all their readers, and so are those
whose sum is such an image, so that they lie in memory as bytes alone.
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

from sparse_tvm.errors import InputError, OptionError
from sparse_tvm.frontends.onnx.detach import as_array, stored_tensors
from sparse_tvm.frontends.onnx.weights import canonical, replace_data, stored
from sparse_tvm.frontends.onnx.write import weight_bytes, write_onnx
from sparse_tvm.frontends.source import Source
from sparse_tvm.quantising.sites import LAYERS, Site, image_tensors
from sparse_tvm.reference import ReferenceModel
from sparse_tvm.sparsity.quantise import quantise_rows

_LARGEST_INLINE = 1 << 30
"""Bytes of weights beyond which the calibrator is to keep them in a file of their own."""


@dataclass(frozen=True)
class Scale:
    """How far a step goes, and which of 0 to 255 stands for 0."""

    step: float
    zero: int


METHODS = ("minmax", "entropy", "percentile")
"""ONNX Runtime's ways to find a tensor's range: all of it; what loses least of its distribution;
all but a hundred-thousandth of its values."""

_CALIBRATED = (*LAYERS, "Add")
"""Operators whose operands and results have their ranges found."""


def check_method(method: str) -> None:
    """Refuse a calibration method that there is not.

    Raises
    ------
    OptionError
        With those there are.
    """
    if method not in METHODS:
        raise OptionError(
            f"unknown calibration method {method!r}", hint=f"one of {', '.join(METHODS)}"
        )


def static_scales(
    model: onnx.ModelProto,
    tensors: Collection[str],
    feeds: Sequence[Mapping[str, np.ndarray]],
    method: str = METHODS[0],
) -> dict[str, Scale]:
    """Find the scale of each tensor, by its range on some data.

    Raises
    ------
    InputError
        When a tensor becomes infinite or NaN on it, or is never anything but 0.
    """
    from onnxruntime.quantization.quant_utils import compute_scale_zp

    scales = {}
    for name, (low, high) in _ranges(model, tensors, feeds, method).items():
        if not np.isfinite([low, high]).all():
            raise InputError(
                f"the calibration data takes {name} from {low} to {high}",
                hint="leave out the samples on which the model overflows",
            )
        ends = (np.array(end, np.uint8) for end in (0, 255))
        zero, step = compute_scale_zp(np.float32(low), np.float32(high), *ends)
        if max(high, -low) < np.finfo(np.float32).tiny * 255:
            raise InputError(
                f"{name} is 0 on all of the calibration data, and no scale follows from that",
                hint="give samples that reach it, or keep its layers in float32 with "
                "--layer 'REGEX=@fp32'",
            )
        scales[name] = Scale(float(step), int(zero))
    return scales


def _ranges(
    model: onnx.ModelProto,
    tensors: Collection[str],
    feeds: Sequence[Mapping[str, np.ndarray]],
    method: str,
) -> dict[str, tuple[float, float]]:
    """The smallest and the largest value of each tensor, perhaps without the rarest."""
    from onnxruntime.quantization import CalibrationMethod, create_calibrator

    ways = (CalibrationMethod.MinMax, CalibrationMethod.Entropy, CalibrationMethod.Percentile)
    external = weight_bytes(model) > _LARGEST_INLINE
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.onnx"
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        write_onnx(copy, path, external=external)
        calibrator = create_calibrator(
            path,
            op_types_to_calibrate=_CALIBRATED,
            augmented_model_path=str(Path(directory) / "augmented.onnx"),
            calibrate_method=ways[METHODS.index(method)],
            use_external_data_format=external,
        )
        for feed in feeds:  # each by itself: methods with histograms keep all that they are given
            calibrator.collect_data(_Reader([feed]))
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
    images = image_tensors(model, sites)
    places = {site.output: site.x for site in sites}
    given = list(graph.node)
    del graph.node[:]
    made: dict[str, str] = {}
    for node in given:
        place = places.get(next(iter(node.output), ""))
        exact = place is None and node.op_type in LAYERS  # a layer that is to be more precise
        for i, name in enumerate(node.input):
            if i != place and (exact or name not in images):
                continue
            if name not in made:
                made[name] = f"{name}.rounded"
                graph.node.extend(_rounding(graph, name, scales[name], made[name]))
            node.input[i] = made[name]
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
