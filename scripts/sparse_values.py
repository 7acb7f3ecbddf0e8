"""The values of a sparse model that train, and where in its matrices they are."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from transformers import BertModel

LEAST = 0.6
"""What each matrix keeps, of what all would keep if they were equally sparse."""


class Values:
    """What trains: float32 values that an optimiser moves, for a bfloat16 model that computes.

    Of matrices only the values that are not zero: zeros are nowhere that training could move them,
    and the optimiser has a tenth of the work. `move` alone takes blocks away and gives others.
    """

    def __init__(self, model: BertModel, block: int, state: dict[str, Any]) -> None:
        """Take a model, the rows of a block of its weights, and what `state` gave or nothing."""
        self.model = copy.deepcopy(model).bfloat16()
        self._block = block
        self._names = [name for name, each in model.named_parameters() if each.requires_grad]
        self.computed = [self.model.get_parameter(name) for name in self._names]
        found = [model.get_parameter(name).detach() for name in self._names]
        # A block that came back may hold zeros that train, so that a state names the places.
        self._places: list[torch.Tensor] = state.get("places") or [_places(each) for each in found]
        trained = [
            each.flatten()[places].requires_grad_()
            for each, places in zip(found, self._places, strict=True)
        ]
        self._optimiser = torch.optim.AdamW(
            trained, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )
        if state:
            self._optimiser.load_state_dict(state["optimiser"])
        self._dense: list[torch.Tensor] = []

    @property
    def _trained(self) -> list[torch.Tensor]:
        return self._optimiser.param_groups[0]["params"]

    def state(self) -> dict[str, Any]:
        """Return what it takes to go on from the same model: the optimiser's state, the places."""
        return {"optimiser": self._optimiser.state_dict(), "places": self._places}

    def step(self, gradients: Iterable[torch.Tensor], rate: float) -> None:
        """Move the values against the gradients of the parameters that computed."""
        for value, places, gradient in zip(self._trained, self._places, gradients, strict=True):
            value.grad = gradient.flatten()[places].float()
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimiser.param_groups[0]["lr"] = rate
        self._optimiser.step()
        self.give(self.model)

    def give(self, model: BertModel) -> None:
        """Write the values to a model of any precision."""
        with torch.no_grad():
            for name, value, places in zip(self._names, self._trained, self._places, strict=True):
                parameter = model.get_parameter(name).zero_()
                parameter.view(-1)[places] = value.to(parameter.dtype)

    def gather(self, gradients: Iterable[torch.Tensor]) -> None:
        """Add up gradients of all weights, zeros as well, for the next `move`."""
        if self._dense:
            for total, gradient in zip(self._dense, gradients, strict=True):
                total += gradient
        else:
            self._dense = [gradient.float() for gradient in gradients]

    @torch.no_grad()
    def move(self, sparsity: float, share: float) -> None:
        """Leave the matrices so sparse, and a share of what stays to blocks that were zero.

        Those go whose loss would cost least, by a weight's square times its gradient's mean square
        (LeCun et al., Optimal Brain Damage, 1990); those come whose gathered gradients are largest
        (Evci et al., Rigging the Lottery, 2020). All matrices are in one ranking, in which each
        keeps at least a part, `LEAST`, of an even share.
        """
        matrices = [i for i, each in enumerate(self.computed) if each.ndim == 2]
        alive, costs, gains = [], [], []
        for i in matrices:
            moments = self._optimiser.state[self._trained[i]]
            cost = self._spread(i, self._trained[i].square() * moments["exp_avg_sq"])
            alive.append(self._blocks(i, self._spread(i, torch.ones_like(self._trained[i]))) > 0)
            costs.append(self._blocks(i, cost))
            least = round(LEAST * (1 - sparsity) * costs[-1].numel())
            costs[-1].view(-1)[costs[-1].flatten().topk(least).indices] = torch.inf
            gains.append(self._blocks(i, self._dense[i].flatten().square()))
        self._dense = []
        was, cost, gain = (torch.cat([x.flatten() for x in each]) for each in (alive, costs, gains))
        wanted = round(len(was) * (1 - sparsity))
        grown = round(wanted * share)
        kept = cost.masked_fill(~was, -1.0).topk(wanted - grown).indices
        come = gain.masked_fill(was, -1.0).topk(grown).indices
        stays = torch.zeros_like(was)
        stays[kept] = stays[come] = True
        sizes = [each.numel() for each in alive]
        for i, each in zip(matrices, stays.split(sizes), strict=True):
            self._replace(i, each)

    def _spread(self, index: int, values: torch.Tensor) -> torch.Tensor:
        """Return a matrix, flat, that has such values where values train, and zeros."""
        whole = torch.zeros(self.computed[index].numel())
        whole[self._places[index]] = values
        return whole

    def _blocks(self, index: int, whole: torch.Tensor) -> torch.Tensor:
        """Return the sum of each block: ``[rows / block, columns]``."""
        return whole.view(-1, self._block, self.computed[index].shape[1]).sum(1)

    def _replace(self, index: int, stays: torch.Tensor) -> None:
        """Let other blocks of a matrix train; those that were not there begin at zero."""
        columns = self.computed[index].shape[1]
        before = self._trained[index]
        moments = self._optimiser.state.pop(before)
        places = (
            stays.view(-1, 1, columns).expand(-1, self._block, -1).flatten().nonzero().flatten()
        )
        squares = self._spread(index, moments["exp_avg_sq"])[places]
        squares[squares == 0] = moments["exp_avg_sq"].mean()
        value = self._spread(index, before.detach())[places].requires_grad_()
        self._optimiser.state[value] = {
            "step": moments["step"],
            "exp_avg": self._spread(index, moments["exp_avg"])[places],
            "exp_avg_sq": squares,
        }
        self._trained[index] = value
        self._places[index] = places


def _places(parameter: torch.Tensor) -> torch.Tensor:
    """Return where a parameter trains, counted through its rows."""
    trains = parameter != 0 if parameter.ndim == 2 else torch.ones_like(parameter)
    return trains.flatten().nonzero().flatten()
