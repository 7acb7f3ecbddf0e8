"""What the passes work on: a Relax program, its weights beside it, and a report per layer."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import tvm


@dataclass
class LayerReport:
    """What became of one layer, and why.

    Attributes
    ----------
    name : str
        As ``--layer`` matches it.
    op : str
        The layer's operator, such as ``dense``.
    shape : tuple[int, int]
        ``(N, K)``: output features, input features.
    sparsity, nnz, structure
        What analysis found in the weight.
    format : str
        ``dense``, ``csr`` or ``bsr``.
    block : tuple[int, int] | None
        Rows x columns of a stored block.
    kernel : str
        Kernel and parameters chosen.
    epilogue : tuple[str, ...]
        Steps fused behind the matmul.
    reason : str
        Why this format.
    bytes : int
        Size of the stored weight; 0 where another layer stores it.
    precision : str
        Element type of the weight's values.
    basis : str
        ``measured`` or ``predicted``: what the layout was chosen by, or compared with dense by.
    times : dict[str, Any]
        The seconds that this rests on, of the layout and of the best dense one (see
        ``docs/formats.md``).
    density : tuple[str, ...]
        Of a weight that is worth a look, where its non-zeros are: a string for each row of cells,
        two hexadecimal digits for each cell, ``ff`` where there are no zeros.
    """

    name: str
    op: str
    shape: tuple[int, int]
    sparsity: float
    nnz: int
    structure: str
    format: str
    block: tuple[int, int] | None
    kernel: str
    epilogue: tuple[str, ...]
    reason: str
    bytes: int
    precision: str = "float32"
    basis: str = "predicted"
    times: dict[str, Any] = field(default_factory=dict)
    density: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The report as the manifest stores it."""
        record = dict(vars(self))
        for key in ("shape", "block", "epilogue", "density"):
            record[key] = None if record[key] is None else list(record[key])
        if not self.density:
            del record["density"]
        return record


@dataclass
class Program:
    """A model on its way through the compiler.

    Attributes
    ----------
    module : tvm.IRModule
        ``main(inputs..., weights...)``, with attribute ``num_input``.
    weights : dict[str, np.ndarray]
        Arrays by parameter name, one per parameter of ``main`` after the inputs, in order.
    layers : dict[str, str]
        Layer names by weight parameter.
    reports : dict[str, LayerReport]
        By layer name, filled by the conversion of weights.
    kernels : dict[str, dict[str, Any]]
        By function name: the operator it computes, its family, and the layers it serves, in
        order of execution.
    notes : list[str]
        Patterns a pass saw and left alone, and why.
    merged : dict[str, tuple[str, ...]]
        The layers that one layer of a name of its own does the work of.
    """

    module: tvm.IRModule
    weights: dict[str, np.ndarray]
    layers: dict[str, str]
    reports: dict[str, LayerReport] = field(default_factory=dict)
    kernels: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    merged: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def copy(self) -> Program:
        """The same program, to be changed without changing this one; arrays are shared."""
        return replace(
            self,
            module=tvm.IRModule(dict(self.module.functions.items()), attrs=self.module.attrs),
            weights=dict(self.weights),
            layers=dict(self.layers),
            reports={name: replace(report) for name, report in self.reports.items()},
            kernels={name: copy.deepcopy(kernel) for name, kernel in self.kernels.items()},
            notes=list(self.notes),
            merged=dict(self.merged),
        )

    @property
    def num_input(self) -> int:
        """How many of ``main``'s parameters are the model's inputs."""
        return int(self.module["main"].attrs["num_input"])
