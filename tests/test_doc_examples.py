"""What the documentation says to type is run, page by page, or stands in `NOT_RUN` with the reason.

Each page has a directory of its own, with the models and data that all pages speak of, and its
examples run there in order. What needs another environment than the compiler's is run by that
environment's script: ``scripts/test_sources.sh``, ``test_serving.sh`` and ``test_cuda.sh`` call
their test of this file.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import typer
from doc_pages import PAGES, ROOT, Block, Command, blocks, commands, inline_commands
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

import sparse_tvm
from sparse_tvm.cli import main
from sparse_tvm.cli.app import app
from sparse_tvm.models import bert
from sparse_tvm.serving.local import LocalServer

NOT_RUN = {
    r"(sudo )?apt-get install": "changes the system",
    r"pip install": "changes the environment",
    r"bash scripts/(setup|test\w*)\.sh": "is what runs this test, or sets up for it",
    r"bash scripts/quickstart\.sh": "sets up .venv and takes minutes; check_pythons.py runs it",
    r"python scripts/cuda_(device|runtime|speed|attention)\.py": "needs a GPU",
    r'.*device="cuda:0"': "needs a GPU",
    r"python scripts/ship_records\.py": "tunes for half an hour",
    r"python scripts/mca\.py": "needs llvm-mca",
    r"python scripts/zoo\.py": "takes hours, and needs torchvision and timm",
    r"python scripts/onnx_suite\.py": "takes minutes; tests/test_onnx_suite.py runs a part",
    r"python scripts/prune_minilm\.py": "trains for an hour",
    r"python scripts/bench_classifiers\.py": "trains for an hour, and needs WordNet",
    r"python scripts/bench_pruning\.py": "takes an hour, and needs WordNet",
    r"python scripts/(bench_\w+|roofline)\.py": "measures for minutes",
    r"sparse-tvm bench mobilenet_v2\.so": "measures for minutes a model to be compiled first",
    r"python scripts/check_(plans|cost_model|tuning)\.py": "measures for minutes",
    r"python scripts/(load_test|soak|malformed_requests|chaos)\.py": "loads a server for minutes",
    r"minisign -[GS]": "asks for a password",
    r"minisign -V": "needs the key of -G",
    r"scp pi\.so": "needs an Arm board",
    r"sparse-tvm (bench|serve) pi\.so": "needs an Arm board",
    r"sparse-tvm tune .*--host": "needs an Arm board",
    r"sparse-tvm tune --fit": "needs records of many kernels; tests/tuning fits some",
    r"sparse-tvm run bert\.so --random$": "needs a GPU: it was compiled for one",
    r"from ray import serve": "starts a cluster; tests/test_serving_ray.py starts one",
    r".*\bMyFamily\b": "is the reader's own; tests/extension has one",
}
"""What is not run, by how the command begins, or the Python block has it; and what keeps it."""

SUITES = {
    "cuda": r"sparse-tvm compile .*--target cuda",
    "serving": r"sparse-tvm serve|curl|import tritonclient",
    "sources": r"sparse-tvm compile path/to/model|.*\bsparse_tvm\.torch\b|.*\bimport torch$",
}
"""What runs in another environment than the compiler's, by how it begins, or has it in a line."""

NEEDS = {"cuda": "cuda.bindings", "serving": "gevent", "sources": "transformers"}

QUICKLY = {
    "bench": ["--warmup", "0", "--duration", "0.1"],
    "plan": ["--no-measure"],
    "tune": ["--time", "5s"],
    "serve": ["--drain", "0"],
}
"""What is added to a verb's arguments, for the sake of time."""

IN_SMALL = {"--latency 5ms": "--speedup 1.2x", "--threads 1,8": "--threads 1"}
"""What does not suit small models and machines, and what is run in place of it."""

SHOWN = {"", "text", "csv", "toml"}
"""Languages of blocks that show something, and are not to be typed."""

TOKENS = 128


def matches(pattern: str, text: str) -> bool:
    """Tell whether a command, or a line of Python, begins as the pattern says."""
    return any(re.match(pattern, line) for line in text.splitlines())


def suite_of(text: str) -> str:
    return next((suite for suite, pattern in SUITES.items() if matches(pattern, text)), "compiler")


def not_run(text: str) -> bool:
    return any(matches(pattern, text) for pattern in NOT_RUN)


def examples(page: Path) -> Iterator[Command | Block]:
    """Yield what a page says to type: commands, and blocks of Python."""
    for block in blocks(page):
        if block.language in ("bash", "console"):
            yield from commands(block)
        elif block.language == "python":
            yield block
        else:
            assert block.language in SHOWN, f"{block.page}:{block.line}: {block.language}?"


def text_of(example: Command | Block) -> str:
    return example.plain if isinstance(example, Command) else example.text


EXAMPLES = [example for page in PAGES for example in examples(page)]


