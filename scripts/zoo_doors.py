"""How models of the zoo are pruned and brought to the compiler: one function per door."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SPARSITY = 0.9

Feeds = dict[str, np.ndarray]


class Unbuilt(Exception):
    """The framework itself cannot export or run the model."""


@dataclass
class Subject:
    """What is compiled.

    Attributes
    ----------
    model : Any
        As `sparse_tvm.compile` takes it.
    options : dict[str, Any]
        What else it takes.
    sizes : dict[str, int]
        Sizes of symbolic dimensions to compare with, where not any will do.
    padded : bool
        Whether attention masks may begin with zeros.
    compares_padding : bool
        Whether what becomes of masked tokens themselves must be equal too. In transformers it is
        one thing when a model is called and another when it is exported.
    adapt : Callable[[Feeds], Feeds]
        Makes random inputs valid ones.
    """

    model: Any
    options: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    padded: bool = True
    compares_padding: bool = True
    adapt: Callable[[Feeds], Feeds] = lambda feeds: feeds


@dataclass(frozen=True)
class Family:
    """A family of models, the kind of model it is, and the door it comes through."""

    name: str
    kind: str
    door: str
    build: Callable[[Path], Subject]


@dataclass
class TorchModel:
    """A module, and how it is called.

    Attributes
    ----------
    module : torch.nn.Module
        Called with `inputs`, which may be nested.
    inputs : tuple
        Examples.
    names : list[str]
        One for each tensor of `inputs`.
    axes : Mapping[str, Mapping[int, str]]
        Symbolic dimensions by input.
    """

    module: Any
    inputs: tuple[Any, ...]
    names: list[str]
    axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    padded: bool = True
    adapt: Callable[[Feeds], Feeds] = lambda feeds: feeds

    def subject(self, model: Any, **options: Any) -> Subject:
        return Subject(model, options, self.sizes, self.padded, adapt=self.adapt)

    def shapes(self, dimension: Callable[[str], Any]) -> tuple[Any, ...]:
        """Return `axes` nested as `inputs` are."""
        from torch.utils._pytree import tree_flatten, tree_unflatten

        _, spec = tree_flatten(self.inputs)
        flat = [
            {axis: dimension(symbol) for axis, symbol in self.axes.get(name, {}).items()} or None
            for name in self.names
        ]
        return tree_unflatten(flat, spec)


def torch_door(
    door: str, make: Callable[[], TorchModel], sparsity: float = SPARSITY
) -> Callable[[Path], Subject]:
    """Return what builds a model of PyTorch and exports it through a door."""
    return functools.partial(_DOORS[door], functools.partial(_prepared, make, sparsity))


def _legacy(prepared: Callable[[], TorchModel], folder: Path) -> Subject:
    import torch

    model = prepared()
    path = folder / "model.onnx"
    torch.onnx.export(
        model.module,
        model.inputs,
        str(path),
        input_names=model.names,
        dynamic_axes={name: dict(axes) for name, axes in model.axes.items()},
        opset_version=17,
        dynamo=False,
    )
    return model.subject(path)


def _dynamo(prepared: Callable[[], TorchModel], folder: Path) -> Subject:
    import torch

    model = prepared()
    path = folder / "model.onnx"
    # A dimension that follows from others, as `past + new`, is found by the exporter.
    dims: dict[str, Any] = {}

    def dimension(symbol: str) -> Any:
        return dims.setdefault(symbol, symbol if symbol.isidentifier() else torch.export.Dim.AUTO)

    program = torch.onnx.export(
        model.module,
        model.inputs,
        input_names=model.names,
        dynamic_shapes=model.shapes(dimension) if model.axes else None,
        dynamo=True,
        verbose=False,
    )
    program.save(path)
    _name_dimensions(path, model.axes)
    return model.subject(path)


def _name_dimensions(path: Path, axes: Mapping[str, Mapping[int, str]]) -> None:
    """Give dimensions that follow from others the names that say so."""
    import onnx

    model = onnx.load(path)
    for value in model.graph.input:
        for axis, name in axes.get(value.name, {}).items():
            value.type.tensor_type.shape.dim[axis].dim_param = name
    onnx.save(model, path)


def _module(prepared: Callable[[], TorchModel], folder: Path) -> Subject:
    import torch

    model = prepared()
    options: dict[str, Any] = {"example_inputs": model.inputs}
    if model.axes:
        options["dynamic_shapes"] = model.shapes(lambda _: torch.export.Dim.DYNAMIC)
    return model.subject(model.module, **options)


def _program(prepared: Callable[[], TorchModel], folder: Path) -> Subject:
    import torch

    model = prepared()
    shapes = model.shapes(lambda _: torch.export.Dim.DYNAMIC) if model.axes else None
    program = torch.export.export(model.module, model.inputs, dynamic_shapes=shapes)
    torch.export.save(program, folder / "model.pt2")
    return model.subject(folder / "model.pt2")


_DOORS: dict[str, Callable[..., Subject]] = {
    "ONNX, legacy exporter": _legacy,
    "ONNX, dynamo exporter": _dynamo,
    "nn.Module": _module,
    "pt2": _program,
}
LEGACY, DYNAMO, MODULE, PT2 = _DOORS
KERAS, SAVED_MODEL, TFLITE = TENSORFLOW = ("Keras", "SavedModel", "TensorFlow Lite")


def _prepared(make: Callable[[], TorchModel], sparsity: float) -> TorchModel:
    import torch

    torchvision()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = make()
    # Exporters take one tensor for one input, whatever it is called.
    model.inputs = torch.utils._pytree.tree_map(torch.clone, model.inputs)
    model.module.eval()
    randomise(model.module, sparsity)
    return model


def huggingface(make: Callable[[], Any], **given: Any) -> Callable[[Path], Subject]:
    """Return what saves a model of transformers as a directory."""

    def build(folder: Path) -> Subject:
        import torch

        torchvision()
        torch.manual_seed(0)
        model = make().eval()
        randomise(model)
        model.save_pretrained(folder / "model")
        return Subject(folder / "model", compares_padding=False, **given)

    return build


def randomise(module: Any, sparsity: float = SPARSITY) -> None:
    """Prune random weights, and give biases, norms and statistics values that matter."""
    import torch

    seen: set[int] = set()
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if id(tensor) in seen or not tensor.is_floating_point():
                continue
            seen.add(id(tensor))
            last = name.rpartition(".")[2]
            if last == "running_var":
                tensor.uniform_(0.5, 1.5)
            elif last == "running_mean":
                tensor.normal_(0, 0.1)
            elif isinstance(tensor, torch.nn.Parameter) and tensor.ndim >= 2:
                if "embed" not in name and tensor.numel() > 64:
                    _prune(tensor, sparsity)
            elif isinstance(tensor, torch.nn.Parameter):
                tensor.add_(torch.randn_like(tensor), alpha=0.1)


def _prune(tensor: Any, sparsity: float) -> None:
    """Zero the smallest values, and scale the others so that signals keep their size."""
    import torch

    if float(tensor.std()) < 1e-6:  # an initialisation that says nothing
        tensor.normal_(0, 1 / max(1, tensor[0].numel()) ** 0.5)
    before = tensor.norm()
    kept = tensor.abs() >= torch.quantile(tensor.abs().flatten()[:1_000_000], sparsity)
    tensor.mul_(kept)
    tensor.mul_(before / tensor.norm().clamp_min(1e-12))


def keras_door(door: str, make: Callable[[], Any]) -> Callable[[Path], Subject]:
    """Return what builds a Keras model and saves it as `.keras`, SavedModel or TFLite."""

    def build(folder: Path) -> Subject:
        from sparse_tvm.frontends.tensorflow.saved_model import require_tensorflow

        require_tensorflow("the zoo")  # before anything else can load it
        import keras
        import tensorflow as tf

        keras.utils.set_random_seed(0)
        model = make()
        _randomise_keras(model)
        if door == KERAS:
            model.save(folder / "model.keras")
            return Subject(folder / "model.keras")
        if door == SAVED_MODEL:
            model.export(folder / "saved", verbose=False)
            return Subject(folder / "saved")
        path = folder / "model.tflite"
        path.write_bytes(tf.lite.TFLiteConverter.from_keras_model(model).convert())
        return Subject(path)

    return build


def _randomise_keras(model: Any) -> None:
    rng = np.random.default_rng(0)
    for variable in model.weights:
        value = np.array(variable.numpy())
        if "variance" in variable.path:
            value = rng.uniform(0.5, 1.5, value.shape)
        elif value.ndim >= 2 and not re.search("embedding|bias", variable.path):
            kept = np.abs(value) >= np.quantile(np.abs(value), SPARSITY)
            value = value * kept * np.sqrt((value**2).sum() / ((value * kept) ** 2).sum())
        elif np.issubdtype(value.dtype, np.floating) and "embedding" not in variable.path:
            value = value + 0.1 * rng.standard_normal(value.shape)
        variable.assign(value)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep what frameworks say while they export to themselves."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def torchvision() -> Any:
    """Import torchvision, whose operators do not load beside PyTorch's CPU build.

    transformers imports it too, where it is there.
    """
    import torch

    for name in ("nms", "qnms"):
        signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        with contextlib.suppress(RuntimeError):  # they are there
            torch.library.define(f"torchvision::{name}", signature)
    import torchvision as module

    return module
