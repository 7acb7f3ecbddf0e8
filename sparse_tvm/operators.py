"""The operators between Relax and kernels: what a call computes, and nothing about how.

Graph passes make them of patterns, a backend chooses how their weights are stored, gives their
operands its own layout and turns each into a kernel. An operator is a frozen dataclass: two that
are equal compute the same. :mod:`sparse_tvm.passes.dialect` writes them into a module and reads
them back; :func:`to_json` and :func:`from_json` are the codec. Nothing here imports TVM.

A backend or an extension adds an operator by deriving from :class:`Operator`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

_REGISTERED: dict[str, type[Any]] = {}
"""Operators and steps by name: what a name read from a module stands for."""

_Self = TypeVar("_Self", bound="WeightedOperator")


def _register(cls: type[Any]) -> None:
    name = cls.__dict__.get("name")
    if name is None:
        return
    known = _REGISTERED.get(name, cls)
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"there is an operator or a step called {name!r} already")
    _REGISTERED[name] = cls


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


@dataclass(frozen=True, kw_only=True)
class Dense(WeightedOperator):
    """``epilogue(x W^T)``, W being ``[N, K]``.

    Of ``groups``, each is ``N / groups`` outputs of its own ``K`` inputs: x has ``K * groups``.

    ``steps`` tells that in int8 the weight's values lie on steps of their own, which no kernel may
    make coarser, and how many of them are between 0 and the farthest value.
    """

    name: ClassVar[str] = "dense"
    operands: ClassVar[str] = "x, the weight's arrays, epilogue tensors"

    groups: int = 1
    steps: int = 0

    @property
    def inputs(self) -> int:
        """Features of x."""
        return self.matrix[1] * self.groups


@dataclass(frozen=True)
class Frames:
    """How a convolution moves over images that follow each other, as those of a video do.

    Attributes
    ----------
    count : int
        Images of one video.
    kernel, stride, dilation : int
        Of the convolution over time.
    """

    count: int = 1
    kernel: int = 1
    stride: int = 1
    dilation: int = 1

    @property
    def out(self) -> int:
        """Images of the output for one video."""
        return (self.count - (self.kernel - 1) * self.dilation - 1) // self.stride + 1


STILL = Frames()
"""Each image alone."""


@dataclass(frozen=True, kw_only=True)
class Convolution(WeightedOperator):
    """``epilogue(x * W)`` of images ``[batch, channels, *size]``.

    W is ``[out_channels, channels / groups, *kernel]``. All tuples have one number for each spatial
    dimension; ``pads`` has all starts, then all ends, and None in ``size`` is an extent that only
    run time knows. Over ``frames``, the batch is of the images of one video after the other, and W
    is ``[out_channels, channels / groups, frames.kernel, *kernel]``.
    """

    name: ClassVar[str] = "convolution"
    operands: ClassVar[str] = "x, the weight's arrays, epilogue tensors"

    channels: int
    out_channels: int
    size: tuple[int | None, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[int, ...]
    groups: int = 1
    frames: Frames = STILL

    @property
    def depthwise(self) -> bool:
        """Whether every output channel reads one input channel, of one image."""
        return self.groups == self.channels > 1 and self.frames == STILL


@dataclass(frozen=True, kw_only=True)
class PadFrames(Operator):
    """Images ``[videos * count, ...]`` with ``pads`` images of zeros around each video's."""

    name: ClassVar[str] = "pad_frames"
    operands: ClassVar[str] = "x"

    count: int
    pads: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class PixelShuffle(Operator):
    """Channels become pixels: ``[batch, channels * blocks, *size]`` to ``[batch, channels, ...]``.

    The channels of each output channel are its pixels within a block, row by row; ``starts`` and
    ``ends`` pixels are cut off along each axis.
    """

    name: ClassVar[str] = "pixel_shuffle"
    operands: ClassVar[str] = "x"

    blocks: tuple[int, ...]
    starts: tuple[int, ...]
    ends: tuple[int, ...]


QUANTISED = Types("uint8", "int8", "int32", "uint8")
"""Types of a convolution from bytes to bytes."""


