"""Weights that are in memory already: tensors of an ONNX model refer to them, without a copy."""

from __future__ import annotations

from uuid import uuid4
from weakref import WeakValueDictionary

import numpy as np
import onnx

_arrays: WeakValueDictionary[str, np.ndarray] = WeakValueDictionary()


class InMemoryTensors:
    """Arrays that tensors refer to, for as long as this lives."""

    def __init__(self) -> None:
        self._views: list[np.ndarray] = []

    def tensor(self, array: np.ndarray, name: str) -> onnx.TensorProto:
        """Return an ONNX tensor that refers to `array`, which must not change."""
        view = array.view()
        view.flags.writeable = False
        self._views.append(view)
        location = f"memory:{uuid4()}"  # which no file can name
        _arrays[location] = view
        element_type = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor = onnx.TensorProto(name=name, data_type=element_type, dims=array.shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
        return tensor


def find_array(tensor: onnx.TensorProto) -> np.ndarray | None:
    """Return the array that a tensor refers to, if it is in memory."""
    where = (entry.value for entry in tensor.external_data if entry.key == "location")
    return _arrays.get(next(where, ""))
