"""Pruning of PyTorch models, while they train and before.

>>> from sparse_tvm.torch import Pruner
>>> pruner = Pruner(model, structure="4x1", sparsity=0.9, steps=1000)  # doctest: +SKIP
>>> for batch in batches:  # doctest: +SKIP
...     train(model, batch)
...     pruner.step()
>>> pruner.finish()  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse_tvm.torch.callback import PruningCallback
    from sparse_tvm.torch.distillation import (
        embedding_loss,
        hidden_state_loss,
        logit_loss,
        similarity_loss,
    )
    from sparse_tvm.torch.one_shot import prune_with_data
    from sparse_tvm.torch.pruner import Pruner

_HOMES = {
    "Pruner": "pruner",
    "PruningCallback": "callback",
    "embedding_loss": "distillation",
    "hidden_state_loss": "distillation",
    "logit_loss": "distillation",
    "prune_with_data": "one_shot",
    "similarity_loss": "distillation",
}

__all__ = [
    "Pruner",
    "PruningCallback",
    "embedding_loss",
    "hidden_state_loss",
    "logit_loss",
    "prune_with_data",
    "similarity_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