@dataclass(frozen=True, kw_only=True)
class QuantisedConvolution(Convolution):
    """A convolution of an image of bytes, to bytes or float32.

    Sums of bytes by the weight's steps become, for each output channel,
    ``sums * factor + offset``: scales, zero points and bias in one. Bytes are that within
    ``limits``, the least, the largest, and the one that stands for zero; float32 has an epilogue.
    The weight's values are ``steps`` steps from 0 at most.
    """

    name: ClassVar[str] = "quantised_convolution"
    operands: ClassVar[str] = (
        "x, the weight's arrays, factor, offset, limits (of bytes) or epilogue tensors (of float32)"
    )

    types: Types = QUANTISED
    steps: int = 127

    @property
    def rounds(self) -> bool:
        """Whether its output is of bytes."""
        return self.types.output == "uint8"

    @property
    def extras(self) -> int:
        """How many operands there are behind the weight's arrays."""
        return 3 if self.rounds else 2 + super().extras


@dataclass(frozen=True, kw_only=True)
class QuantiseImage(Operator):
    """The bytes ``round(x / steps[0]) + steps[1]`` of an image."""

    name: ClassVar[str] = "quantise_image"
    operands: ClassVar[str] = "x, steps"

    types: Types = Types(output="uint8")


@dataclass(frozen=True, kw_only=True)
class DequantiseImage(Operator):
    """What an image's bytes stand for: ``(x - steps[1]) * steps[0]``.

    ``positive`` tells that nothing of it is below zero.
    """

    name: ClassVar[str] = "dequantise_image"
    operands: ClassVar[str] = "x, steps"

    positive: bool = False

    types: Types = Types(input="uint8")


@dataclass(frozen=True, kw_only=True)
class AddImages(Operator):
    """The sum of two images of bytes, as bytes: ``a * steps[0] + b * steps[1] + steps[2]``.

    It is rounded within ``steps[3]`` and ``steps[4]``; ``steps[5]`` stands for zero.
    """

    name: ClassVar[str] = "add_images"
    operands: ClassVar[str] = "a, b, steps"

    types: Types = Types(input="uint8", output="uint8")


@dataclass(frozen=True, kw_only=True)
class Recurrent(WeightedOperator):
    """The steps of an LSTM, GRU or plain RNN in one direction, after the input's product.

    Of gates ``[steps, batch, N]`` it makes ``[steps + states, batch, hidden]``: the hidden state
    after each step, the last hidden state and, of an LSTM, the last cell state. W, ``[N, hidden]``,
    and the gates have their features by gate, in ONNX's order.

    Attributes
    ----------
    cell : str
        ``lstm``, ``gru`` or ``rnn``.
    functions : tuple[str, ...]
        Activations of the gates (not a plain RNN's), of the candidate, and of an LSTM's cell.
    given : tuple[str, ...]
        Which optional operands there are, in this order: ``bias`` (of a GRU's candidate, reset
        with it), ``peepholes``, ``lengths``, ``hidden``, ``cell``.
    backward : bool
        Whether it begins at the end of each sequence.
    reset_after : bool
        Whether a GRU resets the product of the hidden state, not that state.
    clip : float | None
        Bound of what activations are applied to.
    """

    name: ClassVar[str] = "recurrent"
    operands: ClassVar[str] = (
        "gates, the weight's arrays, bias?, peepholes?, lengths?, hidden state?, cell state?"
    )

    cell: str
    functions: tuple[str, ...]
    given: tuple[str, ...] = ()
    backward: bool = False
    reset_after: bool = False
    clip: float | None = None

    @property
    def hidden(self) -> int:
        """Units of the hidden state."""
        return self.matrix[1]

    @property
    def states(self) -> int:
        """How many states are carried from step to step."""
        return 2 if self.cell == "lstm" else 1


@dataclass(frozen=True, kw_only=True)
class Attention(Operator):
    """Multi-head scaled dot-product attention over unsplit q, k, v ``[batch, rows, features]``.

    Attributes
    ----------
    heads : int
        Their features are slices of q, k and v.
    scale : float
        Factor of the scores.
    mask : tuple[bool, bool, bool, bool] | None
        For an additive mask, whether it has batch, heads, queries and keys, or extent 1 there.
    sizes : tuple[int, int] | None
        Features of one head of q and k, and of v, where they decide which kernels there are.
    starts : tuple[int, int, int]
        The first feature of q, k and v in operands that are wider than all their heads.
    by_heads : tuple[bool, bool, bool]
        Which of q, k and v are ``[batch, heads, rows, features of a head]`` instead.
    key_heads : int | None
        Heads of k and v, where they are fewer than q's: each serves as many of those, in order.
    """

    name: ClassVar[str] = "attention"
    operands: ClassVar[str] = "q, k, v, mask?"

    heads: int
    scale: float
    mask: tuple[bool, bool, bool, bool] | None = None
    sizes: tuple[int, int] | None = None
    starts: tuple[int, int, int] = (0, 0, 0)
    by_heads: tuple[bool, bool, bool] = (False, False, False)
    key_heads: int | None = None


