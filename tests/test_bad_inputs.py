"""Every bad input a user can give: one clear line, a non-zero exit, nothing left behind."""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparse_tvm.artifact import read_manifest, rewrite_manifest
from sparse_tvm.cli import main

K, N, TOKENS = 16, 8, 4


def weight() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((K, N)).astype(np.float32)


def tiny_model(
    w: np.ndarray | None = None,
    *,
    rows: int | str = TOKENS,
    opset: int = 17,
    odd_ops: tuple[str, ...] = (),
) -> onnx.ModelProto:
    """``y = x W``, and for each of `odd_ops` an output that it computes from y."""
    w = weight() if w is None else w
    nodes = [helper.make_node("MatMul", ["x", "fc.weight"], ["y"], name="fc_node")]
    nodes += [helper.make_node(op, ["y"], [op], name=f"odd_{op.lower()}") for op in odd_ops]
    types = {
        "Det": (TensorProto.FLOAT, []),
        "ReduceSum": (TensorProto.FLOAT, [1, 1]),
        "StringNormalizer": (TensorProto.STRING, ["kinds"]),
    }
    outputs = {"y": (TensorProto.FLOAT, [rows, w.shape[1]])} | {op: types[op] for op in odd_ops}
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, K])],
        [helper.make_tensor_value_info(name, *type_) for name, type_ in outputs.items()],
        [numpy_helper.from_array(w, "fc.weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def with_weight_value(value: float) -> onnx.ModelProto:
    w = weight()
    w[3, 5] = value
    return tiny_model(w)


def with_scale(value: float) -> onnx.ModelProto:
    """The tiny model with its weight quantised."""
    model = tiny_model(np.ones((K, N), np.int8))
    inputs = ["fc.weight", "fc.scale"]
    node = helper.make_node("DequantizeLinear", inputs, ["w"], name="fc_dequantise")
    model.graph.initializer.append(numpy_helper.from_array(np.float32(value), "fc.scale"))
    model.graph.node[0].input[1] = "w"
    model.graph.node.insert(0, node)
    return model


def with_missing_data() -> onnx.ModelProto:
    model = tiny_model()
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], "lost.bin")
    model.graph.initializer[0].ClearField("raw_data")
    return model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that holds one good model."""
    monkeypatch.chdir(tmp_path)
    onnx.save(tiny_model(), "good.onnx")
    return tmp_path


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    directory = tmp_path_factory.mktemp("compiled")
    onnx.save(tiny_model(), directory / "good.onnx")
    model, artifact = str(directory / "good.onnx"), directory / "good.so"
    assert main(["compile", model, "-o", str(artifact), "--quiet"]) == 0
    return artifact.read_bytes()


@pytest.fixture
def artifact(folder: Path, compiled: bytes) -> Path:
    (folder / "good.so").write_bytes(compiled)
    return folder / "good.so"


@pytest.fixture
def refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[[str, int, tuple[str, ...]], None]:
    """Run a command that must fail with `code` and say all `words`, and leave nothing."""

    def check(command: str, code: int, words: tuple[str, ...]) -> None:
        before = sorted(folder.rglob("*"))
        capsys.readouterr()
        assert main(shlex.split(command)) == code
        captured = capsys.readouterr()
        assert_clear(captured.err, words)
        assert captured.out == ""
        assert sorted(folder.rglob("*")) == before

    return check


def assert_clear(stderr: str, words: tuple[str, ...]) -> None:
    lines = stderr.splitlines()
    assert lines, "nothing was said"
    assert lines[0].startswith("error: "), stderr
    assert [line.split(":")[0] for line in lines] in (["error"], ["error", "hint"]), stderr
    assert not [word for word in words if word not in stderr], stderr


Refused = Callable[[str, int, tuple[str, ...]], None]
Content = bytes | Callable[[], bytes | onnx.ModelProto] | None

BAD_MODELS: dict[str, tuple[Content, tuple[str, ...]]] = {
    "missing": (None, ("no such file",)),
    "empty": (b"", ("empty",)),
    "text": (b"hello, this is a letter\n" * 20, ("a text file",)),
    "image": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), ("not an ONNX file",)),
    "truncated": (lambda: tiny_model().SerializeToString()[:-200], ("truncated",)),
    "old opset": (lambda: tiny_model(opset=5), ("opset 5",)),
    "unknown opset": (lambda: tiny_model(opset=999), ("opset 999",)),
    "NaN": (lambda: with_weight_value(np.nan), ("NaN", "fc")),
    "Inf": (lambda: with_weight_value(-np.inf), ("Inf", "fc")),
    "no scale": (lambda: with_scale(0), ("fc_dequantise", "fc.scale", "0, not a positive")),
    "lost data": (with_missing_data, ("lost.bin", "fc.weight")),
    "operators": (
        lambda: tiny_model(odd_ops=("Det", "StringNormalizer")),
        ("Det", "odd_det", "StringNormalizer", "odd_stringnormalizer"),
    ),
}


def write_bad_model(case: str) -> tuple[str, ...]:
    """Write ``bad.onnx`` and return what must be said of it."""
    content, words = BAD_MODELS[case]
    data = content() if callable(content) else content
    if data is not None:
        Path("bad.onnx").write_bytes(data if isinstance(data, bytes) else data.SerializeToString())
    return ("bad.onnx", *words)


@pytest.mark.parametrize("case", BAD_MODELS)
def test_compile_refuses_model(case: str, refused: Refused) -> None:
    refused("compile bad.onnx -o model.so --quiet", 1, write_bad_model(case))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--target pentium9", ("target", "pentium9", "native")),
        ("--format coo", ("format", "coo", "csr")),
        ("--format bsr --block 4", ("block", "'4'", "4x1")),
        ("--format bsr --block 0x4", ("block", "0x4")),
        ("--layer fc", ("layer rule", "'fc'")),
        ("--layer fc=coo", ("fc=coo", "bsr")),
        ("--layer '(fc=csr'", ("(fc",)),
        ("--layer fcc=csr", ("fcc", "fc")),
        ("--threshold 1.5", ("threshold", "1.5")),
        ("--tolerance=-1", ("--tolerance", "0")),
        ("--threads 0", ("threads", "0")),
        ("--input-shape y:1,16", ("'y'", "x")),
        ("--input-shape x:4,17", ("x:4,17", "16")),
        ("--input-shape x", ("--input-shape", "'x'")),
        ("--report model.pdf", ("model.pdf", ".html")),
        ("--report missing/model.html", ("missing",)),
    ],
)
def test_compile_refuses_option(options: str, words: tuple[str, ...], refused: Refused) -> None:
    refused(f"compile good.onnx -o model.so --quiet {options}", 2, words)


def test_different_outputs_are_refused(refused: Refused) -> None:
    """No two engines add thousands of numbers in the same order."""
    wide = np.random.default_rng(0).standard_normal((K, 5000)).astype(np.float32)
    onnx.save(tiny_model(wide, odd_ops=("ReduceSum",)), "wide.onnx")
    words = ("output ", "differs", "tolerance")
    refused("compile wide.onnx -o model.so --quiet --tolerance 0", 3, words)


@pytest.mark.parametrize(
    "command",
    [
        "compile --quiet good.onnx -o {}",
        "compile --quiet {} -o model.so",
        "compile --quiet good.onnx -o model.so --report {}.md",
        "compile --quiet good.onnx -o model.so --report {}/report.md",
        "compile --quiet good.onnx -o model.so --dump-ir {}",
        "compile --quiet good.onnx -o model.so --save-ir {}.json",
        "inspect {}",
        "verify {}",
        "run {} --random",
        "prune good.onnx --sparsity 0.5 -o {}",
    ],
)
def test_names_that_are_too_long(command: str, refused: Refused) -> None:
    refused(command.format("n" * 300), 1, ("File name too long",))


def test_longest_name(folder: Path) -> None:
    name = "n" * 252 + ".so"
    assert main(["compile", "--quiet", "good.onnx", "-o", name]) == 0
    assert read_manifest(name)["layers"]


def test_errors_are_one_line_whatever_the_name(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "a\x1b[2J\nerror: b\udcff[/x].so"]) == 1
    (line, *_) = capsys.readouterr().err.splitlines()
    assert line == r"error: a\x1b[2J\nerror: b\udcff[/x].so: no such file"


def test_directory_whose_name_is_not_utf8(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = folder / os.fsdecode(b"caf\xe9")
    directory.mkdir()
    (folder / "good.onnx").rename(directory / os.fsdecode(b"\xff.onnx"))
    model, artifact = str(directory / os.fsdecode(b"\xff.onnx")), str(directory / "model.so")
    reports = [f"--report={directory / 'report'}{suffix}" for suffix in (".md", ".html", ".json")]
    assert main(["compile", model, "-o", artifact, "--quiet", "--no-verify", *reports]) == 0
    for command in (["inspect", model], ["inspect", artifact], ["verify", artifact]):
        assert main(command) == 0
    assert main(["run", artifact, "--random"]) == 0
    assert r"\udce9" in capsys.readouterr().out


@pytest.mark.parametrize("output", ["missing/model.so", "good.onnx/model.so", "/sys/model.so", "."])
@pytest.mark.parametrize("verb", ["compile --quiet", "prune --sparsity 0.5"])
def test_unwritable_output(verb: str, output: str, refused: Refused) -> None:
    refused(f"{verb} good.onnx -o {output}", 1, ("cannot write", output))


@pytest.mark.parametrize("verb", ["compile --quiet --no-verify", "prune --sparsity 0.5"])
def test_full_disk(verb: str, folder: Path) -> None:
    """Files may not grow beyond a limit that the weights, and nothing else, exceed."""
    big = np.random.default_rng(0).standard_normal((K, 1 << 16)).astype(np.float32)
    onnx.save(tiny_model(big), folder / "big.onnx")
    (folder / "keep").write_text("what was here before")
    before = sorted(folder.rglob("*"))
    code = (
        "import resource, sys; from sparse_tvm.cli import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)); sys.exit(main())"
    )
    command = [sys.executable, "-c", code, *verb.split(), "big.onnx", "-o", "keep"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert_clear(result.stderr, ("cannot write", "keep", "File too large"))
    assert sorted(folder.rglob("*")) == before
    assert (folder / "keep").read_text() == "what was here before"


def test_block_that_does_not_divide_is_padded(folder: Path) -> None:
    command = "compile good.onnx -o model.so --quiet --format bsr --block 3x5"
    assert main(shlex.split(command)) == 0
    (layer,) = read_manifest(folder / "model.so")["layers"]
    assert (layer["format"], layer["block"]) == ("bsr", [3, 5])


INPUTS = {
    "wrong name": ({"z": np.zeros((TOKENS, K), np.float32)}, ("z", "x")),
    "missing": ({}, ("x",)),
    "wrong dtype": ({"x": np.zeros((TOKENS, K), np.int64)}, ("x", "int64", "float32")),
    "wrong shape": ({"x": np.zeros((TOKENS, K + 1), np.float32)}, ("x", "17", "16")),
    "wrong rank": ({"x": np.zeros(K, np.float32)}, ("x", "[16]")),
}


@pytest.mark.parametrize("case", INPUTS)
def test_run_refuses_input(case: str, artifact: Path, refused: Refused) -> None:
    arrays, words = INPUTS[case]
    np.savez("in.npz", **arrays)
    refused(f"run {artifact.name} -i in.npz -o out.npz", 1, words)


def npz(compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive, archive.open("x.npy", "w") as member:
        np.lib.format.write_array(member, np.zeros((TOKENS, K), np.float32))
    return file.getvalue()


def with_method(method: int) -> bytes:
    """Claim another compression method, in the member's header and in the directory."""
    data = bytearray(npz())
    directory = data.index(b"PK\x01\x02")
    data[8:10] = data[directory + 10 : directory + 12] = method.to_bytes(2, "little")
    return bytes(data)


