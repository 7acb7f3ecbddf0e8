"""A ``.pt2`` of ``torch.export``, an ``nn.Module``, and (if asked) its pickle."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from sparse_tvm.collection import without_collection
from sparse_tvm.errors import ModelError, OptionError
from sparse_tvm.files import replacing
from sparse_tvm.frontends.input_shapes import Dimension
from sparse_tvm.frontends.onnx.in_memory import InMemoryTensors
from sparse_tvm.frontends.onnx.read import one_line
from sparse_tvm.frontends.source import Source, SourceOptions, require
from sparse_tvm.frontends.torch.decompose import copied_graph, parts_of
from sparse_tvm.frontends.torch.export import quiet, to_onnx
from sparse_tvm.frontends.torch.masks import fold_masks
from sparse_tvm.frontends.torch.pickles import check_archive, load_pickle
from sparse_tvm.frontends.torch.quantised import import_operators
from sparse_tvm.reference import ReferenceModel, cannot_run
from sparse_tvm.sparsity.sources import torch_layout, torch_to_dense

_EXAMPLE_SIZE = 2  # of a dimension that stays symbolic


class ProgramSource(Source):
    """A ``.pt2`` file."""

    kind = "PyTorch exported program"

    def __init__(self, path: Path, options: SourceOptions) -> None:
        super().__init__(str(path), path)
        self._allow_pickle = options.allow_pickle
        self._arrays = InMemoryTensors()

    @cached_property
    def program(self) -> Any:
        """The ``torch.export.ExportedProgram``."""
        torch = require("torch", "torch", self.name)
        assert self.path is not None
        if not self._allow_pickle:
            check_archive(self.path)
        if self._mentions(b"transformers.modeling_outputs"):  # alone knows what it returns
            require("transformers.modeling_outputs", "huggingface", self.name)
        if self._mentions(b"quantized_decomposed"):
            import_operators()
        try:
            with quiet(), without_collection():
                return torch.export.load(str(self.path))
        except Exception as error:
            raise ModelError(
                f"{self.name}: torch {torch.__version__} cannot load it: {one_line(error)}",
                hint="export it again with this version of torch",
            ) from error

    def _mentions(self, name: bytes) -> bool:
        """Whether the program's graph needs what another package defines."""
        assert self.path is not None
        with zipfile.ZipFile(self.path) as archive:
            graphs = [path for path in archive.namelist() if path.endswith("models/model.json")]
            return any(name in archive.read(graph) for graph in graphs)

    def as_onnx(self) -> onnx.ModelProto:
        """See `Source.as_onnx`."""
        return self._imported[0]

    def origins(self) -> Mapping[str, str]:
        """See `Source.origins`."""
        return self._imported[1]

    @cached_property
    def _imported(self) -> tuple[onnx.ModelProto, dict[str, str]]:
        names = output_names(self.program)
        model = to_onnx(self.program, self.name, names, {}, self._arrays)
        return model, fold_masks(model)

    def reference(self, threads: int) -> ReferenceModel:
        """See `Source.reference`."""
        return TorchReference(self.program, self.program.module(), threads)

    def write_pruned(self, weights: Mapping[str, np.ndarray], output: Path) -> None:
        """Write a ``.pt2`` with other values of the weights."""
        write_program(self.program, weights, output)


