"""Build small ONNX models, and run them as imported and in ONNX Runtime."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import tvm
from onnx import TensorProto, numpy_helper, parser
from tvm import relax

from sparse_tvm.frontends.importer.model import import_onnx
from sparse_tvm.frontends.onnx.read import NEWEST_OPSET

ORT_NEWEST_OPSET = 26
HALVES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
FAST_TO_COMPILE = tvm.target.Target({"kind": "llvm", "opt-level": 0})


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def build(graph: str, *, opset: int = 17, imports: str = "", **tensors):
    """Parse a graph in ONNX's text format and add initializers."""
    if opset > NEWEST_OPSET:
        pytest.skip(f"onnx {onnx.__version__} does not know opset {opset}")
    ir = 10 if opset > 18 else 8 if opset > 14 else 6
    model = parser.parse_model(
        f'<ir_version: {ir}, opset_import: ["" : {opset}{imports}]> g {graph}'
    )
    for name, array in tensors.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return model


def executor(imported):
    """Compile the imported program as TVM does by default."""
    machine = relax.VirtualMachine(tvm.compile(imported.module, FAST_TO_COMPILE), tvm.cpu())

    def run(feeds):
        inputs = [feeds[spec.name] for spec in imported.inputs]
        result = machine["main"](*map(tvm.runtime.tensor, [*inputs, *imported.weights.values()]))
        return [t.numpy() for t in ([result] if isinstance(result, tvm.runtime.Tensor) else result)]

    return run


def random_feeds(specs, sizes):
    generator = np.random.default_rng(0)
    feeds = {}
    for spec in specs:
        shape = [sizes.get(dim, dim) for dim in spec.shape]
        if spec.dtype == "float32":
            feeds[spec.name] = generator.standard_normal(shape).astype(np.float32)
        else:
            feeds[spec.name] = generator.integers(0, 2, shape).astype(spec.dtype)
    return feeds


def assert_same_as_onnxruntime(model, shapes=None, sizes=({},)):
    """Import a model, and compare its outputs for each assignment of symbolic dimensions."""
    imported = import_onnx(model, shapes)
    if model.opset_import[0].version > ORT_NEWEST_OPSET:
        model = onnx.version_converter.convert_version(model, ORT_NEWEST_OPSET)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    assert [spec.name for spec in imported.inputs] == [i.name for i in session.get_inputs()]
    assert [spec.name for spec in imported.outputs] == [o.name for o in session.get_outputs()]
    run = executor(imported)
    for assignment in sizes:
        feeds = random_feeds(imported.inputs, assignment)
        for spec, value, expected in zip(
            imported.outputs, run(feeds), session.run(None, feeds), strict=True
        ):
            shape = tuple(eval(str(dim), {}, dict(assignment)) for dim in spec.shape)
            assert (spec.dtype, shape) == (expected.dtype.name, expected.shape)
            np.testing.assert_allclose(value, expected, rtol=1e-4, atol=2e-6)
    return imported


def calls(imported) -> list[str]:
    """List the operators of the program in order."""
    names = []
    for block in imported.module["main"].body.blocks:
        for binding in block.bindings:
            if isinstance(binding.value, relax.Call):
                names.append(binding.value.op.name.removeprefix("relax."))
    return names


def narrowed(model, name):
    """A float32 model with everything in 16 bits."""
    dtype = HALVES[name]
    type_ = onnx.helper.np_dtype_to_tensor_dtype(dtype)

    def narrow(tensor):
        if tensor.data_type == TensorProto.FLOAT:
            values = np.clip(numpy_helper.to_array(tensor), -6e4, 6e4).astype(dtype)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    half = onnx.ModelProto()
    half.CopyFrom(model)
    for tensor in half.graph.initializer:
        narrow(tensor)
    for node in half.graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = type_
            if attribute.name == "value":
                narrow(attribute.t)
    for value in (*half.graph.input, *half.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = type_
    del half.graph.value_info[:]
    onnx.checker.check_model(half)
    return half