def encrypted() -> bytes:
    data = bytearray(npz())
    directory = data.index(b"PK\x01\x02")
    data[6] |= 1
    data[directory + 8] |= 1
    return bytes(data)


DAMAGED_NPZ = [
    npz(zipfile.ZIP_DEFLATED)[:60] + b"\xff" * 20 + npz(zipfile.ZIP_DEFLATED)[80:],
    with_method(99),
    with_method(12),
    encrypted(),
    npz().replace(b"(4, 16)", b"(4,-16)"),
    npz().replace(b"'<f4'", b"'|O8'"),
]


@pytest.mark.parametrize(
    "content", [None, b"", b"not an archive", b"PK\x03\x04 cut off", *DAMAGED_NPZ]
)
def test_run_refuses_input_file(
    content: bytes | None, artifact: Path, folder: Path, refused: Refused
) -> None:
    if content is not None:
        (folder / "in.npz").write_bytes(content)
    refused(f"run {artifact.name} -i in.npz -o out.npz", 1, ("in.npz",))


def test_run_refuses_unwritable_output(artifact: Path, refused: Refused) -> None:
    refused(f"run {artifact.name} --random -o missing/out.npz", 1, ("missing/out.npz",))


def newer_format(data: bytes) -> bytes:
    """Raise the format version, which stands before the 8 bytes of the footer's magic."""
    return data[:-12] + (99).to_bytes(4, "little") + data[-8:]


