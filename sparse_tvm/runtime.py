"""Load compiled models and run them on NumPy arrays; needs neither ``tvm`` nor its compiler."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, cast

import numpy as np

from sparse_tvm.artifact import (
    check_content,
    copy_content,
    manifest_of,
    map_content,
    open_artifact,
)
from sparse_tvm.collection import without_collection
from sparse_tvm.cpu import usable_cores
from sparse_tvm.devices import Device, Resident, open_device
from sparse_tvm.errors import ArtifactError, InputError, OptionError
from sparse_tvm.repeat import Repeat, Signature, Straight, matching, signature_of
from sparse_tvm.spec import LARGEST_SIZE, TensorSpec, multiples_of, size_of, symbols_of
from sparse_tvm.staging import StagedInput
from sparse_tvm.suitability import allow_tiles, check_machine, index_of
from sparse_tvm.turns import Turns
from sparse_tvm.vm import Library, MemoryBound, VirtualMachine, installed_version, runtime


def load(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    verify: bool = False,
    device: str | None = None,
    graphs: bool = True,
    huge_pages: bool = False,
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
    device : str | None
        Such as ``cuda:1``; by default the first of the kind that it was compiled for.
    graphs : bool
        Launch a GPU's kernels as CUDA graphs where the artifact has them: those of fixed sizes.
        The first run captures them, and keeps the memory of what lies between kernels.
    huge_pages : bool
        Read all weights into memory of this process, in pages of 2 MiB where the system has them
        (Linux, unless `transparent_hugepage` is `never`). Runs of few tokens, whose time it is to
        go through the weights, are up to 1.4 times as fast; processes no longer share them.

    Raises
    ------
    ArtifactError
        When the file is missing, not ours, truncated, damaged, of another format, or needs CPU
        features that this machine lacks. No code of the artifact has run then.
    DeviceError
        When there is no such device here, or what drives it is missing.
    OptionError
        When `threads` is not positive, or the artifact is for another kind of device.
    """
    with without_collection(), open_artifact(path) as file:
        manifest = manifest_of(file)
        check_machine(path, manifest["target"])
        allow_tiles(path, manifest)
        count = threads if threads is not None else manifest.get("threads") or usable_cores()
        if count < 1:
            raise OptionError(f"threads must be at least 1, not {count}")
        index = index_of(path, device, manifest["device"])
        content = copy_content(file) if huge_pages else map_content(file)
        check_content(content, manifest, path, everything=verify)
        opened = open_device(manifest["device"], runtime(), index)
        opened.check(manifest["target"])
        count = count if opened.is_host else 1
        try:
            with opened.submitting():
                machine = VirtualMachine(Library.of(file.fileno()), count, opened)
        except Exception as error:  # TVM raises whatever fits: a wrong version, a missing symbol
            reason = str(error).partition("\n")[0]
            raise ArtifactError(
                f"cannot load the code of {path}: {reason}",
                hint=f"it was compiled with TVM {manifest['versions']['tvm']}, installed is "
                f"{installed_version()}; compile the model again",
            ) from error
        if not graphs:
            machine.without_graphs("not wanted")
        with opened.submitting():
            return Model(Path(path), manifest, machine, content, opened, count)


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
        How many threads of the CPU a run uses.
    device : str
        Where it runs: ``cpu``, ``cuda:0``.
    hardware : str | None
        What that is, by the driver; None for the CPU.
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
        self.device, self.hardware = str(device), device.hardware()
        self._staged = [StagedInput(spec, device) for spec in self.inputs]
        self._names = [spec.name for spec in self.inputs]
        self._output_names = [spec.name for spec in self.outputs]
        self._limits = _limits(self.inputs, self.bounds)
        self._memory = MemoryBound()
        self._turns = Turns.of(manifest, self.inputs, threads) if device.is_host else None
        self._mapped = mapped
        weights = _weights(mapped, manifest["weights"], device)
        self._weights = device.tvm_ffi.convert(weights)
        self._last = () if machine.bind(weights) else (self._weights,)
        self._straight: Straight | None = None
        if device.is_host and (straight := machine.straight()) is not None:
            function, constants = straight
            self._straight = Straight(function, [*weights, *constants], device)
        self._own: set[int] | None = None
        self._signature: Signature | None = None
        self._repeat: Repeat | None = None

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

    @property
    def graphs(self) -> str:
        """How a GPU's kernels are launched: ``graphs``, or why it is one by one."""
        if self._machine.has_graphs:
            return "graphs"
        return self._machine.refused or "the program has none: its sizes are open, or it is small"

    def close(self) -> None:
        """Give the memory of weights, inputs and graphs back. No run may follow."""
        if not self._closed:
            self._machine.call(self._release)

    def _release(self) -> None:
        self._closed = True
        with self._device.submitting():
            self._weights, self._last, self._staged = None, (), []
            self._signature = self._repeat = self._straight = None
            self._mapped = np.empty(0, np.uint8)
            self._machine.close()
            self._device.close()

    def run(
        self,
        *inputs: Any,
        into: Callable[[Any], Any] | None = None,
        stream: Any = None,
        on_device: bool | None = None,
    ) -> dict[str, Any]:
        """Run the model once.

        Parameters
        ----------
        inputs : Mapping[str, array] | arrays
            One array per input, by name or in the order of :attr:`inputs`, of exactly the dtype
            and shape there; any alignment, strides and byte order. NumPy's, or of whatever else
            speaks DLPack, such as PyTorch. Lists of Python numbers take the input's dtype. On a
            GPU, contiguous tensors that lie there already are read where they are.
        into : Callable[[Any], Any] | None
            What outputs are handed to, such as ``torch.from_dlpack``, which copies nothing; they
            are NumPy's arrays by default.
        stream : int | torch.cuda.Stream | None
            A GPU's stream to run in, as a ``cudaStream_t`` or an object that has one. Where inputs
            and outputs are on the GPU, a run with a stream returns when it is submitted; every
            other run returns when it is done. By default the model's device has a stream for it.
        on_device : bool | None
            Whether outputs stay on the GPU, as tensors that speak DLPack; by default they do if an
            input lies there.

        Returns
        -------
        dict[str, np.ndarray | tensor]
            Outputs by name, in the model's order. They belong to the caller.

        Raises
        ------
        InputError
            When an input is missing, unknown, of another dtype or shape, or on another device, or
            the model closed.
        OptionError
            When `stream` is none.
        DeviceError
            When the device fails.
        """
        handle = None if stream is None else self._device.stream_of(stream)
        signature = self._signature
        values = None if signature is None else self._known(inputs, signature)
        if values is None:
            signature, values = None, self._checked(self._named(inputs), handle)
        if self._device.is_host:
            results = self._machine.call(self._run_on_host, values, signature)
            return self._by_name(results, into)
        resident = [isinstance(value, Resident) for value in values]
        stays = (any(resident) if on_device is None else on_device) and not self._device.is_host
        returns = stays and handle is not None and all(resident)
        results = self._machine.call(
            self._execute, self._machine.main, values, handle, stays, not returns
        )
        return self._by_name(results, into)

    def _by_name(self, results: list[Any], into: Callable[[Any], Any] | None) -> dict[str, Any]:
        if into is not None:
            results = [into(result) for result in results]
        return dict(zip(self._output_names, results, strict=True))

    def trace(self, inputs: Mapping[str, Any], runs: int = 1) -> list[list[Call]]:
        """Run the model and time every function that the program calls.

        Returns
        -------
        list[list[Call]]
            Per run, in the order of the calls. Observing a call adds a microsecond to it.
        """
        values = self._checked(inputs)
        calls: list[Call] = []
        started = 0.0

        def observe(_function: Any, name: str, is_before: bool, _result: Any, *args: Any) -> None:
            nonlocal started
            self._device.wait()
            now = perf_counter()
            if not is_before:
                tensors = [arg for arg in args if hasattr(arg, "shape")]
                shapes = tuple(tuple(tensor.shape) for tensor in tensors)
                dtypes = tuple(str(tensor.dtype) for tensor in tensors)
                calls.append(Call(name, now - started, shapes, dtypes))
            started = perf_counter()

        with self._device.submitting():
            main = self._machine.instrumented(observe)
        traces = []
        for _ in range(runs):
            calls.clear()
            self._machine.call(self._execute, main, values)
            traces.append(calls.copy())
        return traces

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise InputError(f"{self.path.name} is closed", hint="load it again")

    def _named(self, inputs: Sequence[Any]) -> Mapping[str, Any]:
        """Return inputs by name that were given so, or in the model's order."""
        if len(inputs) == 1 and isinstance(inputs[0], (dict, Mapping)):
            return cast("Mapping[str, Any]", inputs[0])
        if len(inputs) != len(self.inputs):
            given = ", ".join(type(value).__name__ for value in inputs) or "nothing"
            raise InputError(
                f"{self.path.name}: the inputs are {given}, neither arrays by name nor one for "
                f"each of {len(self.inputs)}",
                hint=f"the model takes {', '.join(map(str, self.inputs))}",
            )
        return {spec.name: value for spec, value in zip(self.inputs, inputs, strict=True)}

    def _known(self, inputs: Sequence[Any], signature: Signature) -> Sequence[Any] | None:
        """Arrays, by name or in order, if they are of a signature that was found right."""
        if len(inputs) == 1 and type(inputs[0]) is dict and len(inputs[0]) == len(signature):
            inputs = tuple(map(inputs[0].get, self._names))
        return inputs if matching(signature, inputs) else None

    def _checked(self, inputs: Mapping[str, Any], stream: int | None = None) -> list[Any]:
        """Return the inputs as arrays, or as residents of the device, in the model's order."""
        self._refuse_if_closed()
        if len(inputs) != len(self._names) or not all(map(inputs.__contains__, self._names)):
            raise self._wrong_names(inputs)
        sizes: dict[str, int] = {}
        values = [
            staged.checked(inputs[name], sizes, stream)
            for name, staged in zip(self._names, self._staged, strict=True)
        ]
        if sizes:
            self._check_sizes(sizes)
        if all(spec.only is None for spec in self.inputs):
            self._signature = signature_of(values)
        return values

    def _check_sizes(self, sizes: Mapping[str, int]) -> None:
        """Refuse sizes out of bounds, and expressions of symbols that do not add up."""
        for dimension, size in sizes.items():
            low, high, multiple, others = self._limits[dimension]
            if not low <= size <= high:
                allowed = f"{low} or more" if high == LARGEST_SIZE else f"{low} to {high}"
                raise InputError(f"{self.path.name}: {dimension} is {size}, but must be {allowed}")
            if size % multiple:
                raise InputError(
                    f"{self.path.name}: {dimension} is {size}, but must be a multiple of {multiple}"
                )
            if others and any(symbol in sizes for symbol in others):
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

    def _execute(
        self,
        main: Any,
        values: Sequence[Any],
        stream: int | None = None,
        stays: bool = False,
        waits: bool = True,
    ) -> list[Any]:
        """Run `main`; the machine sees to it that nothing else touches the staged inputs."""
        self._refuse_if_closed()  # it may have been while this run waited for its turn
        residents = [value for value in values if isinstance(value, Resident)]
        after = {value.producer for value in residents if value.producer is not None}
        with self._device.submitting(stream, after):
            if self._limits:
                self._bound_memory(
                    tuple(v.tensor.shape if isinstance(v, Resident) else v.shape for v in values)
                )
            tensors = [staged.fill(v) for staged, v in zip(self._staged, values, strict=True)]
            results = self._results(main, tensors)
            owned = self._kept(main, results, tensors) if stays else self._copied(results, values)
        if waits:
            self._device.wait()
        return owned

    def _run_on_host(
        self, values: Sequence[np.ndarray], signature: Signature | None = None
    ) -> list[np.ndarray]:
        """The same where there are neither residents nor streams: small models live by it."""
        repeat = self._repeat
        if repeat is not None and repeat.signature is signature:
            return self._again(repeat, values)
        self._refuse_if_closed()
        images = self._turns.images(values) if self._turns is not None else 0
        if self._turns is None or not images:
            tensors = self._filled(values)
            results = self._turn(values, tensors)
            self._repeat = self._repeat_of(values, tensors, results, signature)
            return results
        parts = self._turns.parts(values, images)
        turns = [self._turn(part, self._filled(part)) for part in parts]
        return [np.concatenate(results) for results in zip(*turns, strict=True)]

    def _again(self, repeat: Repeat, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        arguments = repeat.arguments
        if repeat.in_place:
            arguments = arguments.copy()  # or the last run's array would live until the next one
        for i, (value, memory) in enumerate(zip(values, repeat.memory, strict=True)):
            if memory is None:
                arguments[i] = self._staged[i].fill(value)
            else:
                memory[...] = value
        if repeat.outputs is None:
            results = self._results(repeat.function, arguments)
            return self._device.copy_out(results, self._shared)
        repeat.function(*arguments)
        return [output.copy() for output in repeat.outputs]

    def _repeat_of(
        self,
        values: Sequence[np.ndarray],
        tensors: Sequence[Any],
        results: Sequence[np.ndarray],
        signature: Signature | None,
    ) -> Repeat | None:
        """How to run once more what has just run; the machine only if all inputs are copied."""
        if signature is None:
            return None
        memory = [
            staged.buffer.host if self._device.copies(value) else None
            for staged, value in zip(self._staged, values, strict=True)
        ]
        if self._straight is not None:
            repeat = self._straight.repeat(signature, memory, tensors, results)
            if repeat is not None:
                return repeat
        if any(each is None for each in memory):
            return None
        return Repeat(signature, memory, self._machine.main, list(tensors))

    def _turn(self, values: Sequence[np.ndarray], tensors: Sequence[Any]) -> list[np.ndarray]:
        """Results for a batch, or a part of one, that these tensors hold."""
        return self._copied(self._results(self._machine.main, tensors), values)

    def _filled(self, values: Sequence[np.ndarray]) -> Sequence[Any]:
        """Inputs as tensors, once it is known that there is memory for the run."""
        if self._limits:
            shapes = tuple([value.shape for value in values])
            if shapes not in self._memory:
                self._bound_memory(shapes)
        return [staged.fill(v) for staged, v in zip(self._staged, values, strict=True)]

    def _bound_memory(self, shapes: tuple[tuple[int, ...], ...]) -> None:
        self._memory.before_run(shapes, lambda: sum(map(StagedInput.nbytes, self._staged, shapes)))

    def _results(self, main: Any, tensors: Sequence[Any]) -> Sequence[Any]:
        result = main(*tensors, *self._last)
        return [result] if hasattr(result, "__dlpack__") else result

    def _copied(self, results: Sequence[Any], values: Sequence[Any]) -> list[np.ndarray]:
        given = [v for v in values if isinstance(v, np.ndarray)]  # read in place, maybe
        return self._device.copy_out(results, lambda: [*self._shared(), *given])

    def _shared(self) -> list[np.ndarray]:
        """Memory that outputs may lie in, and that is not theirs."""
        staged = [s.buffer.host for s in self._staged if s.buffer.host is not None]
        return [self._mapped, *staged]

    def _kept(self, main: Any, results: Sequence[Any], tensors: Sequence[Any]) -> list[Any]:
        """Results on the device that belong to the caller: neither inputs, weights nor constants.

        TVM does not tell which are constants of the program. Two runs whose results all live share
        them, so the first of these runs is made twice.
        """
        taken = _addresses(tensors)
        if self._own is None:
            again = self._results(main, tensors)
            constants = (_addresses(results) & _addresses(again)) - taken
            self._own = _addresses(self._weights) | constants
        owned = []
        for result in results:
            address = result.data_ptr()
            if address in taken or address in self._own:
                result = self._device.duplicate(result)
            taken.add(address)
            owned.append(result)
        return owned


def _limits(
    inputs: Sequence[TensorSpec], bounds: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[int, int, int, tuple[str, ...]]]:
    """Of each dimension that is open: bounds, what it is a multiple of, symbols it is made of."""
    dimensions = {dim for spec in inputs for dim in spec.shape if isinstance(dim, str)}
    multiples = multiples_of(inputs)
    return {
        dim: (
            *bounds.get(dim, (1, LARGEST_SIZE)),
            multiples.get(dim, 1),
            tuple(symbol for symbol in symbols_of(dim) if symbol != dim),
        )
        for dim in dimensions
    }


def _addresses(tensors: Sequence[Any]) -> set[int]:
    return {tensor.data_ptr() for tensor in tensors}


def _weights(mapped: np.ndarray, entries: Sequence[Mapping[str, Any]], device: Device) -> list[Any]:
    """Return the weights, the program's last arguments: tensors over the mapped file."""
    tensors = []
    for entry in entries:
        raw = mapped[entry["offset"] : entry["offset"] + entry["nbytes"]]
        weight = raw.view(np.dtype(entry["dtype"])).reshape(entry["shape"])
        tensors.append(device.constant(weight))
    return tensors
