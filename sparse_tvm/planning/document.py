"""The plan as a file: what each layer is to become, and what that was expected to give.

``prune --plan`` follows it for any model of the same layers, whatever values these have by then.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import onnx

from sparse_tvm import __version__
from sparse_tvm.errors import OptionError
from sparse_tvm.files import replacing
from sparse_tvm.frontends.onnx.weights import WeightRef, find_weights
from sparse_tvm.manifest import Natural, check
from sparse_tvm.planning.settings import DENSE, Setting, check_structure
from sparse_tvm.sparsity.pattern import Goal, Pattern

VERSION = 1
"""Of the schema; it counts up when files of an older one mean something else."""

_KIND = "sparse-tvm plan"


class _Layer(TypedDict):
    name: str
    shape: list[Natural]
    structure: str
    sparsity: float
    seconds: float
    dense_seconds: float
    bytes: Natural
    error: float


class _Goal(TypedDict):
    what: Literal["latency", "speedup", "size"]
    value: float


class _Model(TypedDict):
    name: str
    layers_sha256: str


class _Totals(TypedDict):
    seconds: float
    dense_seconds: float
    rest_seconds: float
    bytes: Natural
    dense_bytes: Natural
    error: float


class _Precision(TypedDict, total=False):
    precision: str


class _Conditions(_Precision):
    target: str
    cpu: str | None
    threads: Natural
    inputs: dict[str, list[Natural]]
    basis: Literal["measured", "predicted"]
    worst_trial: float | None


class _Plan(TypedDict):
    """The schema."""

    kind: Literal["sparse-tvm plan"]
    version: Natural
    sparse_tvm: str
    model: _Model
    goal: _Goal
    conditions: _Conditions
    totals: _Totals
    layers: list[_Layer]
    frontier: list[tuple[float, float]]
    uniform: dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer.

    Attributes
    ----------
    name : str
        As ``prune --layers`` matches it.
    shape : tuple[int, int]
        ``(N, K)``.
    setting : Setting
        How it is pruned.
    seconds, dense_seconds : float
        In a run, pruned and as it is.
    nbytes : int
        Of the stored weight.
    error : float
        Share of the output's energy that is lost.
    """

    name: str
    shape: tuple[int, int]
    setting: Setting
    seconds: float
    dense_seconds: float
    nbytes: int
    error: float

    def as_json(self) -> dict[str, Any]:
        """As the file has it."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "structure": self.setting.structure,
            "sparsity": self.setting.sparsity,
            "seconds": self.seconds,
            "dense_seconds": self.dense_seconds,
            "bytes": self.nbytes,
            "error": self.error,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LayerPlan:
        """Read a layer of a file whose types are right.

        Raises
        ------
        ValueError
            When its values cannot be.
        """
        if len(value["shape"]) != 2:
            raise ValueError(f"layer {value['name']!r} has the shape {value['shape']}")
        if not 0 <= value["sparsity"] < 1:
            raise ValueError(f"layer {value['name']!r} has a sparsity of {value['sparsity']}")
        try:
            check_structure(value["structure"])
        except OptionError as error:
            raise ValueError(f"layer {value['name']!r} has the {error.message}") from None
        rows, columns = value["shape"]
        setting = Setting(value["structure"], float(value["sparsity"]))
        return cls(
            value["name"],
            (rows, columns),
            setting if setting.sparsity else DENSE,
            value["seconds"],
            value["dense_seconds"],
            value["bytes"],
            value["error"],
        )


@dataclass(frozen=True)
class Plan:
    """How far to prune each layer.

    Attributes
    ----------
    model : str
        Its name.
    fingerprint : str
        Of its layers (see :func:`layers_fingerprint`).
    goal, value : str, float
        ``latency`` in seconds, ``speedup``, or ``size`` in bytes.
    target : str
        For which CPU.
    precision : str | None
        In which it is to compute; None in files that do not say.
    cpu : str | None
        The CPU that was measured on; None where times are predicted.
    worst_trial : float | None
        By how much the trial that was predicted worst is off, relatively; None where times are
        predicted.
    threads : int
        How many run.
    inputs : dict[str, tuple[int, ...]]
        Shapes that the times are for.
    seconds, dense_seconds, rest_seconds : float
        Of a run as planned, of the model as it is, and of what is no layer that can be pruned.
    nbytes, dense_bytes : int
        Of all weights, as planned and as they are.
    error : float
        What a layer loses in the geometric mean.
    layers : Sequence[LayerPlan]
        In the model's order.
    frontier : Sequence[tuple[float, float]]
        The least error for seconds, or bytes where the goal is a size.
    uniform : dict[str, Sequence[tuple[float, float]]]
        The same of one sparsity for all layers, by structure.
    """

    model: str
    fingerprint: str
    goal: str
    value: float
    target: str
    precision: str | None
    cpu: str | None
    worst_trial: float | None
    threads: int
    inputs: Mapping[str, tuple[int, ...]]
    seconds: float
    dense_seconds: float
    rest_seconds: float
    nbytes: int
    dense_bytes: int
    error: float
    layers: Sequence[LayerPlan]
    frontier: Sequence[tuple[float, float]] = ()
    uniform: Mapping[str, Sequence[tuple[float, float]]] | None = None

    @property
    def basis(self) -> str:
        """Whether times are measured or predicted."""
        return "predicted" if self.cpu is None else "measured"

    @property
    def where(self) -> str:
        """The target and the precision."""
        return self.target if self.precision is None else f"{self.target} in {self.precision}"

    @property
    def settings(self) -> dict[str, Setting]:
        """How each layer is pruned, by name, without those that are left as they are."""
        return {one.name: one.setting for one in self.layers if one.setting != DENSE}

    def check_model(self, refs: Iterable[WeightRef], model: str) -> None:
        """Refuse a model of other layers than those that were planned for.

        Raises
        ------
        OptionError
            When the model has not the same layers; it names the first that differs.
        """
        refs = list(refs)
        if layers_fingerprint(refs) == self.fingerprint:
            return
        shapes = {ref.layer: ref.shape for ref in refs}
        for one in self.layers:
            if one.name not in shapes:
                difference = f"{model} has no layer {one.name}"
            elif shapes[one.name] != one.shape:
                ours, theirs = ("x".join(map(str, s)) for s in (shapes[one.name], one.shape))
                difference = f"layer {one.name} of {model} is {ours}, not {theirs}"
            else:
                continue
            break
        else:
            difference = f"{model} has other layers"
        raise OptionError(
            f"the plan is of another model, {self.model}: {difference}",
            hint="run `sparse-tvm plan` on this one",
        )

    def as_json(self) -> dict[str, Any]:
        """As the file has it."""
        return {
            "kind": _KIND,
            "version": VERSION,
            "sparse_tvm": __version__,
            "model": {"name": self.model, "layers_sha256": self.fingerprint},
            "goal": {"what": self.goal, "value": self.value},
            "conditions": {
                "target": self.target,
                **({} if self.precision is None else {"precision": self.precision}),
                "cpu": self.cpu,
                "threads": self.threads,
                "inputs": {name: list(shape) for name, shape in self.inputs.items()},
                "basis": self.basis,
                "worst_trial": self.worst_trial,
            },
            "totals": {
                "seconds": self.seconds,
                "dense_seconds": self.dense_seconds,
                "rest_seconds": self.rest_seconds,
                "bytes": self.nbytes,
                "dense_bytes": self.dense_bytes,
                "error": self.error,
            },
            "layers": [one.as_json() for one in self.layers],
            "frontier": [list(point) for point in self.frontier],
            "uniform": {
                structure: [list(point) for point in points]
                for structure, points in (self.uniform or {}).items()
            },
        }

    @classmethod
    def from_json(cls, value: Any) -> Plan:
        """Read what :meth:`as_json` makes.

        Raises
        ------
        ValueError
            When it is no plan; it says why not.
        """
        if not isinstance(value, dict) or value.get("kind") != _KIND:
            raise ValueError("it is no plan")
        if value.get("version") != VERSION:
            raise ValueError(f"it is of version {value.get('version')!r}, not {VERSION}")
        check(value, _Plan, "the plan")
        layers = [LayerPlan.from_json(layer) for layer in value["layers"]]
        names = [one.name for one in layers]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"layer {twice!r} is in it twice")
        conditions, totals = value["conditions"], value["totals"]
        return cls(
            value["model"]["name"],
            value["model"]["layers_sha256"],
            value["goal"]["what"],
            value["goal"]["value"],
            conditions["target"],
            conditions.get("precision"),
            conditions["cpu"],
            conditions["worst_trial"],
            conditions["threads"],
            {name: tuple(shape) for name, shape in conditions["inputs"].items()},
            totals["seconds"],
            totals["dense_seconds"],
            totals["rest_seconds"],
            totals["bytes"],
            totals["dense_bytes"],
            totals["error"],
            layers,
            [(cost, error) for cost, error in value["frontier"]],
            {
                structure: [(cost, error) for cost, error in points]
                for structure, points in value["uniform"].items()
            },
        )


def layers_fingerprint(refs: Iterable[WeightRef]) -> str:
    """SHA-256 of all layers' names, operators and shapes: not of values, which training changes."""
    described = [[ref.layer, ref.op, list(ref.shape)] for ref in refs]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def write_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write a plan.

    Raises
    ------
    OutputError
        When the file cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(plan.as_json(), indent=1) + "\n", encoding="utf-8")


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan.

    Raises
    ------
    OptionError
        When the file cannot be read, or holds none.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise OptionError(f"plan {path} cannot be read: {reason or error}") from error
    try:
        return Plan.from_json(json.loads(text))
    except (ValueError, RecursionError) as error:
        reason = "it is not JSON" if isinstance(error, json.JSONDecodeError) else str(error)
        raise OptionError(
            f"plan {path} cannot be used: {reason}", hint="`sparse-tvm plan` writes plans"
        ) from error


def planned_goals(
    path: str | os.PathLike[str], model: onnx.ModelProto, name: str
) -> dict[str, Goal]:
    """Read a plan to follow it: what is to become of each layer of a model.

    Raises
    ------
    OptionError
        When the file holds no plan, or one of another model.
    """
    plan = read_plan(path)
    plan.check_model(find_weights(model), name)
    return {
        layer: Goal(Pattern.parse(setting.structure), setting.sparsity)
        for layer, setting in plan.settings.items()
    }
