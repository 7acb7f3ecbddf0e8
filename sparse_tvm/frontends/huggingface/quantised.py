"""Checkpoints that compressed-tensors quantised to int8: what layers make of their inputs.

The weights are stored as integers, with scales beside them; ``config.json`` says how inputs are
rounded: by a scale of each token, found as it comes, or by one that is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparse_tvm.errors import ModelError
from sparse_tvm.sparsity.quantise import LARGEST, LEAST, PEAK_STEPS


class InputRounding:
    """How the layers of a checkpoint round their inputs.

    Parameters
    ----------
    quantisation : Mapping[str, Any]
        ``quantization_config`` of ``config.json``.
    where : str
        What messages call the model.

    Raises
    ------
    ModelError
        When it is no scheme of int8 that layers here compute in.
    """

    def __init__(self, quantisation: Mapping[str, Any], where: str) -> None:
        groups = list((quantisation.get("config_groups") or {}).values())
        schemes = [(group.get("weights"), group.get("input_activations")) for group in groups]
        refusal = next(filter(None, (_refusal(*scheme) for scheme in schemes)), None)
        if any(scheme != schemes[0] for scheme in schemes[1:]):
            refusal = "its groups of layers differ"
        if any(group.get("output_activations") for group in groups):
            refusal = "it rounds what layers return"
        if refusal is not None:
            raise ModelError(
                f"{where}: quantised models of this kind are not supported: {refusal}",
                hint="int8 weights by channel, and int8 inputs by token or by one static scale, "
                "are; or give the float32 model",
            )
        self._inputs = schemes[0][1] if schemes else None

    def apply(self, layer: Any, scale: Any, zero_point: Any) -> None:
        """Let a layer round its input: by a static scale, or by one of each token where None."""
        import torch

        if self._inputs is None:
            return
        shift = 0.0 if zero_point is None else float(zero_point.reshape(-1)[0])
        step = None if scale is None else float(scale.reshape(-1)[0])
        low, high = LEAST - shift, LARGEST - shift

        def rounded(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x, unit = args[0], step
            if unit is None:
                peak = torch.amax(torch.abs(x), -1, keepdim=True)
                unit = torch.clamp(peak / PEAK_STEPS, min=torch.finfo(torch.float32).eps)
            return torch.round(torch.clamp(x / unit, low, high)) * unit, *args[1:]

        layer.register_forward_pre_hook(rounded)


def _refusal(weights: Mapping[str, Any] | None, inputs: Mapping[str, Any] | None) -> str | None:
    """What of a scheme is unknown here."""
    for what, args, strategies in (
        ("weights", weights or {}, ("channel", "tensor")),
        ("inputs", inputs or {"num_bits": 8}, ("token", "tensor", None)),
    ):
        kind = args.get("num_bits"), args.get("type", "int")
        if kind != (8, "int"):
            return f"{what} of {kind[0]} bits, {kind[1]}"
        if args.get("strategy") not in strategies:
            return f"{what} by {args.get('strategy')}"
    if not (weights or {}).get("symmetric", True):
        return "weights with zero points"
    if inputs and bool(inputs.get("dynamic")) != (inputs.get("strategy") == "token"):
        return f"inputs by {inputs.get('strategy')}, {'dynamic' if inputs['dynamic'] else 'static'}"
    if inputs and inputs.get("dynamic") and not inputs.get("symmetric", True):
        return "inputs with a zero point of each token"
    return None