BAD_ARTIFACTS: dict[str, tuple[Callable[[bytes], bytes] | None, tuple[str, ...]]] = {
    "missing": (None, ("no such file",)),
    "empty": (lambda data: b"", ("empty",)),
    "text": (lambda data: b"hello\n", ("not a",)),
    "foreign library": (lambda data: data[:4096], ("sparse-tvm", "compile")),
    "truncated": (lambda data: data[:-100], ("truncated",)),
    "cut in the middle": (lambda data: data[:5000] + data[-32:], ("truncated",)),
    "damaged manifest": (lambda data: data[:-60] + b"?" + data[-59:], ("damaged",)),
    "newer format": (newer_format, ("99", "upgrade")),
}


@pytest.mark.parametrize("verb", ["run --random", "bench", "inspect", "verify"])
@pytest.mark.parametrize("case", BAD_ARTIFACTS)
def test_bad_artifact(
    verb: str, case: str, compiled: bytes, folder: Path, refused: Refused
) -> None:
    damage, words = BAD_ARTIFACTS[case]
    if damage is not None:
        (folder / "bad.so").write_bytes(damage(compiled))
    refused(f"{verb} bad.so", 1, ("bad.so", *words))


def test_verify(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", artifact.name, artifact.name]) == 0
    assert capsys.readouterr().out.count("good.so: sound") == 2


@pytest.mark.parametrize("verb", ["run --random", "bench"])
def test_cpu_without_the_features(verb: str, artifact: Path, refused: Refused) -> None:
    manifest = read_manifest(artifact)
    manifest["target"]["features"] += ["avx1024"]
    rewrite_manifest(artifact, manifest)
    refused(f"{verb} {artifact.name}", 1, (artifact.name, "avx1024", "--target"))


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ("--against missing.onnx", 1, ("missing.onnx",)),
        ("--threads 0", 2, ("threads", "0")),
        ("--duration=-1", 2, ("duration", "-1")),
        ("--json missing/out.json", 1, ("missing/out.json",)),
    ],
)
def test_bench_refuses(
    options: str, code: int, words: tuple[str, ...], artifact: Path, refused: Refused
) -> None:
    if "--duration" not in options:
        options += " --warmup 0 --duration 0.01"
    refused(f"bench {artifact.name} {options}", code, words)


