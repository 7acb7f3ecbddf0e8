"""What a compile does about precision beyond what options say: measures, chooses, calibrates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from sparse_tvm.cpu import usable_cores
from sparse_tvm.errors import OptionError
from sparse_tvm.frontends.importer.model import ImportedModel
from sparse_tvm.frontends.onnx.weights import other_users
from sparse_tvm.frontends.source import Source
from sparse_tvm.operators import PRECISIONS
from sparse_tvm.passes.formats import FormatOptions
from sparse_tvm.passes.infrastructure import Context
from sparse_tvm.passes.set_precision import computes_in, has_kernels
from sparse_tvm.quantising.rehearsal import Rehearsal
from sparse_tvm.quantising.scales import (
    METHODS,
    CalibratedSource,
    Scale,
    check_method,
    static_scales,
    with_scales,
)
from sparse_tvm.quantising.search import PrecisionSearch
from sparse_tvm.quantising.sites import Site, image_tensors, sites_of
from sparse_tvm.quantising.worth import Worth, worthwhile
from sparse_tvm.sparsity.calibration import Data, read_calibration
from sparse_tvm.sparsity.pruning import own_copy, tokenizer_of

AUTO = "auto"
"""The precision that stands for the choice of one per layer."""

LEAST_COSINE_AUTO = 0.99
"""What ``auto`` keeps of the cosine, unless told otherwise."""

_MEASURED = 8
"""Feeds, at most, on which the sensitivity of layers is measured."""

_OF_CONVOLUTIONS = ["int8", "fp32"]
"""Of what ``auto`` chooses among."""

_OLDEST_OPSET = 10
"""With ``QuantizeLinear``."""

Feeds = Sequence[Mapping[str, np.ndarray]]


def ladder_of(context: Context) -> list[str]:
    """The precisions that ``auto`` chooses among, the lowest first.

    Raises
    ------
    OptionError
        When the target has nothing below float32, or does not compute in it as it is.
    """
    usual = context.backend.precision
    if usual != "fp32":
        raise OptionError(
            f"target {context.target.name} computes in {usual} as it is; auto chooses what to "
            "compute in less than fp32",
            hint="leave --precision away, or ask for one",
        )
    able = [name for name in ("int8", "bf16") if computes_in(context, name)]
    able += ["fp16"] if has_kernels(context, "fp16") else []
    if not able:
        others = [name for name in PRECISIONS if has_kernels(context, name)]
        raise OptionError(
            f"target {context.target.name} has nothing below float32 to choose among",
            hint=f"--precision {' or '.join(others)}, or another --target",
        )
    return [*able, "fp32"]


@dataclass(frozen=True)
class Calibration:
    """Data on which static scales are found, and how (see :data:`METHODS`)."""

    data: Data
    method: str = METHODS[0]


def check_calibration(options: FormatOptions, calibration: Calibration) -> None:
    """Refuse static scales where nothing multiplies by them, and unknown ways to find them.

    Raises
    ------
    OptionError
        When no layer is to be int8, or there is no such method.
    """
    check_method(calibration.method)
    if "int8" not in options.precisions:
        raise OptionError(
            f"--calibrate finds scales for int8, and the precision is {options.precision}",
            hint="--precision int8, or auto",
        )


class Quantising:
    """A model whose precision is chosen, or whose scales are fixed, by how it does on data.

    Parameters
    ----------
    source : Source
        The model.
    context : Context
        With the options as given; for ``auto``, the precision is the lowest.
    imported : ImportedModel
        The model, as it is.
    calibration : Calibration | None
        For static scales. Only with them convolutions round: no kernel finds scales of images.

    Raises
    ------
    OptionError
        When the model is quantised already.
    """

    def __init__(
        self,
        source: Source,
        context: Context,
        imported: ImportedModel,
        calibration: Calibration | None = None,
    ) -> None:
        if imported.quantised:
            raise OptionError(
                f"{source.name} is quantised already, and computes by its own scales",
                hint="leave --calibrate and --precision auto out",
            )
        self._source, self._imported = source, imported
        self._context, self._options = context, context.options
        self._model = own_copy(source.as_onnx())
        self._search: PrecisionSearch | None = None
        self._worth = Worth()
        self._batches: Feeds = ()
        self._scales: dict[str, Scale] = {}
        self._notes: list[str] = []
        self._sites = [s for s in sites_of(self._model) if s.ref.layer in imported.layers.values()]
        if calibration is None:
            self._sites = [site for site in self._sites if site.convolution is None]
        self._sites = [site for site in self._sites if self._has_kernel(site)]
        ruled = self._options.ruled_precision
        self._open = [site for site in self._sites if ruled(site.ref.layer) is None]
        if calibration is not None:
            self._calibrate(calibration)

    def _has_kernel(self, site: Site) -> bool:
        """Whether the target multiplies a convolution's integers; if not, a note says why."""
        if site.convolution is None:
            return True
        refusal = self._context.backend.refuses(site.convolution, self._context.target)
        if refusal is not None:
            self._notes.append(f"{site.ref.layer} stays float32: {refusal}")
        return refusal is None

    def _calibrate(self, calibration: Calibration) -> None:
        opset = next(e.version for e in self._model.opset_import if e.domain in ("", "ai.onnx"))
        if opset < _OLDEST_OPSET:
            raise OptionError(
                f"{self._source.name} is of opset {opset}, which cannot hold static scales",
                hint=f"convert it to opset {_OLDEST_OPSET} or newer, or leave --calibrate out",
            )
        tokenizer = tokenizer_of(self._source)
        self._batches = read_calibration(calibration.data, self._model, tokenizer=tokenizer)
        tensors = {site.tensor for site in self._open} | image_tensors(self._model, self._open)
        self._scales = static_scales(self._model, tensors, self._batches, calibration.method)

    def search(self, ladder: Sequence[str], least: float, feeds: Feeds) -> None:
        """Choose a precision for each layer (see :class:`PrecisionSearch`).

        Parameters
        ----------
        ladder : Sequence[str]
            As `ladder_of` returns it.
        least : float
            The cosine to keep.
        feeds : Feeds
            What to measure on.

        Raises
        ------
        OptionError
            When the model has no layers of float32 that could be int8, and that options leave open.
        """
        if not self._open:
            raise OptionError(
                f"{self._source.name} has no layers whose precision could be chosen",
                hint="leave --precision auto out",
            )
        self._worth = worthwhile(self._imported, self._context, ladder)
        rungs = dict(self._worth.rungs)
        rungs |= {s.ref.layer: _OF_CONVOLUTIONS for s in self._open if s.convolution is not None}
        rehearsal = self._rehearsal(self._open, feeds)
        self._search = PrecisionSearch(rehearsal, ladder, least, rungs)

    def raise_more(self) -> bool:
        """Leave a few more layers in higher precision; whether there were any."""
        return self._search is not None and self._search.raise_more()

    @property
    def batches(self) -> Feeds:
        """The calibration data, if there is some."""
        return self._batches

    @property
    def options(self) -> FormatOptions:
        """Those of the compile, with what was chosen."""
        return self._search.applied(self._options) if self._search else self._options

    @property
    def notes(self) -> list[str]:
        """What reports say of the choice."""
        if self._search is None:
            return self._notes
        notes = [*self._notes, self._search.note()]
        if slower := self._worth.slower(self._search.precisions()):
            sizes = ", ".join(map(str, slower))
            notes.append(f"of {sizes} tokens float32 is predicted to be faster than that")
        return notes

    def losses(self, precisions: Mapping[str, str], feeds: Feeds) -> dict[str, float]:
        """By layer, what it alone takes from the cosine of 1, the largest first.

        In `precisions`; or where layers were chosen, in the lowest that there was to choose.
        """
        if self._search is not None:
            return self._search.losses
        return self._rehearsal(self._sites, feeds).losses(precisions)

    @property
    def source(self) -> Source:
        """The model, with static scales in front of the layers that compute in int8."""
        options = self.options
        shared = other_users(self._model, {s.ref.layer: s.ref for s in self._open}.values())
        chosen = [
            site
            for site in self._open
            if options.precision_for(site.ref.layer) == "int8" and not shared[site.ref.layer]
        ]
        if not self._scales or not chosen:
            return self._source
        samples = sum(len(next(iter(batch.values()))) for batch in self._batches)
        layers = len({site.ref.layer for site in chosen})
        note = f"{layers} layers round by static scales, from {samples} samples"
        return CalibratedSource(self._source, with_scales(self._model, self._scales, chosen), note)

    def _rehearsal(self, sites: Sequence[Site], feeds: Feeds) -> Rehearsal:
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        return Rehearsal(model, sites, feeds[:_MEASURED], self._scales, usable_cores())
