"""The compiler's passes in order: the graph's own, then those of the backend."""

from __future__ import annotations

from collections.abc import Sequence

from sparse_tvm.backends.base import Backend
from sparse_tvm.passes.dense_to_sparse import dense_to_sparse
from sparse_tvm.passes.fc_transpose import fc_transpose
from sparse_tvm.passes.fold_batch_norm import fold_batch_norm
from sparse_tvm.passes.fold_scales import fold_scales
from sparse_tvm.passes.fuse_activations import fuse_activations
from sparse_tvm.passes.fuse_attention import fuse_attention
from sparse_tvm.passes.fuse_convolution import fuse_convolution
from sparse_tvm.passes.fuse_epilogue import fuse_epilogue
from sparse_tvm.passes.fuse_layer_norm import fuse_layer_norm
from sparse_tvm.passes.fuse_product import fuse_product
from sparse_tvm.passes.infrastructure import Phase
from sparse_tvm.passes.keep_integer_images import keep_integer_images
from sparse_tvm.passes.keep_integers import keep_integers
from sparse_tvm.passes.select_by_data import select_by_data
from sparse_tvm.passes.set_precision import set_precision
from sparse_tvm.passes.signals_to_tokens import signals_to_tokens
from sparse_tvm.passes.split_recurrent import split_recurrent
from sparse_tvm.passes.split_transposed import split_transposed


def graph_phases() -> Sequence[Phase]:
    """From the imported module to operators of ours, each with its weight's layout and why."""
    return (
        Phase(
            "canonicalise",
            (
                split_recurrent,
                select_by_data,
                split_transposed,
                fold_batch_norm,
                fc_transpose,
                fuse_activations,
                fuse_layer_norm,
                signals_to_tokens,
                fold_scales,
            ),
        ),
        Phase("fuse", (fuse_epilogue, fuse_convolution, fuse_attention, fuse_product)),
        Phase("integers", (keep_integer_images, keep_integers)),
        Phase("dense to sparse", (set_precision, dense_to_sparse)),
    )


def phases(backend: Backend) -> Sequence[Phase]:
    """From the imported module to scheduled kernels."""
    return (*graph_phases(), *backend.phases())
