"""What operators are made of: element types, steps of epilogues, layouts of weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

REGISTERED: dict[str, type[Any]] = {}
"""Operators and steps by name: what a name read from a module stands for."""

_Self = TypeVar("_Self", bound="WeightedOperator")


def _register(cls: type[Any]) -> None:
    name = cls.__dict__.get("name")
    if name is None:
        return
    known = REGISTERED.get(name, cls)
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"there is an operator or a step called {name!r} already")
    REGISTERED[name] = cls


@dataclass(frozen=True)
class Types:
    """Element types of an operator.

    Attributes
    ----------
    input, weight, sum, output : str
        Of the activations it reads, the weight's values, the accumulators, and what it returns.
    """

    input: str = "float32"
    weight: str = "float32"
    sum: str = "float32"
    output: str = "float32"


FLOAT32 = Types()

PRECISIONS = {
    "fp32": FLOAT32,
    "fp16": Types("float16", "float16", "float32", "float32"),
    "bf16": Types("bfloat16", "bfloat16", "float32", "float32"),
    "int8": Types("int8", "int8", "int32", "float32"),
}
"""Types of a layer by what users call them."""

PRECISION_NAMES = {types.weight: name for name, types in PRECISIONS.items()}
"""What users call them, by the element type of the weight, which reports have."""

STORED = {"fp16": Types(weight="float16"), "bf16": Types(weight="bfloat16")}
"""The same of a layer that only stores its weight so, where a target computes in float32."""


def forms_of(precision: str) -> list[Types]:
    """Types of a layer in a precision, in the order that they are preferred in."""
    return [forms[precision] for forms in (PRECISIONS, STORED) if precision in forms]


@dataclass(frozen=True)
class Step:
    """One step of an epilogue: what happens to the sums before they are stored.

    ``operand`` says whether the step reads a tensor; those are an operator's last operands, in the
    order of the steps.
    """

    name: ClassVar[str]
    operand: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        _register(cls)

    @property
    def title(self) -> str:
        """What it is called in names of kernels."""
        return self.name

    def __str__(self) -> str:
        return self.title


@dataclass(frozen=True)
class Bias(Step):
    """Add one number per output feature, ``[N]``."""

    name: ClassVar[str] = "bias"
    operand: ClassVar[bool] = True


@dataclass(frozen=True)
class Residual(Step):
    """Add a tensor shaped like the output."""

    name: ClassVar[str] = "residual"
    operand: ClassVar[bool] = True


@dataclass(frozen=True)
class Gate(Step):
    """Multiply by a tensor shaped like the output."""

    name: ClassVar[str] = "gate"
    operand: ClassVar[bool] = True


@dataclass(frozen=True)
class Activation(Step):
    """Apply ``function``: relu, gelu, gelu_tanh, silu, hard_swish, tanh, sigmoid, hard_sigmoid."""

    name: ClassVar[str] = "activation"
    function: str

    @property
    def title(self) -> str:
        """The function's name."""
        return self.function


@dataclass(frozen=True)
class Clamp(Step):
    """Keep within bounds; None is no bound."""

    name: ClassVar[str] = "clamp"
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        low, high = ("" if bound is None else f"{bound:g}" for bound in (self.low, self.high))
        return f"{self.name}({low}, {high})"


Epilogue = tuple[Step, ...]


@dataclass(frozen=True)
class Layout:
    """How the weight of an operator is stored.

    Attributes
    ----------
    family : str
        The kernel family that packs and reads it.
    format : str
        ``dense``, ``csr``, ``bsr``, or another that the family knows.
    block : tuple[int, int]
        Output rows by input columns of one stored block.
    parameters : tuple[tuple[str, int], ...]
        What else the family wants to remember, and a tuner may vary.
    """

    family: str
    format: str
    block: tuple[int, int] = (1, 1)
    parameters: tuple[tuple[str, int], ...] = ()

    @property
    def sparse(self) -> bool:
        """Whether zeros are left out."""
        return self.format != "dense"

    def get(self, parameter: str, default: int) -> int:
        """Value of a parameter."""
        return dict(self.parameters).get(parameter, default)

    def having(self, **parameters: int) -> Layout:
        """The same layout with these parameters."""
        merged = {**dict(self.parameters), **parameters}
        return replace(self, parameters=tuple(sorted(merged.items())))


@dataclass(frozen=True, kw_only=True)
class Operator:
    """Base of all operators.

    ``name`` is how modules spell it, ``operands`` describes the tensors that a call takes.
    """

    name: ClassVar[str]
    operands: ClassVar[str]

    types: Types = FLOAT32

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        _register(cls)


@dataclass(frozen=True, kw_only=True)
class WeightedOperator(Operator):
    """An operator with a constant weight that may be sparse: a layer.

    Attributes
    ----------
    layer : str
        The user's name of it.
    matrix : tuple[int, int]
        Rows and columns of the weight as a matrix: outputs by what each output sums.
    epilogue : tuple[Step, ...]
        Applied to the sums, in order.
    layout : Layout | None
        How the weight is stored; None as long as it is the model's own array.
    """

    layer: str
    matrix: tuple[int, int]
    epilogue: Epilogue = ()
    layout: Layout | None = None

    @property
    def stored(self) -> Layout:
        """The layout of a weight that has one.

        Raises
        ------
        ValueError
            When no pass has chosen it yet.
        """
        if self.layout is None:
            raise ValueError(f"{self.layer}: how its weight is stored was not chosen yet")
        return self.layout

    @property
    def extras(self) -> int:
        """How many operands the epilogue reads."""
        return sum(step.operand for step in self.epilogue)

    def then(self: _Self, *steps: Step) -> _Self:
        """The same operator with more steps behind it."""
        return replace(self, epilogue=(*self.epilogue, *steps))

    @property
    def step_titles(self) -> list[str]:
        """The epilogue in names of kernels."""
        return [step.title for step in self.epilogue]