class ModuleSource(Source):
    """An ``nn.Module`` with example inputs; its sparse tensors stay as they are."""

    kind = "PyTorch module"

    def __init__(self, module: Any, options: SourceOptions, path: Path | None = None) -> None:
        super().__init__(str(path) if path else type(module).__name__, path)
        self._module = module
        self._options = options
        self._arrays = InMemoryTensors()

    @classmethod
    def from_pickle(cls, path: Path, options: SourceOptions) -> ModuleSource:
        """Open a module that was saved whole, if `options` allow it."""
        return cls(load_pickle(path, allowed=options.allow_pickle), options, path)

    @cached_property
    def program(self) -> Any:
        """The ``torch.export.ExportedProgram``, with placeholders for sparse weights."""
        args, kwargs = self._examples()
        with _replaced(self._module, _traceable):
            return export(self._module, args, kwargs, dynamic_shapes=self._options.dynamic_shapes)

    def _examples(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        examples = self._options.example_inputs
        if examples is None and self._options.input_shapes:
            import torch

            shapes = self._options.input_shapes
            examples = {name: torch.zeros(_sizes(shape)) for name, shape in shapes.items()}
        if examples is None:
            raise OptionError(
                f"{self.name}: an nn.Module needs example inputs to be traced with",
                hint="compile(module, output, example_inputs=(tensor, ...)), or a dictionary of "
                "keyword arguments; for a file, --input-shape NAME:DIMS",
            )
        if isinstance(examples, Mapping):
            return (), dict(examples)
        return (tuple(examples) if isinstance(examples, Sequence) else (examples,)), {}

    def as_onnx(self) -> onnx.ModelProto:
        """See `Source.as_onnx`."""
        return self._imported[0]

    def origins(self) -> Mapping[str, str]:
        """See `Source.origins`."""
        return self._imported[1]

    @cached_property
    def _imported(self) -> tuple[onnx.ModelProto, dict[str, str]]:
        sparse = dict(sparse_weights(self._module))
        weights: dict[str, Callable[[], np.ndarray]] = {
            name: partial(_decode, tensor) for name, tensor in sparse.items()
        }
        names = output_names(self.program)
        model = to_onnx(self.program, self.name, names, weights, self._arrays)
        origins = {name: str(torch_layout(tensor)) for name, tensor in sparse.items()}
        return model, {**origins, **fold_masks(model)}

    def reference(self, threads: int) -> ReferenceModel:
        """See `Source.reference`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with _replaced(self._module, _runnable_weight), evaluating(self._module):
                return self._module(*args, **kwargs)

        return TorchReference(self.program, run, threads)

    def write_pruned(self, weights: Mapping[str, np.ndarray], output: Path) -> None:
        """Write a ``.pt2``."""
        write_program(self.program, weights, output)


class TorchReference(ReferenceModel):
    """A model in PyTorch.

    Parameters
    ----------
    program : torch.export.ExportedProgram
        Says what the inputs and outputs are.
    module : Callable
        The model.
    threads : int
        Threads within an operator.
    """

    engine = "PyTorch"

    def __init__(self, program: Any, module: Callable[..., Any], threads: int) -> None:
        import torch

        self.version = torch.__version__
        self.inputs = list(program.graph_signature.user_inputs)
        self.outputs = output_names(program)
        self._dtypes = _input_dtypes(program)
        self._structure = program.call_spec.in_spec
        self._module = module
        torch.set_num_threads(threads)

    def run(
        self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """See `ReferenceModel.run`."""
        import torch
        from torch.utils import _pytree as pytree

        tensors = [
            torch.from_numpy(np.array(inputs[name])).to(self._dtypes.get(name))
            for name in self.inputs
        ]
        args, kwargs = pytree.tree_unflatten(tensors, self._structure)
        try:
            with torch.no_grad():
                leaves = pytree.tree_leaves(self._module(*args, **kwargs))
        except Exception as error:
            raise cannot_run("PyTorch", "the model", error) from error
        found = {
            name: (leaf.float() if leaf.dtype == torch.bfloat16 else leaf).numpy()
            for name, leaf in zip(self.outputs, leaves, strict=True)
            if leaf is not None
        }
        return {name: found[name] for name in (self.outputs if outputs is None else outputs)}


def _input_dtypes(program: Any) -> dict[str, Any]:
    """Return the element types of a program's inputs, which NumPy may not have."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    names = program.graph_signature.user_inputs
    return {name: values[name].dtype for name in names if hasattr(values.get(name), "dtype")}


def export(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], **options: Any) -> Any:
    """Trace a module with ``torch.export``, in evaluation mode.

    Raises
    ------
    ModelError
        When it cannot be traced: it branches on values, for example.
    """
    torch = require("torch", "torch", "a PyTorch model")
    try:
        with quiet(), without_collection(), evaluating(module), torch.no_grad():
            args, kwargs = _apart((args, kwargs))
            return torch.export.export(module, args, kwargs, strict=False, **options)
    except Exception as error:
        raise ModelError(
            f"{type(module).__name__}: torch.export cannot trace it: {one_line(error)}",
            hint="branches that depend on values of tensors cannot be compiled",
        ) from error


