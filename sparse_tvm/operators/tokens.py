"""Operators on tokens and their features: dense and recurrent layers, attention, norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparse_tvm.operators.base import Operator, WeightedOperator


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
    blocks : tuple[int, int] | None
        Keys, and tiles of queries, that are summed up together; None for as many as usual.
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
    blocks: tuple[int, int] | None = None


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
