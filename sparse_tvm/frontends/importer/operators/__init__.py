"""The rules of ONNX's operators, by kind. Importing this registers them all."""

from sparse_tvm.frontends.importer.operators import (  # noqa: F401
    attention,
    creation,
    division,
    elementwise,
    indexing,
    movement,
    normalization,
    pooling,
    quantisation,
    recurrent,
    reduction,
    resize,
    selection,
    shifts,
    signals,
    slices,
    vision,
)
from sparse_tvm.frontends.importer.rules import RULES

__all__ = ["RULES"]
