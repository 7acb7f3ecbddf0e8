"""What is compiled for Arm, run by qemu: ``scripts/test_arm.sh`` sets that up and runs these.

Models are small for the emulator's sake: two layers of 256 features, 64 x 64 pixels. Formats are
given, so that targets with the same instructions get the same code, and one of them is run.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx_models import build, narrowed
from onnxruntime.quantization import quantize_dynamic

import sparse_tvm
from sparse_tvm.emulation import Emulator
from sparse_tvm.errors import SparseTvmError
from sparse_tvm.models.bert import BertConfig, build_bert
from sparse_tvm.models.convnets import build_mobilenet_v2
from sparse_tvm.models.gpt2 import Gpt2Config, build_gpt2
from sparse_tvm.models.vit import VitConfig, build_vit
from sparse_tvm.npz import read_npz, write_npz
from sparse_tvm.operators import Bias, Dense, Layout, to_json
from sparse_tvm.schedules.cpu.simd import Simd
from sparse_tvm.sparsity.quantise import (
    LARGEST,
    PEAK_STEPS,
    bf16_values,
    quantise_rows,
    round_to_bf16,
)
from sparse_tvm.targets import TARGETS, get_target
from sparse_tvm.tuning.job import Job
from sparse_tvm.tuning.remote import RemoteMeasurer

pytestmark = pytest.mark.skipif(
    "SPARSE_TVM_TEST_ARM" not in os.environ, reason="scripts/test_arm.sh runs these"
)
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "cpp"
ARM = [target for target in TARGETS.values() if target.architecture == "aarch64"]
DIFFERENT = ["cortex-a72", "neoverse-n1", "neoverse-v1"]
FORMATS = {None: "dense", "unstructured": "csr", "4x2": "bsr"}
"""What becomes of a structure."""
CPUINFO = "processor\t: 0\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\nCPU part\t: {:#x}\n"
CLI = "import sys; from sparse_tvm.cli import main; sys.exit(main(sys.argv[1:]))"
MODELS = {
    "bert csr": ("bert", "unstructured", {"format": "csr"}),
    "bert 4x1": ("bert", "4x1", {"format": "bsr", "block": "4x1"}),
    "bert dense": ("bert", None, {"format": "dense"}),
    "gpt-2": ("gpt2", "4x1", {"format": "bsr", "block": "2x1"}),
    "vit": ("vit", "unstructured", {"format": "csr"}),
    "mobilenet v2": ("mobilenet", None, {"format": "dense"}),
}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """ONNX files by name; BERT's and GPT-2's batch and length are symbolic."""
    directory = tmp_path_factory.mktemp("models")
    sizes = {"layers": 2, "hidden": 256, "heads": 4}
    symbolic = {"batch": "batch", "sequence": "sequence"}
    bert = BertConfig(**sizes, intermediate=1024, vocabulary=1000, max_positions=128)
    gpt2 = Gpt2Config(**sizes, vocabulary=1000, max_positions=128)
    vit = VitConfig(**sizes, intermediate=1024, image=64)
    built = {
        "bert": build_bert(bert, **symbolic, pooler=True),
        "gpt2": build_gpt2(gpt2, **symbolic),
        "vit": build_vit(vit),
        "mobilenet": build_mobilenet_v2(image=64),
        "tiny": build_bert(BertConfig(1, 32, 2, 64, 50, 16), batch=1, sequence=8),
    }
    for name, model in built.items():
        onnx.save(model, directory / f"{name}.onnx")
    return directory


def pruned(models, source, structure):
    dense = models / f"{source}.onnx"
    if structure is None:
        return dense
    path = models / f"{source} {structure}.onnx"
    if not path.exists():
        sparse_tvm.prune(dense, path, sparsity=0.9, structure=structure)
    return path


def compiled(models, name, target, tmp_path, **options):
    source, structure, formats = MODELS[name]
    path = pruned(models, source, structure)
    return sparse_tvm.compile(
        path, tmp_path / "model.so", target=target, **formats, **options
    ).manifest


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("target", DIFFERENT)
def test_models_agree_with_onnx_runtime(models, name, target, tmp_path):
    manifest = compiled(models, name, target, tmp_path)
    found = manifest["verification"]
    assert found is not None, manifest["unverified"]
    assert found["reference"].startswith("ONNX Runtime")
    assert found["emulated"].endswith((target, "max"))
    assert max(found["max_abs_diff"].values()) <= 1e-4
    formats = {layer["format"] for layer in manifest["layers"]}
    assert formats == {MODELS[name][2]["format"]}


@pytest.mark.parametrize("target", ["neoverse-n1", "neoverse-v1"])
@pytest.mark.parametrize("structure", [None, "unstructured", "1x4", "4x4"])
def test_models_in_int8_are_near_float32(models, structure, target, tmp_path):
    path = pruned(models, "bert", structure)
    options = {"precision": "int8", "min_cosine": 0.999}
    manifest = sparse_tvm.compile(path, tmp_path / "model.so", target=target, **options).manifest
    assert manifest["verification"]["emulated"].endswith((target, "max"))
    layers = manifest["layers"]
    assert {layer["precision"] for layer in layers} == {"int8"}
    sparse = [layer for layer in layers if layer["format"] != "dense"]
    # Those of many inputs may stay dense, which few tokens are faster by.
    assert len(sparse) >= 11 if structure else not sparse
    blocks = [layer["block"] for layer in sparse]
    assert structure != "4x4" or any(block[0] > 1 for block in blocks)


@pytest.mark.parametrize("name", ["bert csr", "bert 4x1", "bert dense"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_weights_in_16_bits_are_near_float32(models, name, precision, tmp_path):
    options = {"precision": precision, "min_cosine": 0.9999}
    manifest = compiled(models, name, "cortex-a72", tmp_path, **options)
    assert manifest["verification"]["emulated"].endswith("cortex-a72")
    dtype = {"fp16": "float16", "bf16": "bfloat16"}[precision]
    assert {layer["precision"] for layer in manifest["layers"]} == {dtype}


@pytest.mark.parametrize("structure", [None, "unstructured", "4x2"])
def test_models_in_bf16_are_near_float32(models, structure, tmp_path):
    path, output = pruned(models, "bert", structure), tmp_path / "model.so"
    options = {"precision": "bf16", "min_cosine": 0.9999}
    manifest = sparse_tvm.compile(path, output, target="neoverse-v1", **options).manifest
    layers = manifest["layers"]
    assert {layer["precision"] for layer in layers} == {"bfloat16"}
    assert FORMATS[structure] in {layer["format"] for layer in layers}
    assert any(name.startswith("attention_bf16_bfdot") for name in manifest["kernels"])


LAYERS = {
    "dense": (30, 90),
    "csr": (150, 75),
    "bsr:2x{}": (64, 128),
    "bsr:4x{}": (27, 300),
    "bsr:4x{} by twos": (70, 140),
}
"""Outputs and inputs of a layer for each format: whole blocks and vectors, and not. Blocks are of
a word, or of two."""
INSTRUCTIONS = {
    ("neoverse-n1", "int8"): {"sdot"},
    ("neoverse-v1", "int8"): {"sdot", "smmla"},
    ("neoverse-v1", "bf16"): {"bfdot", "bfmmla"},
}


@pytest.mark.parametrize(("target", "precision"), INSTRUCTIONS)
def test_layers_agree_with_numpy(target, precision, tmp_path):
    """From one token to some tiles of them, by the instructions themselves."""
    rng, unit = np.random.default_rng(0), {"int8": 4, "bf16": 2}[precision]
    weights, rules = {}, []
    for i, (form, (n, k)) in enumerate(LAYERS.items()):
        columns = 2 * unit if "twos" in form else unit
        filled = np.kron(rng.random((n, -(-k // columns))) < 0.3, np.ones((1, columns)))[:, :k]
        w = rng.standard_normal((n, k)) * (1.0 if form == "dense" else filled)
        weights[f"w{i}"] = w.astype("float32")
        rules.append(f"w{i}={form.split()[0].format(columns)}")
    path = tmp_path / "layers.onnx"
    onnx.save(layers_of(weights), path)
    options = {"layer_rules": rules, "precision": precision, "verify": False}
    manifest = sparse_tvm.compile(path, tmp_path / "model.so", target=target, **options).manifest
    formats = [layer["format"] for layer in manifest["layers"]]
    assert formats == ["dense", "csr", "bsr", "bsr", "bsr"]
    used = {name.split("_")[1] for name in manifest["kernels"] if name.startswith(precision)}
    assert used == INSTRUCTIONS[target, precision]
    calls = [
        {f"x_{name}": random_like(rng, rows, w.shape[1]) for name, w in weights.items()}
        for rows in (1, 4, 5, 33)
    ]
    found = Emulator.of(get_target(target)).run(tmp_path / "model.so", calls)
    for inputs, outputs in zip(calls, found, strict=True):
        for name, w in weights.items():
            x = inputs[f"x_{name}"]
            expected = activation_in(precision, x) @ weight_in(precision, w).T
            largest = np.abs(expected).max(axis=-1, keepdims=True)
            error = np.abs(outputs[f"y_{name}"] - expected)
            assert (error <= 3e-5 * largest + 1e-6).all(), name


def random_like(rng, rows, features):
    return (rng.standard_normal((1, rows, features)) * rng.uniform(0.1, 3)).astype("float32")


def activation_in(precision, x):
    """What a float32 activation is worth in a precision."""
    if precision == "bf16":
        bits = x.view(np.uint32) + 0x8000 & 0xFFFF0000  # what lies in the middle goes up
        return bits.astype(np.uint32).view(np.float32).astype("float64")
    scales = np.abs(x).max(axis=-1, keepdims=True) / PEAK_STEPS
    return np.clip(np.rint(x / scales), -LARGEST, LARGEST) * scales.astype("float64")


def weight_in(precision, w):
    """What a float32 weight is worth in a precision."""
    if precision == "bf16":
        return bf16_values(round_to_bf16(w)).astype("float64")
    values, scales = quantise_rows(w, LARGEST)
    return values * scales[:, None].astype("float64")


def layers_of(weights):
    """A model of dense layers beside each other, of any number of rows."""
    inputs = ", ".join(f"float[1,rows,{w.shape[1]}] x_{name}" for name, w in weights.items())
    outputs = ", ".join(f"float[1,rows,{len(w)}] y_{name}" for name, w in weights.items())
    nodes = " ".join(f"y_{name} = MatMul(x_{name}, {name})" for name in weights)
    transposed = {name: np.ascontiguousarray(w.T) for name, w in weights.items()}
    return build(f"({inputs}) => ({outputs}) {{ {nodes} }}", **transposed)


def test_auto_precision_keeps_what_hurts_in_bf16(models, tmp_path):
    options = {"precision": "auto", "min_cosine": 0.99999}
    manifest = sparse_tvm.compile(
        models / "bert.onnx", tmp_path / "model.so", target="neoverse-v1", **options
    ).manifest
    assert "bfloat16" in {layer["precision"] for layer in manifest["layers"]}


def test_bfloat16_models_compute_in_bf16_where_the_target_has_it(models, tmp_path):
    path = tmp_path / "half.onnx"
    onnx.save(narrowed(onnx.load(models / "tiny.onnx"), "bfloat16"), path)
    for target, computes in {"neoverse-v1": True, "neoverse-n1": False}.items():
        manifest = sparse_tvm.compile(path, tmp_path / "model.so", target=target).manifest
        assert {layer["precision"] for layer in manifest["layers"]} == {"bfloat16"}
        stored = "weights in bfloat16, for kernels that compute in float32"
        assert any(stored in note for note in manifest["notes"]) != computes


def test_quantised_models_multiply_their_own_integers(models, tmp_path):
    """Exactly: what this machine computes of the integers' real numbers."""
    quantised, here, there = (tmp_path / name for name in ("q.onnx", "here.so", "there.so"))
    quantize_dynamic(models / "tiny.onnx", quantised, per_channel=True)
    sparse_tvm.compile(quantised, here, precision="fp32", verify=False)
    manifest = sparse_tvm.compile(quantised, there, target="neoverse-n1", verify=False).manifest
    assert {layer["precision"] for layer in manifest["layers"]} == {"int8"}
    ids = np.arange(8).reshape(1, 8)
    inputs = {"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0}
    expected = sparse_tvm.load(here).run(inputs)
    (outputs,) = Emulator.of(get_target("neoverse-n1")).run(there, [inputs])
    for name, output in outputs.items():
        np.testing.assert_allclose(output, expected[name], atol=1e-5)


def test_int8_is_refused_without_dot_products(models, tmp_path):
    with pytest.raises(SparseTvmError, match="cortex-a72 has no dot products of int8") as refused:
        sparse_tvm.compile(
            models / "bert.onnx", tmp_path / "model.so", target="cortex-a72", precision="int8"
        )
    assert "--precision fp32 or fp16 or bf16" in refused.value.hint


def test_the_other_targets_get_the_same_code():
    def code(target):
        return str(target.tvm_target()), Simd.of(target)

    assert {code(target) for target in ARM} == {code(get_target(name)) for name in DIFFERENT}


def emulated(target, *arguments, before=(), **environment):
    """Run Python on the emulated CPU of a target."""
    emulator = Emulator.of(get_target(target))
    return subprocess.run(
        [*before, *emulator.command(arguments)],
        env={**emulator.environment(), **environment},
        capture_output=True,
        text=True,
    )


def test_a_runner_measures_there(tmp_path, monkeypatch):
    """The mechanics of tuning: an emulator's times say nothing."""
    emulator = Emulator.of(get_target("cortex-a72"))
    places = emulator.environment()["PYTHONPATH"]
    python, ssh = tmp_path / "python", tmp_path / "ssh"
    python.write_text(
        f"#!/bin/sh\nexport PYTHONPATH={shlex.quote(places)}\n"
        f'exec {shlex.join(emulator.command([]))} "$@"\n'
    )
    ssh.write_text('#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done\nexec sh -c "$3"\n')
    for script in (python, ssh):
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    w = np.random.default_rng(0).standard_normal((64, 48), np.float32)
    op = Dense(layer="", matrix=w.shape, epilogue=(Bias(),), layout=Layout("matmul", "csr"))
    job: Job = {
        "backend": "cpu",
        "target": "cortex-a72",
        "operator": op.name,
        "call": to_json(op),
        "leading": [16],
        "weight": "w",
        "tokens": [16],
        "threads": [1],
        "copies": 2,
        "seconds": 0.01,
        "beside": None,
    }
    with RemoteMeasurer("board", str(python), limit=600) as measurer:
        assert measurer.machine()["architecture"] == "aarch64"
        answer = measurer(job, w)
    assert [result["seconds"] > 0 for result in answer["results"]] == [True]


def test_code_for_newer_cpus_is_refused_in_one_line(models, tmp_path):
    compiled(models, "bert csr", "neoverse-n1", tmp_path, verify=False)
    run = emulated("cortex-a72", "-c", CLI, "run", str(tmp_path / "model.so"), "--random")
    assert run.returncode == 1
    error, hint = run.stderr.splitlines()
    assert error.startswith("error: ")
    assert "was compiled for neoverse-n1 and needs CPU features that " in error
    assert error.endswith("lacks: dotprod, fullfp16, lse, rcpc, rdm")
    assert "--target native" in hint


def test_code_for_x86_is_refused(models, tmp_path):
    compiled(models, "bert csr", "x86-64-v2", tmp_path, verify=False)
    run = emulated("cortex-a72", "-c", CLI, "run", str(tmp_path / "model.so"), "--random")
    assert run.returncode == 1
    assert "was compiled for x86_64; this machine is aarch64" in run.stderr


def test_targets_tells_what_an_arm_machine_is():
    run = emulated("neoverse-n1", "-c", CLI, "targets")
    assert run.returncode == 0, run.stderr
    native = [line.split()[0] for line in run.stdout.splitlines() if " native " in line]
    assert native == ["neoverse-n1"]


def test_it_compiles_on_arm_for_itself(models, tmp_path):
    """With verification by ONNX Runtime there, which reads what an emulator does not emulate."""
    target = get_target("neoverse-n1")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(CPUINFO.format(target.parts[0]))
    in_place = f'mount --bind "{cpuinfo}" /proc/cpuinfo && exec "$@"'
    before = ["unshare", "--map-root-user", "--mount", "sh", "-c", in_place, "sh"]
    if subprocess.run([*before, "true"], capture_output=True).returncode:
        pytest.skip("mounts are not allowed here")
    output = tmp_path / "tiny.so"
    run = emulated(
        target.name,
        "-c",
        CLI,
        "compile",
        str(models / "tiny.onnx"),
        "-o",
        str(output),
        before=before,
        CC="aarch64-linux-gnu-gcc",  # of this machine: qemu lets it through
    )
    assert run.returncode == 0, run.stderr
    assert "Verified against ONNX Runtime" in run.stdout
    assert sparse_tvm.inspect(output)["target"]["name"] == target.name


def test_cpp_example(models, tmp_path):
    """Cross-compiled, it prints what Python returns for the same inputs."""
    emulator = replace(Emulator.of(get_target("cortex-a72")), cpu="cortex-a72")
    python = tmp_path / "python"
    exports = f'export PYTHONPATH="{emulator.place / "site"}"'
    command = " ".join(f'"{part}"' for part in emulator.command(()))
    python.write_text(f'#!/bin/sh\n{exports}\nexec {command} "$@"\n')
    python.chmod(0o755)
    cross = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"]
    cross += [f"-DPython_EXECUTABLE={python}", "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++"]
    subprocess.run(["cmake", "-S", EXAMPLE, "-B", tmp_path / "build", *cross], check=True)
    subprocess.run(["cmake", "--build", tmp_path / "build"], check=True)

    compiled(models, "bert csr", "cortex-a72", tmp_path, verify=False)
    root = str(emulator.place / "root")
    program = [emulator.program, "-cpu", emulator.cpu, "-L", root, tmp_path / "build/run_model"]
    run = subprocess.run(
        [*program, tmp_path / "model.so", "batch=2", "sequence=5"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    ones = np.ones((2, 5), np.int64)
    inputs = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), ones)
    (outputs,) = emulator.run(tmp_path / "model.so", [inputs])
    for line, expected in zip(run.stdout.splitlines(), outputs.values(), strict=True):
        head, _, numbers = line.partition(":")
        assert head.endswith(str(list(expected.shape)))
        found = [float(number) for number in numbers.split()[:4]]
        np.testing.assert_allclose(found, expected.reshape(-1)[:4], rtol=1e-4)


def test_run_verb(models, tmp_path):
    compiled(models, "vit", "cortex-a72", tmp_path, verify=False)
    rng = np.random.default_rng(0)
    write_npz(tmp_path / "in.npz", {"pixel_values": rng.random((1, 3, 64, 64), np.float32)})
    paths = [str(tmp_path / name) for name in ("model.so", "in.npz", "out.npz")]
    run = emulated("cortex-a72", "-c", CLI, "run", paths[0], "-i", paths[1], "-o", paths[2])
    assert run.returncode == 0, run.stderr
    (hidden,) = read_npz(tmp_path / "out.npz").values()
    assert hidden.shape == (1, 17, 256)
    assert np.isfinite(hidden).all()


@pytest.mark.skipif(not shutil.which("llvm-mca-19"), reason="needs llvm-mca")
def test_inner_loops_reach_the_peak(tmp_path):
    import sys

    scripts = EXAMPLE.parents[1] / "scripts"
    table = tmp_path / "table.md"
    subprocess.run([sys.executable, scripts / "mca.py", "--markdown", table], check=True)
    _, _, *rows = [line.strip("|").split("|") for line in table.read_text().splitlines()]
    shares = {
        row[0].strip(): [int(cell.split("%")[0]) for cell in row[1:] if "%" in cell] for row in rows
    }
    blocks = ("BSR 2x1", "BSR 4x1", "sdot 4x4", "bfdot 4x2", "smmla 4x8")
    dense = ("dense, 6 rows", "smmla, dense, 6 rows", "bfmmla, dense, 6 rows")
    for kernel in (*dense, *blocks, "attention, scores", "bfdot attention, values"):
        assert min(shares[kernel]) >= 95, kernel
