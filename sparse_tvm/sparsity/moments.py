"""Second moments of a layer's inputs over calibration data, gathered chunk by chunk."""

from __future__ import annotations

import numpy as np

from sparse_tvm.errors import InputError
from sparse_tvm.sparsity.obs import Problem

DAMPING = 0.01
"""Added to the Hessian's diagonal, as a share of its mean: what SparseGPT uses."""

FEWEST_ROWS = 4
"""Second moments of `K` inputs take at least ``K`` / this many rows to mean anything."""

_TINY = 1e-30


class Moments:
    """Means and products of inputs, as the unpruned model makes them and as the pruned one does.

    Parameters
    ----------
    features : int
        ``K``, the layer's inputs.

    Attributes
    ----------
    count : int
        Rows seen.
    """

    def __init__(self, features: int) -> None:
        self.count = 0
        self._dense_sum = np.zeros(features)
        self._pruned_sum = np.zeros(features)
        self._dense = np.zeros((features, features))
        self._cross = np.zeros((features, features))
        self._pruned = np.zeros((features, features))

    def add(self, dense: np.ndarray, pruned: np.ndarray) -> None:
        """Count the rows of two float32 ``[rows, K]`` matrices, of the same samples."""
        self.count += len(dense)
        self._dense_sum += dense.sum(axis=0, dtype=np.float64)
        self._pruned_sum += pruned.sum(axis=0, dtype=np.float64)
        self._dense += dense.T @ dense
        self._cross += dense.T @ pruned
        self._pruned += pruned.T @ pruned

    def check(self, layer: str, samples: int) -> None:
        """Refuse moments that mean nothing, of a layer and from so many samples.

        Raises
        ------
        InputError
            When the rows are too few, or not finite.
        """
        features = len(self._dense_sum)
        if self.count * FEWEST_ROWS < features:
            needed = -(-features // FEWEST_ROWS)
            more = -(-samples * needed // max(self.count, 1))
            raise InputError(
                f"{samples} calibration samples are too few: layer {layer} sees {self.count} rows "
                f"of its {features} inputs, and needs {needed}",
                hint=f"give at least {more} samples, better {FEWEST_ROWS * more}",
            )
        if not np.isfinite(self.input_norms).all():
            raise InputError(
                f"the inputs of layer {layer} are not finite on the calibration data",
                hint="is it the data that the model was made for?",
            )

    @property
    def input_norms(self) -> np.ndarray:
        """The root mean square of each input in the pruned model: float64 ``[K]``."""
        norms: np.ndarray = np.sqrt(np.diagonal(self._pruned) / max(self.count, 1))
        return norms

    def problem(self, w: np.ndarray, *, centred: bool) -> Problem:
        """Return the least squares problem of giving the unpruned layer's outputs.

        The layer's inputs are the pruned model's and its outputs are to be the unpruned model's,
        so that it makes up for errors of the layers before it, too. The damping pulls towards the
        unpruned weight rather than towards zero.

        Parameters
        ----------
        w : np.ndarray
            float32 ``[N, K]``, unpruned.
        centred : bool
            Whether a bias takes up the difference of the means.
        """
        cross, pruned = self._cross / self.count, self._pruned / self.count
        if centred:
            dense_mean, pruned_mean = self._means()
            cross = cross - np.outer(dense_mean, pruned_mean)
            pruned = pruned - np.outer(pruned_mean, pruned_mean)
        mean = float(np.diagonal(pruned).mean())
        damping = DAMPING * mean if mean > _TINY else 1.0  # inputs that are always the same
        # Where inputs hardly vary, centring leaves rounding, which takes more to outweigh.
        while not _positive_definite(pruned, damping):
            damping *= 10
        index = np.arange(len(pruned))
        pruned[index, index] += damping
        cross[index, index] += damping
        right = w.astype(np.float64) @ cross
        return Problem(pruned.astype(np.float32), right.astype(np.float32))

    def bias_change(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Return what to add to the bias, so that mean outputs stay: float32 ``[N]``."""
        dense_mean, pruned_mean = self._means()
        change: np.ndarray = (before @ dense_mean - after @ pruned_mean).astype(np.float32)
        return change

    def error(self, before: np.ndarray, after: np.ndarray, *, centred: bool) -> float:
        """Return the squared error of the layer's outputs, relative to their variance."""
        dense_mean, pruned_mean = self._means()
        dense = self._dense / self.count - np.outer(dense_mean, dense_mean)
        cross = self._cross / self.count - np.outer(dense_mean, pruned_mean)
        pruned = self._pruned / self.count - np.outer(pruned_mean, pruned_mean)
        energy = float(np.sum((before @ dense) * before))
        error = (
            energy
            - 2 * float(np.sum((before @ cross) * after))
            + float(np.sum((after @ pruned) * after))
        )
        if not centred:
            error += float(np.sum(np.square(before @ dense_mean - after @ pruned_mean)))
        return max(error, 0.0) / energy if energy else 0.0

    def _means(self) -> tuple[np.ndarray, np.ndarray]:
        return self._dense_sum / self.count, self._pruned_sum / self.count


def _positive_definite(matrix: np.ndarray, damping: float) -> bool:
    damped = matrix.astype(np.float32)
    damped[np.diag_indices(len(damped))] += np.float32(damping)
    try:
        np.linalg.cholesky(damped)
    except np.linalg.LinAlgError:
        return False
    return True
