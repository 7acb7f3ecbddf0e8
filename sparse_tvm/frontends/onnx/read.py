"""Read an ONNX file and refuse, in one clear line, what cannot be compiled."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
from google.protobuf.message import DecodeError
from onnx import TensorProto

from sparse_tvm.errors import ModelError
from sparse_tvm.frontends.guard import check_graph
from sparse_tvm.frontends.onnx.detach import (
    MIN_WEIGHT_SIZE,
    as_array,
    attach_weights,
    detach_weights,
    size_of,
    stored_tensors,
)
from sparse_tvm.frontends.onnx.external_data import load_external_data
from sparse_tvm.frontends.onnx.fold_recurrent import fold_recurrent
from sparse_tvm.frontends.onnx.in_memory import find_array
from sparse_tvm.frontends.onnx.quantised import CONTRIB_DOMAIN, spell_quantised
from sparse_tvm.frontends.onnx.weights import find_weights
from sparse_tvm.frontends.onnx.widen import widen

_SCAN_AS_TODAY = 9
OLDEST_OPSET = 6
NEWEST_OPSET = onnx.defs.onnx_opset_version()

_PACKED_TYPES = {
    value
    for name, value in TensorProto.DataType.items()
    if name in ("INT2", "UINT2", "INT4", "UINT4", "FLOAT4E2M1")
}
"""Several elements to a byte, which TVM's constants cannot hold."""

_WEIGHT_OPS = {
    "BatchNormalization",
    "Conv",
    "ConvTranspose",
    "Gather",
    "Gemm",
    "LayerNormalization",
    "MatMul",
}


def read_onnx(
    model: str | os.PathLike[str] | onnx.ModelProto, *, mapped: bool = False
) -> onnx.ModelProto:
    """Read and check a model: opset 6 or newer, all weights there and finite.

    Parameters
    ----------
    model : path or onnx.ModelProto
        A ``.onnx`` file, with its external data files beside it, or a model in memory.
    mapped : bool
        Leave weights in external data files where they are, for `as_array` to map.

    Returns
    -------
    onnx.ModelProto
        The model with its weights, with local functions inlined, in float32 where it was of
        16-bit floats, in one spelling where it is quantised, and with recurrent weights stored
        where it made them of its parameters. A model given in memory is never
        changed; it is returned as it is where nothing had to be.

    Raises
    ------
    ModelError
        When the model cannot be read or compiled; the message is one line and names the file.
    """
    where = describe(model)
    if isinstance(model, onnx.ModelProto):
        check_graph(model, where)
        _check_versions(model, where)
        _check_data_is_present(model, where)
    else:
        path = Path(model)
        model = parse_onnx(path)
        _check_versions(model, where)
        load_external_data(model, path, mapped=mapped)
    model = _inline_functions(model, where)
    model = widen(model, where)
    _check_types(model, where)
    _check_structure(model, where)
    model = fold_recurrent(spell_quantised(model, where), where)
    _check_values(model, where)
    return model


def describe(model: str | os.PathLike[str] | onnx.ModelProto) -> str:
    """Return the name that error messages give a model: its path, or its graph's name."""
    if isinstance(model, onnx.ModelProto):
        return model.graph.name or "the model"
    return str(Path(model))


def parse_onnx(path: Path) -> onnx.ModelProto:
    """Read a file's protobuf, without its external data.

    Raises
    ------
    ModelError
        When it is no ONNX file, or `check_graph` refuses it.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ModelError(
            f"{path}: is a directory, not an ONNX file", hint="give the .onnx file itself"
        ) from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    if not data:
        raise ModelError(f"{path}: the file is empty")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        # The first field of every ONNX file is ir_version: tag 0x08.
        state = "truncated or damaged" if data[0] == 0x08 else "not an ONNX file"
        raise ModelError(f"{path}: {state}") from None
    check_graph(model, str(path))
    return model


def _check_versions(model: onnx.ModelProto, where: str) -> None:
    """Refuse models without a graph and versions or domains that cannot be known here."""
    if not model.graph.node:
        raise ModelError(f"{where}: holds no graph", hint="the file is truncated or not a model")
    versions = {entry.domain: entry.version for entry in model.opset_import}
    opset = versions.get("", versions.get("ai.onnx"))
    if opset is None:
        raise ModelError(f"{where}: names no operator set version (opset)")
    supported = f"opsets {OLDEST_OPSET} to {NEWEST_OPSET} are supported"
    if opset < OLDEST_OPSET:
        raise ModelError(
            f"{where}: opset {opset} is too old: {supported}",
            hint="export it again, or convert it with onnx.version_converter",
        )
    if opset < _SCAN_AS_TODAY and any(node.op_type == "Scan" for node in model.graph.node):
        raise ModelError(
            f"{where}: Scan of opset {opset} has a batch, unlike all after it",
            hint="export it again with a newer opset",
        )
    if opset > NEWEST_OPSET:
        raise ModelError(
            f"{where}: opset {opset} is unknown: {supported} by onnx {onnx.__version__}",
            hint="upgrade the onnx package or export to an older opset",
        )
    if model.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"{where}: IR version {model.ir_version} is unknown: onnx {onnx.__version__} "
            f"supports up to {onnx.IR_VERSION}",
            hint="upgrade the onnx package",
        )
    _check_domains(model, where)


def _check_domains(model: onnx.ModelProto, where: str) -> None:
    known = {schema.domain for schema in onnx.defs.get_all_schemas()}
    local = {function.domain for function in model.functions}
    foreign = sorted(
        {n.domain for n in model.graph.node} - known - local - {"ai.onnx", CONTRIB_DOMAIN}
    )
    if foreign:
        nodes = [
            f"{n.name or n.output[0]} ({n.domain}.{n.op_type})"
            for n in model.graph.node
            if n.domain in foreign
        ]
        raise ModelError(
            f"{where}: unknown operator domain {', '.join(foreign)}, used by {first_few(nodes)}",
            hint=f"onnx {onnx.__version__} knows ai.onnx {OLDEST_OPSET} to {NEWEST_OPSET}",
        )


def _check_data_is_present(model: onnx.ModelProto, where: str) -> None:
    for name, tensor in stored_tensors(model.graph):
        if tensor.data_location == TensorProto.EXTERNAL and find_array(tensor) is None:
            raise ModelError(
                f"{where}: the data of initializer {name} is in another file and not loaded",
                hint="give the model's path, or load it with onnx.load",
            )


def _inline_functions(model: onnx.ModelProto, where: str) -> onnx.ModelProto:
    """Replace calls of the model's own functions by their bodies."""
    if not model.functions:
        return model
    skeleton, weights = detach_weights(model)
    try:
        inlined = onnx.inliner.inline_local_functions(skeleton)
    except Exception as error:  # of ONNX's C++ code, without a base of their own
        raise ModelError(f"{where}: its functions cannot be inlined: {one_line(error)}") from error
    return attach_weights(inlined, weights)