def pages_of(suite: str) -> list[str]:
    run = [one for one in EXAMPLES if not not_run(text_of(one))]
    return list(dict.fromkeys(one.page for one in run if suite_of(text_of(one)) == suite))


# What all pages speak of.


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a directory with every file that the pages speak of."""
    directory = tmp_path_factory.mktemp("models")
    size: dict[str, Any] = {"layers": 1, "hidden": 64, "heads": 2, "intermediate": 64}
    plain = bert.BertConfig(**size, token_types=0)
    with within(directory):
        # Of one size, as that compiles in seconds; the others take any.
        onnx.save(bert.build_bert(plain, batch=1, sequence=TOKENS, pooler=True), "model.onnx")
        any_size = bert.build_bert(plain, batch="batch", sequence="sequence", pooler=True)
        encoder = bert.build_bert(bert.BertConfig(**size), batch="batch", sequence="sequence")
        for source, pruned in (
            ("model.onnx", "pruned.onnx"),
            (any_size, "bert.onnx"),
            (encoder, "minilm.onnx"),
        ):
            sparse_tvm.prune(source, pruned, sparsity=0.9, structure="4x1")
        sparse_tvm.compile("bert.onnx", "model.so", verify=False)
        sparse_tvm.compile("minilm.onnx", "minilm.so", verify=False)
        for name in ("in.npz", "sentences.npz"):
            np.savez(name, **inputs())
        np.savez("data.npz", **inputs(samples=4))
        np.savez("int32.npz", **{name: ids.astype(np.int32) for name, ids in inputs().items()})
        Path("sentences.txt").write_text("A man eats.\nA plane takes off.\n" * 16)
        Path("shapes.csv").write_text("in,out,tokens,count\n768,768,128,48\n")
        write_tokenizer()
        Path("examples").symlink_to(ROOT / "examples")
        Path(".venv").symlink_to(sys.prefix)
    return directory


def write_tokenizer() -> None:
    """Write a tokenizer of a few words, for prune and beside the model that is served."""
    words = {
        word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "Hello"])
    }
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    Path("minilm.tokenizer").mkdir()
    for path in ("tokenizer.json", "minilm.tokenizer/tokenizer.json"):
        tokenizer.save(path)
    config = {
        "max_position_embeddings": 512,
        "vocab_size": bert.BertConfig().vocabulary,
        "pad_token_id": 0,
    }
    Path("minilm.tokenizer/config.json").write_text(json.dumps(config))


def inputs(samples: int = 1) -> dict[str, np.ndarray]:
    ids = np.arange(samples * TOKENS).reshape(samples, TOKENS)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def names(suite: str) -> dict[str, Any]:
    """Return what the Python of a suite's pages takes as given."""
    feed = inputs()
    given: dict[str, Any] = {"ids": feed["input_ids"], "mask": feed["attention_mask"]}
    if suite == "sources":
        return given | torch_names()
    return given | {"inputs": feed, "model": sparse_tvm.load("model.so", threads=2)}


def torch_names() -> dict[str, Any]:
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    config = BertConfig(
        num_hidden_layers=1,
        hidden_size=32,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=50,
    )
    BertModel(config).save_pretrained("path/to/model")
    model = torch.nn.ModuleDict({"encoder": torch.nn.Linear(32, 32)})
    tokens = dict.fromkeys(("input_ids", "attention_mask"), torch.ones(2, 32, dtype=torch.int64))
    return {
        "module": torch.nn.Linear(32, 16),
        "x": torch.ones(2, 32),
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters()),
        "batches": [tokens] * 3,
        "loss": lambda model, batch: model["encoder"](batch["attention_mask"].float()).sum(),
        "teacher": BertForSequenceClassification(config),
        "student": BertForSequenceClassification(config),
    }