@dataclass(frozen=True, kw_only=True)
class LayerNorm(Operator):
    """``(x - mean) / sqrt(variance + epsilon) * gamma + beta`` over the last axis.

    ``residual`` tells that another tensor is added to x before, and ``remainder``, that it comes in
    two: what was rounded to 16 bits, and what rounding it left. ``second`` is the type of a second
    result, if there is one: of float32, the same as the first, or of uint8, what rounding left of
    it. Unless ``centred`` neither the mean nor beta is part of it, and the variance is the mean of
    squares: RMS norm (arXiv:1910.07467).
    """

    name: ClassVar[str] = "layer_norm"
    operands: ClassVar[str] = "x, gamma, beta?, residual?, remainder?"

    epsilon: float
    residual: bool = False
    remainder: bool = False
    second: str | None = None
    centred: bool = True


@dataclass(frozen=True, kw_only=True)
class StepRound(Operator):
    """x rounded to 256 steps of a scale; the zero point is the step, from 0 to 255, that is 0.

    Layers in int8 alone may read it.
    """

    name: ClassVar[str] = "step_round"
    operands: ClassVar[str] = "x, scale, zero point"


@dataclass(frozen=True, kw_only=True)
class Product(Operator):
    """Matrix product of two activations, ``[..., M, K] x [..., K, N]``.

    ``left`` and ``right`` say which stored axis of an operand each of its logical axes is; ``rows``
    is M, None where only run time knows it.
    """

    name: ClassVar[str] = "product"
    operands: ClassVar[str] = "a, b"

    left: tuple[int, ...]
    right: tuple[int, ...]
    rows: int | None = None


def to_json(value: Any) -> Any:
    """An operator, or what it is made of, as plain data; fields at their defaults are left out."""
    if is_dataclass(value) and not isinstance(value, type):
        record = {
            f.name: to_json(getattr(value, f.name))
            for f in fields(value)
            if getattr(value, f.name) != f.default
        }
        return {"is": value.name, **record} if isinstance(value, Step) else record
    if isinstance(value, tuple):
        return [to_json(item) for item in value]
    return value


def from_json(name: str, record: dict[str, Any]) -> Operator:
    """The operator called ``name`` out of what :func:`to_json` made of it.

    Raises
    ------
    KeyError
        When no operator has that name.
    """
    operator = _read(operator_called(name), record)
    assert isinstance(operator, Operator)
    return operator


def operator_called(name: str) -> type[Operator]:
    """The class of the operator called ``name``.

    Raises
    ------
    KeyError
        When no operator has that name.
    """
    found = _REGISTERED[name]
    assert issubclass(found, Operator)
    return found


def all_operators() -> list[type[Operator]]:
    """Every operator that modules may contain, by name."""
    found = [cls for cls in _REGISTERED.values() if issubclass(cls, Operator)]
    return sorted(found, key=lambda cls: cls.name)


@cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    return get_type_hints(cls)


def _read(expected: Any, value: Any) -> Any:
    """A value of the annotated type ``expected`` out of plain data."""
    if value is None:
        return None
    choices = [choice for choice in get_args(expected) if choice is not type(None)]
    if get_origin(expected) is tuple:
        inner = [c for c in choices if c is not Ellipsis]
        types = inner * len(value) if len(inner) < len(choices) else inner
        return tuple(_read(t, item) for t, item in zip(types, value, strict=True))
    if get_origin(expected) is not None:  # one of several; None was dealt with
        return _read(choices[0], value) if len(choices) == 1 else value
    if isinstance(expected, type) and issubclass(expected, Step):
        value = dict(value)
        expected = _REGISTERED[value.pop("is")]
    if is_dataclass(expected) and isinstance(expected, type):
        hints = _hints(expected)
        known: Callable[..., Any] = expected
        return known(**{key: _read(hints[key], item) for key, item in value.items()})
    return value


__all__ = [
    "FLOAT32",
    "PRECISIONS",
    "QUANTISED",
    "STILL",
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
    "Step",
    "StepRound",
    "Types",
    "WeightedOperator",
    "all_operators",
    "from_json",
    "operator_called",
    "to_json",
]
