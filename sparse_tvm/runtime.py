"""Load compiled models and run them on NumPy arrays; needs neither ``tvm`` nor its compiler."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from sparse_tvm.artifact import (
    check_content,
    manifest_of,
    map_content,
    open_artifact,
)
from sparse_tvm.collection import without_collection
from sparse_tvm.cpu import allow_amx, architecture, cpu_model, host_features, usable_cores
from sparse_tvm.devices import Device, open_device
from sparse_tvm.errors import ArtifactError, InputError, OptionError
from sparse_tvm.spec import LARGEST_SIZE, TensorSpec, size_of, symbols_of
from sparse_tvm.vm import Library, MemoryBound, VirtualMachine, installed_version, runtime

_OTHER_TARGET = (
    "compile it with --target native on this machine; `sparse-tvm targets` lists what runs here"
)


def load(
    path: str | os.PathLike[str], *, threads: int | None = None, verify: bool = False
) -> Model:
    """Load a compiled model.

    Its code runs with all rights of this process: load files only from where you would run a
    program from.

    Parameters
    ----------
    path : path
        What ``sparse-tvm compile`` wrote.
    threads : int | None
        Threads of this model; by default those it was compiled for, else all physical cores that
        this process may use.
    verify : bool
        Compare the whole file with its checksums, a few GB a second. By default that is done for
        manifest, code and indices, where damage could crash the process; floating-point weights
        are mapped, and read when a run needs them.

    Raises
    ------
    ArtifactError
        When the file is missing, not ours, truncated, damaged, of another format, or needs CPU
        features that this machine lacks. No code of the artifact has run then.
    OptionError
        When `threads` is not positive.
    """
    with without_collection(), open_artifact(path) as file:
        manifest = manifest_of(file)
        _check_machine(path, manifest["target"])
        _allow_tiles(path, manifest)
        count = threads if threads is not None else manifest.get("threads") or usable_cores()
        if count < 1:
            raise OptionError(f"threads must be at least 1, not {count}")
        content = map_content(file)
        check_content(content, manifest, path, everything=verify)
        device = open_device(manifest["device"], runtime())
        device.check(manifest["target"])
        try:
            machine = VirtualMachine(Library.of(file.fileno()), count, device)
        except Exception as error:  # TVM raises whatever fits: a wrong version, a missing symbol
            reason = str(error).partition("\n")[0]
            raise ArtifactError(
                f"cannot load the code of {path}: {reason}",
                hint=f"it was compiled with TVM {manifest['versions']['tvm']}, installed is "
                f"{installed_version()}; compile the model again",
            ) from error
        return Model(Path(path), manifest, machine, content, device, count)


class Call(NamedTuple):
    """One call of a function by a program: seconds, and its tensors' shapes and dtypes in order.

    A kernel's last tensor is its output.
    """

    function: str
    seconds: float
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]


class Model:
    """A compiled model, ready to run. Make one with :func:`load`.

    Safe to share between threads: runs of one model take turns.

    Attributes
    ----------
    inputs, outputs : list[TensorSpec]
        Names, dtypes and shapes, in the model's order.
    bounds : dict[str, tuple[int, int]]
        Smallest and largest size of those symbolic dimensions that are bounded.
    manifest : dict[str, Any]
        Everything the compiler noted: target, layers, formats, reasons, versions.
    threads : int
        How many threads a run uses.
    """

    def __init__(
        self,
        path: Path,
        manifest: dict[str, Any],
        machine: VirtualMachine,
        mapped: np.ndarray,
        device: Device,
        threads: int,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.threads = threads
        self.inputs = [TensorSpec.from_json(entry) for entry in manifest["inputs"]]
        self.outputs = [TensorSpec.from_json(entry) for entry in manifest["outputs"]]
        self.bounds: dict[str, tuple[int, int]] = {
            name: (low, high) for name, (low, high) in manifest.get("bounds", {}).items()
        }
        self._closed = False
        self._machine = machine
        self._device = device
        self._staged = [_Staged(spec, device) for spec in self.inputs]
        self._memory = MemoryBound()
        self._mapped = mapped
        self._weights = _weights_tuple(mapped, manifest["weights"], device)

    def __repr__(self) -> str:
        inputs = ", ".join(map(str, self.inputs))
        outputs = ", ".join(map(str, self.outputs))
        return (
            f"<sparse_tvm.Model {self.path.name}: ({inputs}) -> ({outputs}), "
            f"{self.manifest['target']['name']}, {self.threads} threads>"
        )

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the memory of weights and inputs back. No run may follow."""
        self._machine.call(self._release)

    def _release(self) -> None:
        self._closed = True
        self._weights, self._staged, self._mapped = None, [], np.empty(0, np.uint8)

    def run(self, *inputs: Any, into: Callable[[Any], Any] | None = None) -> dict[str, Any]:
        """Run the model once.

        Parameters
        ----------
        inputs : Mapping[str, array] | arrays
            One array per input, by name or in the order of :attr:`inputs`, of exactly the dtype
            and shape there; any alignment, strides and byte order. NumPy's, or of whatever else
            speaks DLPack, such as PyTorch. Lists of Python numbers take the input's dtype.
        into : Callable[[Any], Any] | None
            What outputs are handed to, such as ``torch.from_dlpack``, which copies nothing; they
            are NumPy's arrays by default.

        Returns
        -------
        dict[str, np.ndarray]
            Outputs by name, in the model's order. They belong to the caller.

        Raises
        ------
        InputError
            When an input is missing, unknown, or of another dtype or shape, or the model closed.
        """
        arrays = self._checked(self._named(inputs))
        results = self._machine.call(self._execute, self._machine.main, arrays)
        if into is not None:
            results = [into(result) for result in results]
        return {spec.name: result for spec, result in zip(self.outputs, results, strict=True)}

    def trace(self, inputs: Mapping[str, Any], runs: int = 1) -> list[list[Call]]:
        """Run the model and time every function that the program calls.

        Returns
        -------
        list[list[Call]]
            Per run, in the order of the calls. Observing a call adds a microsecond to it.
        """
        arrays = self._checked(inputs)
        calls: list[Call] = []
        started = 0.0

        def observe(_function: Any, name: str, is_before: bool, _result: Any, *args: Any) -> None:
            nonlocal started
            now = perf_counter()
            if not is_before:
                tensors = [arg for arg in args if hasattr(arg, "shape")]
                shapes = tuple(tuple(tensor.shape) for tensor in tensors)
                dtypes = tuple(str(tensor.dtype) for tensor in tensors)
                calls.append(Call(name, now - started, shapes, dtypes))
            started = perf_counter()

        main = self._machine.instrumented(observe)
        traces = []
        for _ in range(runs):
            calls.clear()
            self._machine.call(self._execute, main, arrays)
            traces.append(calls.copy())
        return traces

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise InputError(f"{self.path.name} is closed", hint="load it again")

    def _named(self, inputs: Sequence[Any]) -> Mapping[str, Any]:
        """Return inputs by name that were given so, or in the model's order."""
        if len(inputs) == 1 and isinstance(inputs[0], Mapping):
            return inputs[0]
        if len(inputs) != len(self.inputs):
            given = ", ".join(type(value).__name__ for value in inputs) or "nothing"
            raise InputError(
                f"{self.path.name}: the inputs are {given}, neither arrays by name nor one for "
                f"each of {len(self.inputs)}",
                hint=f"the model takes {', '.join(map(str, self.inputs))}",
            )
        return {spec.name: value for spec, value in zip(self.inputs, inputs, strict=True)}

    def _checked(self, inputs: Mapping[str, Any]) -> list[np.ndarray]:
        """Return the inputs as arrays in the model's order."""
        self._refuse_if_closed()
        if len(inputs) != len(self._staged) or any(
            staged.spec.name not in inputs for staged in self._staged
        ):
            raise self._wrong_names(inputs)
        sizes: dict[str, int] = {}
        arrays = [staged.checked(inputs[staged.spec.name], sizes) for staged in self._staged]
        self._check_sizes(sizes)
        return arrays

    def _check_sizes(self, sizes: Mapping[str, int]) -> None:
        """Refuse sizes out of bounds, and expressions of symbols that do not add up."""
        for dimension, size in sizes.items():
            low, high = self.bounds.get(dimension, (1, LARGEST_SIZE))
            if not low <= size <= high:
                allowed = f"{low} or more" if high == LARGEST_SIZE else f"{low} to {high}"
                raise InputError(f"{self.path.name}: {dimension} is {size}, but must be {allowed}")
            if any(s != dimension and s in sizes for s in symbols_of(dimension)):
                expected = size_of(dimension, {s: sizes[s] for s in symbols_of(dimension)})
                if size != expected:
                    raise InputError(f"{self.path.name}: {dimension} is {size}, not {expected}")

    def _wrong_names(self, inputs: Mapping[str, Any]) -> InputError:
        names = [spec.name for spec in self.inputs]
        missing = [repr(name) for name in names if name not in inputs]
        unknown = [repr(name) for name in inputs if name not in names]
        parts = [
            f"{what} input {', '.join(found)}"
            for what, found in (("missing", missing), ("unknown", unknown))
            if found
        ]
        return InputError(
            f"{self.path.name}: {' and '.join(parts)}",
            hint=f"the model takes {', '.join(map(str, self.inputs))}",
        )

    def _execute(self, main: Any, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run `main`; the machine sees to it that nothing else touches the staged inputs."""
        self._refuse_if_closed()  # it may have been while this run waited for its turn
        shapes = tuple(array.shape for array in arrays)
        self._memory.before_run(shapes, sum(array.nbytes for array in arrays))
        tensors = [staged.fill(array) for staged, array in zip(self._staged, arrays, strict=True)]
        result = main(*tensors, self._weights)
        self._device.wait()
        results = [result] if hasattr(result, "__dlpack__") else result
        staged_memory = [s.buffer.host for s in self._staged if s.buffer.host is not None]
        return self._device.copy_out(results, [self._mapped, *staged_memory])


class _Staged:
    """Memory of the device for one input, which takes arrays of any layout."""

    def __init__(self, spec: TensorSpec, device: Device) -> None:
        self.spec, self._device = spec, device
        self._dtype = np.dtype(spec.dtype)
        self._symbolic = any(isinstance(dim, str) for dim in spec.shape)
        shape = tuple(0 if isinstance(dim, str) else dim for dim in spec.shape)
        self.buffer = device.allocate(shape, self._dtype)

    def checked(self, value: Any, sizes: dict[str, int]) -> np.ndarray:
        """Return `value` as an array of this input's dtype and shape.

        `sizes` holds what the symbolic dimensions stand for, and learns from this shape.
        """
        array = value if isinstance(value, np.ndarray) else self._as_array(value)
        if array.dtype != self._dtype and array.dtype.newbyteorder("=") != self._dtype:
            raise self._mismatch(
                f"has dtype {array.dtype}, expected {self._dtype}",
                hint=f"convert it with .astype({self._dtype.name!r})",
            )
        if self._symbolic:
            self._check_symbolic(array.shape, sizes)
        elif array.shape != self.spec.shape:
            raise self._wrong_shape(array.shape)
        return array

    def fill(self, array: np.ndarray) -> Any:
        """Copy `array` into the buffer and return the buffer as a tensor."""
        if array.shape != self.buffer.shape:
            self.buffer = self._device.allocate(array.shape, self._dtype)
        self._device.copy_in(array, self.buffer)
        return self.buffer.tensor

    def _as_array(self, value: Any) -> np.ndarray:
        # Ragged lists, and tensors of another device or that need gradients, are refused.
        try:
            array = np.from_dlpack(value) if _speaks_dlpack(value) else np.asarray(value)
        except (BufferError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise self._mismatch(f"is not an array: {error}") from error
        is_plain = isinstance(value, (list, tuple, bool, int, float))
        if is_plain and np.can_cast(array.dtype, self._dtype, "same_kind"):
            return array.astype(self._dtype)
        return array

    def _check_symbolic(self, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
        if len(shape) != len(self.spec.shape):
            raise self._wrong_shape(shape)
        for size, dim in zip(shape, self.spec.shape, strict=True):
            if isinstance(dim, str) and sizes.setdefault(dim, size) != size:
                raise self._wrong_shape(shape, f" where {dim} is {sizes[dim]} in another place")
            if not isinstance(dim, str) and size != dim:
                raise self._wrong_shape(shape)

    def _wrong_shape(self, shape: tuple[int, ...], why: str = "") -> InputError:
        found, expected = (", ".join(map(str, dims)) for dims in (shape, self.spec.shape))
        return self._mismatch(f"has shape [{found}], expected [{expected}]{why}")

    def _mismatch(self, problem: str, hint: str | None = None) -> InputError:
        return InputError(f"input {self.spec.name!r} {problem}", hint=hint)


def _speaks_dlpack(value: Any) -> bool:
    return hasattr(value, "__dlpack__") and not isinstance(value, np.generic)


def _check_machine(path: str | os.PathLike[str], target: Mapping[str, Any]) -> None:
    compiled_for = target["triple"].split("-")[0]
    if compiled_for != architecture():
        raise ArtifactError(
            f"{path} was compiled for {compiled_for}; this machine is {architecture()}",
            hint=_OTHER_TARGET,
        )
    missing = sorted(set(target["features"]) - host_features())
    if missing:
        raise ArtifactError(
            f"{path} was compiled for {target['name']} and needs CPU features that {cpu_model()} "
            f"lacks: {', '.join(missing)}",
            hint=_OTHER_TARGET,
        )


def _allow_tiles(path: str | os.PathLike[str], manifest: Mapping[str, Any]) -> None:
    """Ask Linux for AMX's tiles if a kernel uses them."""
    families = {kernel.get("family") for kernel in manifest["kernels"].values()}
    if families & {"tiles", "tile_attention"} and not allow_amx():
        raise ArtifactError(
            f"{path} multiplies with AMX, which Linux does not let this process use",
            hint="compile with --precision fp32, or with --precision int8 --target avx512-vnni",
        )


def _weights_tuple(mapped: np.ndarray, entries: Sequence[Mapping[str, Any]], device: Device) -> Any:
    """Return the weights as the program's last argument: tensors over the mapped file."""
    tensors = []
    for entry in entries:
        raw = mapped[entry["offset"] : entry["offset"] + entry["nbytes"]]
        weight = raw.view(np.dtype(entry["dtype"])).reshape(entry["shape"])
        tensors.append(device.constant(weight))
    return device.tvm_ffi.convert(tensors)
