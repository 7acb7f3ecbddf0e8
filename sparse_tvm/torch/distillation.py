"""Losses that hold a pruned model to the unpruned one it came from.

Each returns a scalar tensor, zero where student and teacher agree. Gradients flow to the student.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparse_tvm.frontends.source import require

torch = require("torch", "torch", "distillation")


def logit_loss(student: Any, teacher: Any, *, temperature: float = 2.0) -> Any:
    """Return the Kullback-Leibler divergence of softened classes, after Hinton et al. (2015).

    Parameters
    ----------
    student, teacher : Tensor
        Logits ``[..., classes]``.
    temperature : float
        Both are divided by it; the loss is multiplied by its square, so that gradients compare.
    """
    functional = torch.nn.functional
    divergence = functional.kl_div(
        functional.log_softmax(student.float() / temperature, -1).flatten(0, -2),
        functional.log_softmax(teacher.detach().float() / temperature, -1).flatten(0, -2),
        reduction="batchmean",
        log_target=True,
    )
    return divergence * temperature**2


def hidden_state_loss(student: Sequence[Any], teacher: Sequence[Any], mask: Any = None) -> Any:
    """Return the mean squared error of hidden states, relative to the teacher's variance.

    Parameters
    ----------
    student, teacher : sequence of Tensor
        ``[batch, sequence, hidden]`` of each layer that counts.
    mask : Tensor | None
        ``[batch, sequence]``, 0 where there is padding.
    """
    losses = []
    for ours, theirs in zip(student, teacher, strict=True):
        ours, theirs = ours.float(), theirs.detach().float()
        if mask is not None:
            ours, theirs = ours[mask.bool()], theirs[mask.bool()]
        losses.append((ours - theirs).square().mean() / theirs.var())
    return torch.stack(losses).mean()


def embedding_loss(student: Any, teacher: Any) -> Any:
    """Return one minus the mean cosine of embeddings ``[batch, features]``."""
    cosines = torch.nn.functional.cosine_similarity(student.float(), teacher.detach().float())
    return 1 - cosines.mean()


def similarity_loss(student: Any, teacher: Any, others: Any = None) -> Any:
    """Return the error of similarities, relative to the variance of the teacher's.

    What search by embeddings needs is that similarities stay, not the embeddings themselves.

    Parameters
    ----------
    student, teacher : Tensor
        Embeddings ``[batch, features]`` of the same inputs.
    others : Tensor | None
        The teacher's embeddings ``[count, features]`` of other inputs, a thousand or more, that
        both are compared with. Without, the batch's are compared with each other, and small
        batches make gradients that are mostly noise.
    """
    normalize = torch.nn.functional.normalize
    ours, theirs = (normalize(x.float(), dim=-1) for x in (student, teacher.detach()))
    if others is None:
        pairs = torch.triu_indices(len(ours), len(ours), 1)
        ours, theirs = ((x @ x.T)[pairs[0], pairs[1]] for x in (ours, theirs))
    else:
        others = normalize(others.detach().float(), dim=-1)
        ours, theirs = (x @ others.T for x in (ours, theirs))
    return (ours - theirs).square().mean() / theirs.var()
