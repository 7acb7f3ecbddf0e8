"""Models of a newer operator set than an engine takes, written in an older one."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import onnx
import onnx.version_converter

from sparse_tvm.errors import ModelError
from sparse_tvm.frontends.onnx.detach import attach_weights, detach_weights
from sparse_tvm.frontends.onnx.read import one_line, read_onnx
from sparse_tvm.frontends.onnx.rewrite import expand
from sparse_tvm.frontends.onnx.write import write_onnx


def write_at_opset(
    model: str | bytes, opset: int | None, output: Path, expanded: Collection[str] = ()
) -> None:
    """Write a model as an older opset spells it, with operators that are new since expanded.

    Parameters
    ----------
    model : path | bytes
        An ONNX file of any size, or a serialized model.
    opset : int | None
        The opset to write; the model's own by default.
    output : Path
        The file; weights go beside it where there are more than 2 GiB of them.
    expanded : Collection[str]
        Operators to replace by their definitions in any case.

    Raises
    ------
    ModelError
        When the model cannot be read or spelled so.
    """
    source = onnx.ModelProto.FromString(model) if isinstance(model, bytes) else model
    skeleton, weights = detach_weights(read_onnx(source, mapped=True))
    own = next(e.version for e in skeleton.opset_import if e.domain in ("", "ai.onnx"))
    opset = own if opset is None else min(own, opset)
    try:
        skeleton = _expand_new(onnx.shape_inference.infer_shapes(skeleton), opset)
        skeleton = expand(skeleton, expanded)
        skeleton = onnx.version_converter.convert_version(skeleton, opset)
    except Exception as error:
        raise ModelError(
            f"the model cannot be converted to opset {opset}: {one_line(error)}"
        ) from (error)
    skeleton.ir_version = onnx.helper.find_min_ir_version_for(list(skeleton.opset_import), True)
    write_onnx(attach_weights(skeleton, weights), output)


def _expand_new(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Expand operators that `opset` lacks, and what that brings in, which may be as new."""
    given = _defined(model)
    expanded = expand(model, {op for op in given if not onnx.defs.has(op, opset)})
    return expand(expanded, _defined(expanded) - given)


def _defined(model: onnx.ModelProto) -> set[str]:
    """Return the operators in a model that the standard defines by others."""
    operators = {node.op_type for node in model.graph.node if node.domain in ("", "ai.onnx")}
    schemas: dict[str, Any] = {op: onnx.defs.get_schema(op) for op in operators}
    return {op for op, s in schemas.items() if s.has_function or s.has_context_dependent_function}
