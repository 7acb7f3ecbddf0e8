"""Names, element types and shapes of an ONNX model's inputs and outputs."""

from __future__ import annotations

import onnx

from sparse_tvm.errors import ModelError
from sparse_tvm.spec import TensorSpec


def demand_tensor(value: onnx.ValueInfoProto) -> None:
    """Refuse an input or output that is a sequence, an optional, a map or the like."""
    if not value.type.HasField("tensor_type"):
        raise ModelError(f"{value.name} is a {value.type.WhichOneof('value')}, not a tensor")


def tensor_spec(value: onnx.ValueInfoProto) -> TensorSpec:
    """Return an input's or output's spec; ``"?"`` is a dimension without a name.

    Raises
    ------
    ModelError
        When the value is a sequence, a map or the like.
    """
    demand_tensor(value)
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    if not tensor.HasField("shape"):
        return TensorSpec(value.name, dtype, ("...",))
    return TensorSpec(
        value.name,
        dtype,
        tuple(d.dim_value if d.dim_value > 0 else d.dim_param or "?" for d in tensor.shape.dim),
    )