def test_bench_against_a_foreign_library(
    artifact: Path, compiled: bytes, folder: Path, refused: Refused
) -> None:
    (folder / "foreign.so").write_bytes(compiled[:4096])
    refused(f"bench {artifact.name} --against foreign.so", 1, ("foreign.so", "sparse-tvm"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--sparsity 1.5", ("sparsity", "1.5")),
        ("--sparsity half", ("--sparsity", "half")),
        ("--sparsity 0.5 --structure lumps", ("lumps", "4x1")),
        ("--sparsity 0.5 --structure 0x4", ("0x4",)),
        ("--sparsity 0.9 --structure 2:4", ("2:4", "0.9")),
        ("--sparsity 0.5 --structure 5:4", ("5:4",)),
        ("--sparsity 0.5 --scope local", ("local", "uniform")),
        ("--sparsity 0.5 --layers '(fc'", ("(fc",)),
        ("--sparsity 0.5 --layers nothing", ("nothing",)),
    ],
)
def test_prune_refuses_option(options: str, words: tuple[str, ...], refused: Refused) -> None:
    refused(f"prune good.onnx -o pruned.onnx {options}", 2, words)


@pytest.mark.parametrize("verb", ["inspect", "prune --sparsity 0.5 -o pruned.onnx"])
@pytest.mark.parametrize("case", ["missing", "empty", "text", "truncated", "lost data"])
def test_other_verbs_refuse_model(verb: str, case: str, refused: Refused) -> None:
    refused(f"{verb} bad.onnx", 1, write_bad_model(case))
