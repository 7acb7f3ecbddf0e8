from __future__ import annotations

import errno
import shlex
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import typer
from onnx_models import build, normal
from sample_manifest import sample_manifest

import sparse_tvm
from sparse_tvm.cli import main
from sparse_tvm.cli.app import app
from sparse_tvm.cli.examples import EXAMPLES
from sparse_tvm.errors import ModelError, OptionError, SparseTvmError, VerificationError
from sparse_tvm.sparsity.masks import prune_array

VERBS = tuple(EXAMPLES)


@pytest.fixture
def fake_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[..., Any]], None]:
    """Put a function in the compiler's place, so that a test needs neither TVM nor more of
    model.onnx than that it exists."""
    monkeypatch.chdir(tmp_path)
    Path("model.onnx").touch()

    def install(function: Callable[..., Any]) -> None:
        module = types.ModuleType("sparse_tvm.compiler")
        module.compile = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "sparse_tvm.compiler", module)

    return install


def failing_with(error: BaseException) -> Callable[..., Any]:
    def compile(*arguments: Any, **options: Any) -> Any:
        raise error

    return compile


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    code = """
import sys
from sparse_tvm.cli import main
from sparse_tvm.cli.app import app
from sparse_tvm.cli.examples import EXAMPLES
sys.modules["typing_extensions"] = None
sys.exit(main(["inspect", "model.onnx"]))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: a package is missing: ")
    assert "typing_extensions" in done.stderr


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert f"sparse-tvm {verb}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sparse-tvm {sparse_tvm.__version__}\n"


def test_usage_error_is_one_line_and_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "model.onnx", "-o", "model.so", "--treads", "2"]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert "--treads" in error
    assert hint == "hint: see `sparse-tvm compile --help`"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SparseTvmError("it failed", hint="try less"), 1),
        (ModelError("it failed", hint="try less"), 1),
        (OptionError("it failed", hint="try less"), 2),
        (VerificationError("it failed", hint="try less"), 3),
    ],
)
def test_expected_error(
    error: SparseTvmError,
    code: int,
    fake_compile: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake_compile(failing_with(error))
    assert main(["compile", "model.onnx", "-o", "model.so", "--quiet"]) == code
    assert capsys.readouterr().err == "error: it failed\nhint: try less\n"


@pytest.mark.parametrize("place", ["before", "after"])
def test_debug_shows_the_traceback(
    place: str, fake_compile: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    fake_compile(failing_with(ModelError("it failed")))
    arguments = ["compile", "model.onnx", "-o", "model.so"]
    assert main(["--debug", *arguments] if place == "before" else [*arguments, "--debug"]) == 1
    text = capsys.readouterr().err
    assert "Traceback" in text
    assert text.endswith("error: it failed\n")


def test_bug_is_reported_without_traceback(
    fake_compile: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    fake_compile(failing_with(ValueError("[bold]odd\nand long")))
    assert main(["compile", "model.onnx", "-o", "model.so", "--quiet"]) == 70
    assert capsys.readouterr().err == (
        "internal error: ValueError: [bold]odd\nhint: run again with --debug and report it\n"
    )


def test_full_disk_is_no_bug(
    fake_compile: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    fake_compile(failing_with(OSError(errno.ENOSPC, "No space left on device", "model.so")))
    assert main(["compile", "model.onnx", "-o", "model.so", "--quiet"]) == 1
    assert capsys.readouterr().err == "error: cannot access model.so: No space left on device\n"


def test_interrupt(fake_compile: Callable[..., None]) -> None:
    fake_compile(failing_with(KeyboardInterrupt()))
    assert main(["compile", "model.onnx", "-o", "model.so", "--quiet"]) == 130


def test_compile_passes_its_options_on_and_shows_the_result(
    tmp_path: Path, fake_compile: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, Any] = {}

    def compile(model: Path, output: Path, **options: Any) -> Any:
        seen.update(options)
        options["progress"]("build")
        return types.SimpleNamespace(path=output, manifest=sample_manifest())

    fake_compile(compile)
    report = tmp_path / "report.md"
    arguments = ["compile", "model.onnx", "-o", "model.so", "--report", str(report), "--no-verify"]
    rules = ["--layer", "query=dense", "--layer", "x=csr"]
    assert main([*arguments, *rules, "--input-shape", "input:0:1,128"]) == 0
    assert seen["layer_rules"] == ["query=dense", "x=csr"]
    assert seen["input_shapes"] == {"input:0": (1, 128)}
    assert seen["report"] == [report]
    assert seen["verify"] is False
    captured = capsys.readouterr()
    assert "build" in captured.err
    assert "bsr 4x1" in captured.out
    assert "wrote model.so" in captured.out


def test_dry_run_says_what_would_become_sparse_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    graph = "(float[m, 512] x) => (float[m, 512] y) { y = MatMul(x, w) }"
    onnx.save(build(graph, w=prune_array(normal(512, 512), 0.9, "1x4")), "layer.onnx")
    assert main(["compile", "layer.onnx", "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert "bsr 4x1" in captured.out
    assert "faster than dense (predicted)" in captured.out
    assert "nothing was written: a dry run" in captured.out
    assert "build" not in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["layer.onnx"]
    same = sparse_tvm.compile("layer.onnx", "layer.so", verify=False).manifest
    foreseen = sparse_tvm.preview("layer.onnx")
    decided = ("format", "block", "reason", "times", "bytes")
    assert [[layer[key] for key in decided] for layer in foreseen["layers"]] == [
        [layer[key] for key in decided] for layer in same["layers"]
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no --output"),
        (["--dry-run", "-o", "model.so"], "--dry-run writes nothing, but --output was given"),
        (["--dry-run", "--report", "a.md"], "--dry-run writes nothing, but --report was given"),
    ],
)
def test_compile_writes_somewhere_or_is_a_dry_run(
    arguments: list[str],
    message: str,
    fake_compile: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake_compile(failing_with(AssertionError("must not be called")))
    assert main(["compile", "model.onnx", "-q", *arguments]) == 2
    assert f"error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["ids", "ids:", ":1,2", "ids:1,0", "ids:1,,2"])
def test_bad_input_shape_is_refused(
    value: str, fake_compile: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    fake_compile(failing_with(AssertionError("must not be called")))
    assert main(["compile", "model.onnx", "-o", "model.so", "-q", "--input-shape", value]) == 2
    assert f"error: --input-shape {value!r}" in capsys.readouterr().err


def test_closed_pipe_is_quiet() -> None:
    command = f"{sys.executable} -c 'import sys; from sparse_tvm.cli import main; sys.exit(main())'"
    result = subprocess.run(
        f"{command} compile --help | true", shell=True, capture_output=True, text=True
    )
    assert result.stderr == ""


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from sparse_tvm.cli import main; main(['--help']);"
        "heavy = {'tvm', 'tvm_ffi', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    run_python(code)


@pytest.mark.parametrize(
    "arguments",
    [
        "compile nosuch.onnx -o model.so",
        "compile model.onnx -o model.so --target nosuch",
        "compile model.onnx -o model.so --format bsr --block 0x1",
        "compile model.onnx -o model.so --layer query=sparse",
        "compile model.onnx -o model.so --input-shape ids",
        "compile model.onnx -o model.so --threads 0",
        "compile model.onnx -o model.so --report report.pdf",
        "compile model.onnx -o nosuch/model.so",
        "run nosuch.so --random",
        "run nosuch.so",
        "bench nosuch.so",
        "inspect nosuch.onnx",
        "prune nosuch.onnx -o pruned.onnx --sparsity 0.9",
        "prune model.onnx -o pruned.onnx --sparsity 2",
        "prune model.onnx -o pruned.onnx --structure 4x",
        "plan nosuch.onnx --latency 5ms -o plan.json",
        "plan model.onnx --latency 5 -o plan.json",
        "plan model.onnx --latency 5ms --size 1MB -o plan.json",
        "plan model.onnx --latency 5ms -o nosuch/plan.json",
        "plan model.onnx --latency 5ms -o plan.json --report plan.pdf",
    ],
)
def test_wrong_arguments_are_refused_before_anything_slow_is_loaded(
    arguments: str, tmp_path: Path
) -> None:
    (tmp_path / "model.onnx").touch()
    code = (
        "import sys; from sparse_tvm.cli import main;"
        f"code = main({arguments.split()!r});"
        "print(code, {'tvm', 'tvm_ffi', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout in ("1 set()\n", "2 set()\n")
    assert done.stderr.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_package_imports_the_compiler_on_use_only() -> None:
    code = (
        "import sys, sparse_tvm;"
        "print(sorted({'tvm', 'tvm_ffi', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules)));"
        "assert set(sparse_tvm.__all__) <= set(dir(sparse_tvm));"
        "assert not hasattr(sparse_tvm, 'nonsense')"
    )
    assert run_python(code) == "[]\n"


@pytest.mark.parametrize("name", sparse_tvm.__all__)
def test_public_names_exist(name: str) -> None:
    assert getattr(sparse_tvm, name)


@pytest.mark.parametrize("verb", VERBS)
def test_the_examples_of_the_help_parse(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = typer.main.get_command(app).get_command(None, verb)  # type: ignore[attr-defined]
    for example in EXAMPLES[verb]:
        program, found, *arguments = shlex.split(example)
        assert (program, found) == ("sparse-tvm", verb)
        command.make_context(verb, arguments)
    assert main([verb, "--help"]) == 0
    assert EXAMPLES[verb][0] in capsys.readouterr().out