def _apart(examples: Any) -> Any:
    """Return examples no two of which are one tensor: ``torch.export`` takes it for one input."""
    import torch
    from torch.utils import _pytree as pytree

    seen: set[int] = set()

    def apart(example: Any) -> Any:
        if not isinstance(example, torch.Tensor) or id(example) not in seen:
            seen.add(id(example))
            return example
        return example.clone()

    return pytree.tree_map(apart, examples)


def _sizes(shape: Sequence[Dimension]) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else _EXAMPLE_SIZE for dim in shape)


def output_names(program: Any) -> list[str]:
    """Name a program's outputs: by key where it returns a dictionary or the like."""
    spec = program.call_spec.out_spec
    keys = getattr(spec, "context", None)
    keys = keys[0] if isinstance(keys, tuple) and keys and isinstance(keys[0], list) else keys
    count = spec.num_leaves
    if isinstance(keys, list) and len(keys) == count and all(isinstance(k, str) for k in keys):
        return list(keys)
    return ["output"] if count == 1 else [f"output_{index}" for index in range(count)]


def write_program(program: Any, weights: Mapping[str, np.ndarray], output: Path) -> None:
    """Save a program with other values of its weights; masks give way to the values."""
    import torch

    state = dict(program.state_dict)
    for name, values in weights.items():
        stem = name.rpartition(".")[0]
        owner = next((n for n in (name, f"{name}_orig", _parametrised(name)) if n in state), None)
        if owner is None:
            raise OptionError(
                f"{stem}: its weight is computed, not stored, in the program",
                hint="give an output that ends in .onnx",
            )
        tensor = torch.from_numpy(np.array(values, np.float32)).to(state[owner].dtype)
        stored_as_parameter = isinstance(state[owner], torch.nn.Parameter)
        state[owner] = torch.nn.Parameter(tensor) if stored_as_parameter else tensor
    changed = {"graph": copied_graph(program), "state_dict": state}
    program = torch.export.ExportedProgram(**{**parts_of(program), **changed})
    with replacing(output) as temporary, quiet():
        renamed = temporary.with_suffix(".pt2")
        torch.export.save(program, str(renamed))
        renamed.replace(temporary)


def _parametrised(name: str) -> str:
    module, _, parameter = name.rpartition(".")
    return f"{module}.parametrizations.{parameter}.original".lstrip(".")


def sparse_weights(module: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parameters and buffers that are stored sparse, by their path."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if torch_layout(tensor) is not None:
            yield name, tensor


@contextmanager
def evaluating(module: Any) -> Iterator[None]:
    """Run a block with the module in evaluation mode, and leave it as it was."""
    modules = [m for m in module.modules() if m.training] if hasattr(module, "modules") else []
    for m in modules:
        m.training = False
    try:
        yield
    finally:
        for m in modules:
            m.training = True


@contextmanager
def _replaced(module: Any, replace: Callable[[Any], Any]) -> Iterator[None]:
    """Put other tensors in the place of parameters and buffers; None leaves one as it is."""
    originals = []
    try:
        for owner in module.modules():
            for store in (owner._parameters, owner._buffers):
                for name, tensor in store.items():
                    replacement = None if tensor is None else replace(tensor)
                    if replacement is not None:
                        originals.append((store, name, tensor))
                        store[name] = replacement
        yield
    finally:
        for store, name, tensor in originals:
            store[name] = tensor


def _traceable(tensor: Any) -> Any:
    """Return a stand-in that takes no memory for a sparse tensor, and float32 for a half."""
    import torch

    if torch_layout(tensor) is not None:
        return torch.nn.Parameter(torch.zeros(1).expand(tensor.shape), requires_grad=False)
    return _single(tensor)


def _single(tensor: Any) -> Any:
    import torch

    if tensor.dtype in (torch.float16, torch.bfloat16):
        return torch.nn.Parameter(tensor.detach().float(), requires_grad=False)
    return None


def _decode(tensor: Any) -> np.ndarray:
    values: np.ndarray = torch_to_dense(tensor).float().cpu().numpy()
    return np.ascontiguousarray(values)


def _runnable_weight(tensor: Any) -> Any:
    """Return a dense weight where PyTorch cannot multiply by the sparse one on a CPU."""
    import torch

    layout = torch_layout(tensor) or ""
    if "semi" in layout or " BS" in layout:  # MKL knows square blocks only
        return torch.nn.Parameter(torch_to_dense(tensor).float(), requires_grad=False)
    return None if torch_layout(tensor) else _single(tensor)
