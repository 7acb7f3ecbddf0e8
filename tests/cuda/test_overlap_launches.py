"""Which kernels are launched before those in front of them are done, and that they wait."""

from __future__ import annotations

import re

import pytest

import sparse_tvm
from sparse_tvm.backends import cuda_codegen
from sparse_tvm.models.bert import BertConfig, build_bert

EARLY = "tirx.use_programtic_dependent_launch"
TINY = BertConfig(layers=1, hidden=64, heads=2, intermediate=128, vocabulary=100, max_positions=16)


@pytest.fixture
def generated(gpu, monkeypatch, tmp_path):
    """Compile a small BERT for a target; what code generation was given and made."""

    def compiled(target: str):
        found = []
        generate = cuda_codegen.generate

        def noted(program, target):
            code = generate(program, target)
            found.append((program.module, code.source))
            return code

        monkeypatch.setattr(cuda_codegen, "generate", noted)
        model = build_bert(TINY, batch=1, sequence=8)
        sparse_tvm.compile(model, tmp_path / "bert.so", target=target, verify=False)
        return found[-1]

    return compiled


def early(module) -> dict[str, bool]:
    """Whether each function is launched early."""
    return {
        var.name_hint: EARLY in (function.attrs.get("tirx.kernel_launch_params") or [])
        for var, function in module.functions.items()
        if hasattr(function, "body") and var.name_hint != "main"
    }


def test_our_kernels_are_and_wait_first(generated):
    module, source = generated("cuda-sm90")
    kernels = early(module)
    ours = {name for name, is_early in kernels.items() if is_early}
    assert {name.split("_")[0] for name in ours} >= {"dense", "attention", "layer"}
    for name in ours:
        declared = source.index(f"{name}_kernel(")
        signature, _, body = source[source.index(f"{name}_kernel(", declared + 1) :].partition("{")
        before, waits, _ = body.partition("stvm_await_previous();")
        assert waits
        assert "\n}" not in before
        # Nothing that another kernel may write, or still read, is touched before.
        for parameter in re.findall(r"\* __restrict__ (\w+)", signature):
            assert not re.search(rf"\b{parameter}\b", before)


def test_others_are_not(generated):
    module, _ = generated("cuda-sm90")
    others = [name for name, is_early in early(module).items() if not is_early]
    assert others
    assert all("take" in name or "multiply" in name or "cast" in name for name in others)


def test_older_devices_cannot(generated):
    module, _ = generated("cuda-sm80")
    assert not any(early(module).values())
    module, _ = generated("cuda")
    assert not any(early(module).values())
