"""The operators between Relax and kernels: what a call computes, and nothing about how.

Graph passes make them of patterns, a backend chooses how their weights are stored, gives their
operands its own layout and turns each into a kernel. An operator is a frozen dataclass: two that
are equal compute the same. :mod:`sparse_tvm.passes.dialect` writes them into a module and reads
them back; :func:`to_json` and :func:`from_json` are the codec. Nothing here imports TVM.

A backend or an extension adds an operator by deriving from :class:`Operator`.
"""

from __future__ import annotations

from sparse_tvm.operators.base import (
    FLOAT32,
    PRECISION_NAMES,
    PRECISIONS,
    STORED,
    Activation,
    Bias,
    Clamp,
    Epilogue,
    Gate,
    Layout,
    Operator,
    Residual,
    Step,
    Types,
    WeightedOperator,
    forms_of,
)
from sparse_tvm.operators.codec import (
    all_operators,
    from_json,
    operator_called,
    to_json,
)
from sparse_tvm.operators.images import (
    QUANTISED,
    STILL,
    AddImages,
    Convolution,
    DequantiseImage,
    Frames,
    PadFrames,
    PixelShuffle,
    QuantisedConvolution,
    QuantiseImage,
)
from sparse_tvm.operators.selection import (
    HoldSize,
    LargestElements,
    SelectNonzero,
    SuppressBoxes,
    UniqueRows,
)
from sparse_tvm.operators.tokens import (
    Attention,
    Dense,
    LayerNorm,
    Product,
    Recurrent,
    StepRound,
)

__all__ = [
    "FLOAT32",
    "PRECISIONS",
    "PRECISION_NAMES",
    "QUANTISED",
    "STILL",
    "STORED",
    "Activation",
    "AddImages",
    "Attention",
    "Bias",
    "Clamp",
    "Convolution",
    "Dense",
    "DequantiseImage",
    "Epilogue",
    "Frames",
    "Gate",
    "HoldSize",
    "LargestElements",
    "LayerNorm",
    "Layout",
    "Operator",
    "PadFrames",
    "PixelShuffle",
    "Product",
    "QuantiseImage",
    "QuantisedConvolution",
    "Recurrent",
    "Residual",
    "SelectNonzero",
    "Step",
    "StepRound",
    "SuppressBoxes",
    "Types",
    "UniqueRows",
    "WeightedOperator",
    "all_operators",
    "forms_of",
    "from_json",
    "operator_called",
    "to_json",
]