@contextmanager
def within(directory: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


# Running.


class Page:
    """A page's examples of one suite, run in order in a directory of their own."""

    def __init__(self, suite: str, capfd: pytest.CaptureFixture[str]) -> None:
        self.names = names(suite)
        self.capfd = capfd
        self.server: LocalServer | None = None

    def run(self, example: Command | Block) -> None:
        if isinstance(example, Block):
            text = "\n" * (example.line - 1) + self.here(example.text)
            exec(compile(text, example.page, "exec"), self.names)
            return
        arguments = shlex.split(self.here(example.text), comments=True)
        if arguments[:2] == ["sparse-tvm", "serve"]:
            self.serve(arguments[2:])
        elif arguments[0] == "sparse-tvm":
            self.call(example, arguments[1:])
        elif arguments[0] == "curl":
            shell(self.here(example.text) + " --fail-with-body")
        else:
            shell(example.text)

    def here(self, text: str) -> str:
        """Return an example as it suits this directory and server."""
        for written, small in IN_SMALL.items():
            text = text.replace(written, small)
        return text if self.server is None else text.replace("localhost:8000", self.server.url[7:])

    def call(self, command: Command, arguments: list[str]) -> None:
        self.capfd.readouterr()
        code = main([*arguments, *QUICKLY.get(arguments[0], [])])
        said = "".join(self.capfd.readouterr())
        assert (code == 0) is not command.output.startswith("error:"), f"exits {code}: {said}"
        assert command.output in said

    def serve(self, arguments: list[str]) -> None:
        self.stop()
        self.server = LocalServer([Path(one) for one in arguments], *QUICKLY["serve"])
        self.server.wait_for("ready")

    def stop(self) -> None:
        if self.server is not None:
            assert self.server.terminate() == 0
            self.server = None


def shell(command: str) -> None:
    program = shlex.split(command)[0]
    if not (shutil.which(program) or Path(program).exists()):
        pytest.skip(f"needs {program}")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"


def run_page(suite: str, page: str, directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with within(directory):
        of_suite = Page(suite, capfd)
        try:
            for example in EXAMPLES:
                text = text_of(example)
                if example.page == page and suite_of(text) == suite and not not_run(text):
                    try:
                        of_suite.run(example)
                    except Exception as error:
                        error.add_note(f"{page}:{example.line}: {text}")
                        raise
        finally:
            of_suite.stop()


@pytest.fixture
def directory(models: Path, tmp_path: Path) -> Path:
    return shutil.copytree(models, tmp_path / "page", symlinks=True)


def needs(suite: str) -> None:
    try:
        importlib.import_module(NEEDS[suite])
    except ImportError as error:
        pytest.skip(f"{error}: scripts/test_{suite}.sh runs it")


@pytest.mark.parametrize("page", pages_of("compiler"))
def test_compiler(page, directory, capfd):
    run_page("compiler", page, directory, capfd)


@pytest.mark.parametrize("page", pages_of("sources"))
def test_sources(page, directory, capfd):
    needs("sources")
    run_page("sources", page, directory, capfd)


@pytest.mark.parametrize("page", pages_of("serving"))
def test_serving(page, directory, capfd):
    needs("serving")
    run_page("serving", page, directory, capfd)


@pytest.mark.parametrize("page", pages_of("cuda"))
def test_cuda(page, directory, capfd):
    needs("cuda")
    run_page("cuda", page, directory, capfd)


# What is not run is checked as far as it can be.


def test_every_reason_not_to_run_is_of_an_example():
    texts = [text_of(example) for example in EXAMPLES]
    unused = [pattern for pattern in NOT_RUN if not any(matches(pattern, one) for one in texts)]
    assert not unused


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_stands_behind_fences(page):
    assert not [block.line for block in blocks(page) if not block.language]


def typed(program: str) -> list[Command]:
    commands_of_pages = [example for example in EXAMPLES if isinstance(example, Command)]
    return [command for command in commands_of_pages if command.plain.startswith(program)]


@pytest.mark.parametrize("command", typed("sparse-tvm"), ids=lambda one: f"{one.page}:{one.line}")
def test_arguments_parse(command):
    _, verb, *arguments = command.arguments
    typer.main.get_command(app).commands[verb].make_context(verb, arguments)


def test_arguments_of_scripts_parse():
    scripts = typed("python scripts/")
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "script_arguments.py"],
        input=json.dumps([command.arguments[1:] for command in scripts]),
        env=os.environ | {"PYTHONPATH": str(ROOT / "scripts")},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    faults = json.loads(done.stdout)
    assert not [
        f"{command.page}:{command.line}: {command.plain}: {fault}"
        for command, fault in zip(scripts, faults, strict=True)
        if fault
    ]


def test_shell_scripts_are_there():
    for command in typed("bash"):
        assert (ROOT / command.arguments[1]).exists(), command


def test_extras_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for command in typed("pip install"):
        assert project["name"] not in command.arguments, "it is on no index"
        for extras in re.findall(r"\.\[([\w,-]+)\]", command.plain):
            assert set(extras.split(",")) <= project["optional-dependencies"].keys(), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_text_are_there(page):
    for command in inline_commands(page):
        script = re.search(r"scripts/\S*", command)
        verb = re.match(r"sparse-tvm (\w+)", command)
        if script:
            assert (ROOT / script[0]).exists(), command
        else:
            options = {re.split("[^a-z-]", word)[0] for word in command.split() if word[:2] == "--"}
            assert options <= options_of(verb[1] if verb else None), command


def options_of(verb: str | None) -> set[str]:
    """Return the options of a verb, or of all."""
    group = typer.main.get_command(app)
    verbs = [group.commands[verb]] if verb else [group, *group.commands.values()]
    parameters = [parameter for one in verbs for parameter in one.params]
    return {name for one in parameters for name in (*one.opts, *one.secondary_opts)} | {"--help"}
