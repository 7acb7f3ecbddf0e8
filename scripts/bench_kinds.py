"""Kinds of networks, most of them convolutional, dense and pruned, beside ONNX Runtime.

    python scripts/bench_kinds.py --workdir kinds --only-prepare  # export, prune, compile
    python scripts/bench_kinds.py --workdir kinds                 # the table
    python scripts/bench_kinds.py --workdir kinds unet tcn        # two of them

Networks are exported by PyTorch in their usual sizes, with random weights, in an environment that
has it, torchvision, timm and transformers; what the work directory holds already is not made again,
so that another environment may go on. 90 % of each weight is pruned, without structure. ONNX
Runtime runs the unpruned network: zeros do not change its time. All engines that run one network
take turns in one process, and outputs are compared with ONNX Runtime's on the same weights.
Failures are outputs that differ, and speeds below the bar: 0.95 times ONNX Runtime's dense, 1.5
times at 90 %.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import typer
import zoo_audio
import zoo_networks
import zoo_text
import zoo_vision
from bench_engines import ONNX_RUNTIME
from bench_tables import Measurement, Variant, save, speed_ups
from zoo_doors import LEGACY, TorchModel, quietly, torch_door

import sparse_tvm
from sparse_tvm.cli.console import stderr_console
from sparse_tvm.cli.progress import PhaseProgress
from sparse_tvm.cpu import cpu_model
from sparse_tvm.errors import SparseTvmError
from sparse_tvm.interleave import interleave
from sparse_tvm.random_inputs import random_inputs
from sparse_tvm.reference import Reference

VARIANTS = {Variant("0%"): 0.95, Variant("90%"): 1.5}
"""What is measured, and how many times ONNX Runtime's speed each should reach."""

TOLERANCE = 1e-3
"""Of the largest value of an output."""


@dataclass(frozen=True)
class Kind:
    """A network, and the sizes of its symbolic dimensions but for a batch of 1."""

    title: str
    make: Callable[[], TorchModel]
    sizes: Mapping[str, int] = field(default_factory=dict)


USUAL = dict.fromkeys(zoo_text.USUAL)
"""Instead of the zoo's small sizes."""

DEBERTA = USUAL | {
    "hidden_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "vocab_size": 8000,
    "relative_attention": True,
    "position_buckets": 256,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
}
"""As published, but for fewer words."""

WAV2VEC2 = ("Wav2Vec2Config", "Wav2Vec2ForCTC", "input_values")

KINDS = {
    "convnext": Kind(
        "ConvNeXt-tiny, 224 x 224", partial(zoo_vision.of_torchvision, "convnext_tiny", 224)
    ),
    "densenet": Kind(
        "DenseNet-121, 224 x 224", partial(zoo_vision.of_torchvision, "densenet121", 224)
    ),
    "yolo": Kind("YOLOv5s, 640 x 640", partial(zoo_networks.yolo, 32, 1, 80, 640)),
    "unet": Kind("U-Net, 256 x 256", partial(zoo_networks.unet, (32, 64, 128, 256), 256)),
    "deeplab": Kind(
        "DeepLabv3 on MobileNetV3, 320 x 320",
        partial(zoo_vision.dense_torchvision, "deeplabv3_mobilenet_v3_large", 320),
    ),
    "squeezebert": Kind(
        "SqueezeBERT, 128 tokens",
        partial(zoo_text.tokens, "SqueezeBertConfig", "SqueezeBertModel", USUAL),
        {"sequence": 128},
    ),
    "wav2vec2": Kind(
        "wav2vec2-base, one second",
        partial(zoo_audio.first_output, *WAV2VEC2, (2, 16000), zoo_audio.SERIES),
        {"length": 16000},
    ),
    "pointnet": Kind("PointNet, 1024 points", zoo_networks.pointnet),
    "tcn": Kind(
        "TCN, 128 channels, 1024 steps",
        partial(zoo_audio.temporal_convolution, 128, 8, 1024),
        {"length": 1024},
    ),
    "r3d": Kind("R3D-18, 16 x 112 x 112", partial(zoo_vision.video, "r3d_18", frames=16, size=112)),
    "super-resolution": Kind(
        "ESPCN, 224 x 224, any size",
        zoo_networks.super_resolution,
        {"height": 224, "width": 224},
    ),
    "deberta": Kind(
        "DeBERTa-v3-small, 128 tokens",
        partial(zoo_text.tokens, "DebertaV2Config", "DebertaV2Model", DEBERTA),
        {"sequence": 128},
    ),
    "nfnet": Kind("NF-ResNet-50, 224 x 224", partial(zoo_vision.of_timm, "nf_resnet50", 224)),
    "mobilenet-v4": Kind(
        "MobileNetV4-small, 224 x 224",
        partial(zoo_vision.of_timm, "mobilenetv4_conv_small", 224),
    ),
    "swin": Kind(
        "Swin-tiny, 224 x 224",
        partial(zoo_vision.of_timm, "swin_tiny_patch4_window7_224", 224),
    ),
    "ocr-detector": Kind("OCR detector, 640 x 640", zoo_networks.ocr_detector),
    "ocr-recogniser": Kind("OCR recogniser, 48 x 320", zoo_networks.ocr_recogniser),
}


