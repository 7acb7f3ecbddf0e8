"""Pruning in a ``transformers.Trainer``."""

from __future__ import annotations

from typing import Any

from sparse_tvm.frontends.source import require
from sparse_tvm.torch.pruner import Pruner

transformers = require("transformers", "huggingface", "pruning in a Trainer")


class PruningCallback(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """Steps a pruner with the trainer's optimiser.

    The trainer's checkpoints hold the masks, which are part of the model, and the step: a run
    that resumes, with a pruner made anew over the same model, goes on with the same masks.

    Parameters
    ----------
    pruner : Pruner
        Of the trainer's model.
    finish : bool
        Make the zeros part of the weights when training ends.
    """

    def __init__(self, pruner: Pruner, *, finish: bool = False) -> None:
        self._pruner = pruner
        self._finish = finish

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Go on at the trainer's step: zero, or that of the checkpoint."""
        self._pruner.load_state_dict({"calls": state.global_step})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count a step of the optimiser."""
        self._pruner.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Remove the masks, if asked to."""
        if self._finish:
            self._pruner.finish()
