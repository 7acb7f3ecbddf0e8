"""Every error a user of sparse-tvm can cause, each with what is wrong and what to do.

The command line prints ``str(error)`` as one line (two with a hint) and exits with
``error.exit_code``; Python callers catch :class:`SparseTvmError` or a subclass.
"""

from __future__ import annotations


class SparseTvmError(Exception):
    """Base of all errors raised on purpose by this package.

    Parameters
    ----------
    message : str
        What is wrong: names the file, the layer and the offending value.
    hint : str | None
        The remedy, in one sentence.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ModelError(SparseTvmError):
    """The model file cannot be read, or holds something that cannot be compiled."""


class OptionError(SparseTvmError):
    """An option has a value that is unknown or does not fit the model."""

    exit_code = 2


class TargetError(OptionError):
    """The target is unknown, or this machine lacks what it needs."""


class ArtifactError(SparseTvmError):
    """A ``.so`` is not ours, is damaged, or does not fit this machine or version."""


class DeviceError(ArtifactError):
    """The device that an artifact is for, or what drives it, is not there."""


class InputError(SparseTvmError):
    """An input given to a compiled model has a wrong name, dtype or shape."""


class OutputError(SparseTvmError):
    """A result cannot be written (directory missing, not writable, disk full)."""


class ThrottledError(SparseTvmError):
    """A machine is too hot, or gets too little power, to measure on it."""


class VerificationError(SparseTvmError):
    """The compiled model's outputs differ from the reference beyond the tolerance."""

    exit_code = 3


class BuildError(SparseTvmError):
    """Code generation or linking failed."""