def _check_types(model: onnx.ModelProto, where: str) -> None:
    """Refuse weights in double precision or of less than a byte."""
    others = [
        f"{name} ({TensorProto.DataType.Name(t.data_type).lower()})"
        for name, t in stored_tensors(model.graph)
        if t.data_type in _PACKED_TYPES or (t.data_type == TensorProto.DOUBLE and len(t.dims) > 1)
    ]
    if others:
        raise ModelError(
            f"{where}: weights are float32 or of 16 bits, but not {len(others)} of them: "
            f"{first_few(others)}",
            hint="export the model in float32",
        )


def _check_structure(model: onnx.ModelProto, where: str) -> None:
    """Run ONNX's own checker on all but the weights."""
    if model.graph.sparse_initializer:
        name = model.graph.sparse_initializer[0].values.name
        raise ModelError(
            f"{where}: sparse initializers are not supported: {name}",
            hint="store the weights dense; zeros are found here",
        )
    large = {name for name, t in stored_tensors(model.graph) if size_of(t) >= MIN_WEIGHT_SIZE}
    skeleton, _ = detach_weights(model, large)
    try:
        onnx.checker.check_model(skeleton)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"{where}: invalid ONNX model: {one_line(error)}") from error


def _check_values(model: onnx.ModelProto, where: str) -> None:
    """Refuse NaN everywhere and infinities in weights (masks may hold them)."""
    refs = find_weights(model)
    weight_names = {name for n in model.graph.node if n.op_type in _WEIGHT_OPS for name in n.input}
    weight_names |= {ref.initializer for ref in refs}
    bad = []
    for name, tensor in stored_tensors(model.graph):
        try:
            array = as_array(tensor)
        except (KeyError, TypeError, ValueError) as error:
            if tensor.data_type != TensorProto.FLOAT:
                raise ModelError(
                    f"{where}: initializer {name} cannot be read: {one_line(error)}"
                ) from error
            stored = len(tensor.raw_data) // 4 or len(tensor.float_data)
            raise ModelError(
                f"{where}: initializer {name} holds {stored} values, "
                f"but its shape {list(tensor.dims)} needs {size_of(tensor)}"
            ) from None
        if tensor.data_type != TensorProto.FLOAT:
            continue
        nans, infinities = _count_non_finite(array)
        if nans or (infinities and name in weight_names):
            bad.append((name, nans, infinities, size_of(tensor)))
    if bad:
        layers = {ref.initializer: ref.layer for ref in refs}
        found = [
            f"{layers.get(name, name)} (initializer {name}: {nans} NaN, {infinities} Inf "
            f"of {size} values)"
            for name, nans, infinities, size in bad
        ]
        raise ModelError(f"{where}: NaN or Inf in weights of {first_few(found)}")


def _count_non_finite(values: np.ndarray) -> tuple[int, int]:
    """Count NaN and infinite values; a sum is finite only when all its terms are."""
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(values.sum()):
            return 0, 0
    return int(np.isnan(values).sum()), int(np.isinf(values).sum())


def first_few(items: Iterable[str], limit: int = 5) -> str:
    """Join the first items by commas and say how many more there are."""
    listed = list(items)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def one_line(error: BaseException, limit: int = 300) -> str:
    """Condense an error's text to one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