def main(
    kind: Annotated[list[str] | None, typer.Argument(help="Of those in KINDS.")] = None,
    threads: Annotated[list[int] | None, typer.Option(min=1, help="Repeatable.")] = None,
    duration: Annotated[float, typer.Option(help="Seconds per engine.")] = 1.5,
    workdir: Annotated[Path | None, typer.Option(help="Keeps models and artifacts.")] = None,
    only_prepare: Annotated[bool, typer.Option(help="Make and compile, time nothing.")] = False,
) -> None:
    """Compare compiled networks with ONNX Runtime."""
    for name in kind or ():
        if name not in KINDS:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(KINDS)}")
    failures, measured = [], []
    with TemporaryDirectory() as temporary, PhaseProgress(stderr_console()) as progress:
        directory = workdir or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        for name in kind or KINDS:
            try:
                progress(f"{name}: make and compile")
                models = prepare(name, directory)
                for count in () if only_prepare else threads or (1, 2):
                    progress(f"{name}: measure with {count} threads")
                    measured += compare(name, models, count, duration)
            except SparseTvmError as error:
                failures.append(f"{name}: {error}")
        if measured:
            title = f"Median latency, batch 1, {cpu_model()}"
            save(measured, title, directory / "kinds.md")
    failures += below_bar(measured)
    if failures:
        sys.exit("\n".join(f"error: {failure}" for failure in failures))


def prepare(name: str, directory: Path) -> dict[Variant, tuple[Path, Path]]:
    """The ONNX file and the artifact of each variant of a network."""
    dense = directory / name / "model.onnx"
    if not dense.exists():
        dense.parent.mkdir(exist_ok=True)
        with quietly():
            torch_door(LEGACY, KINDS[name].make, 0.0)(dense.parent)
    models = {}
    for variant in VARIANTS:
        path = dense.with_name(f"{variant.percent}.onnx")
        if not path.exists():
            sparse_tvm.prune(dense, path, sparsity=float(variant.percent) / 100)
        artifact = path.with_suffix(".so")
        if not artifact.exists():
            sparse_tvm.compile(path, artifact, verify=False)  # measuring compares outputs
        models[variant] = path, artifact
    return models


def compare(
    name: str, models: Mapping[Variant, tuple[Path, Path]], threads: int, duration: float
) -> list[Measurement]:
    """Time a network's variants and ONNX Runtime, which runs the first of them."""
    kind = KINDS[name]
    runs: dict[str, Callable[[], object]] = {}
    differences = {ONNX_RUNTIME: 0.0}
    for variant, (path, artifact) in models.items():
        reference = Reference(path, threads=threads)
        model = sparse_tvm.load(artifact, threads=threads)
        feed = random_inputs(model.inputs, sizes={"batch": 1, **kind.sizes})
        runs.setdefault(ONNX_RUNTIME, partial(reference.run, feed))
        runs[variant.title] = partial(model.run, feed)
        differences[variant.title] = difference(model.run(feed), reference.run(feed))
    times = interleave(runs, duration=duration)
    del runs
    gc.collect()
    return [
        Measurement(kind.title, engine, threads, median(times[engine]), differences[engine])
        for engine in times
    ]


def difference(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """The largest difference between outputs, relative to the largest value of each."""
    return max(
        float(np.abs(found[name] - wanted).max() / np.abs(wanted).max())
        for name, wanted in expected.items()
    )


def below_bar(measured: list[Measurement]) -> list[str]:
    """What differs from ONNX Runtime's outputs, and what is slower than it should be."""
    bars = {variant.title: bar for variant, bar in VARIANTS.items()}
    found = []
    for m, gain in speed_ups(measured).items():
        if not m.difference <= TOLERANCE:  # a NaN is wrong too
            found.append(f"{m.model}: {m.engine} differs by {m.difference:.2g}")
        if gain < bars.get(m.engine, 0.0):
            found.append(f"{m.model}: {m.engine}, {m.threads} threads: {gain:.2f}x")
    return found


if __name__ == "__main__":
    typer.run(main)
