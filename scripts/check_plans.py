"""Check `sparse-tvm plan`: planned against measured latency, and against uniform sparsity.

    python scripts/check_plans.py bert-4          # four layers of BERT-base, 1 x 128 tokens
    python scripts/check_plans.py mobilenet_v2

For five latencies between that of the model and the least that pruning reaches, a plan is made,
followed, compiled and timed, beside the uniform sparsity of the best structure that is predicted to
be as fast, and beside what-ifs. All artifacts are timed in one run, together with the trials that
the plans rest on, which tell how fast the machine is by then: planned latencies are scaled by it.
They are timed as trials are, call by call: the sum over all kernels of the tenth percentile.
Errors are the plan's own (what a layer loses), and what becomes of the output: the norm of its
difference from the unpruned model's, relative to that one's.

Stages can be run one by one, so that only what is timed needs a quiet machine.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import onnx
import typer

import sparse_tvm
from sparse_tvm.cli.console import stdout_console
from sparse_tvm.cli.tables import plain_table
from sparse_tvm.cpu import cpu_model
from sparse_tvm.models.bert import BertConfig, build_bert
from sparse_tvm.models.convnets import build_mobilenet_v2
from sparse_tvm.planning.document import write_plan
from sparse_tvm.planning.planner import Planner, open_subject
from sparse_tvm.planning.prediction import from_trials
from sparse_tvm.planning.settings import Setting
from sparse_tvm.planning.trials import (
    Trial,
    build_trials,
    measure_trials,
    trial_settings,
)
from sparse_tvm.random_inputs import random_inputs
from sparse_tvm.reference import Reference

MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "bert-4": lambda: build_bert(BertConfig(layers=4)),
    "bert": lambda: build_bert(BertConfig()),
    "mobilenet_v2": build_mobilenet_v2,
}
SHARES = (0.85, 0.7, 0.5, 0.3, 0.15)
"""Where the latencies lie between the least that pruning reaches, 0, and the model's, 1."""

WHAT_IFS = ("90%:4x1", "80%:unstructured")
STAGES = ("trials", "time-trials", "plans", "measure")
BUILD = Path(__file__).resolve().parent.parent / "build" / "plans"
WITHIN = 0.1

Planned = tuple[float, float, float, str]
"""Seconds, error, the output's error, and the artifact's name."""


def main(
    model: Annotated[str, typer.Argument(help=", ".join(MODELS))],
    stage: Annotated[list[str] | None, typer.Option(help="Repeatable; all by default.")] = None,
    points: Annotated[int, typer.Option(min=1, help="How many latencies.")] = len(SHARES),
    threads: Annotated[int, typer.Option(min=1)] = 1,
    uniform: Annotated[bool, typer.Option(help="Time uniform sparsity too.")] = True,
    rounds: Annotated[int, typer.Option(help="In which all artifacts take turns.")] = 12,
    workdir: Annotated[Path, typer.Option(help="Where models and plans go.")] = BUILD,
) -> None:
    """Compare plans with what they give."""
    check = Check(model, points, uniform, threads, rounds, workdir / f"{model}-{threads}")
    for name in stage or STAGES:
        {
            "trials": check.build_trials,
            "time-trials": check.time_trials,
            "plans": check.build_plans,
            "measure": check.measure,
        }[name]()


class Check:
    """One model; what a stage finds lies in its directory for the next."""

    def __init__(
        self,
        name: str,
        points: int,
        uniform: bool,
        threads: int,
        rounds: int,
        directory: Path,
    ) -> None:
        self.name, self.threads, self.rounds, self.uniform = name, threads, rounds, uniform
        self.shares = SHARES[len(SHARES) // 2 :][:1] if points == 1 else SHARES[:points]
        self.directory, self.source = directory, directory / "model.onnx"
        directory.mkdir(parents=True, exist_ok=True)
        if not self.source.exists():
            onnx.save(MODELS[name](), self.source)
        self.subject = open_subject(
            self.source, target="native", tokens=128, threads=threads, input_shapes={}
        )
        self.settings = trial_settings(self.subject, self.subject.structures)

    def build_trials(self) -> None:
        build_trials(self.subject, self.settings, self.directory, _compiled, print)

    def time_trials(self) -> None:
        paths = [self.directory / f"trial{number}.so" for number in range(len(self.settings))]
        trials = measure_trials(self.settings, paths, self.threads)
        (self.directory / "trials.pickle").write_bytes(pickle.dumps(trials))

    def timed(self) -> list[Trial]:
        found: list[Trial] = pickle.loads((self.directory / "trials.pickle").read_bytes())
        return found

    def planner(self) -> Planner:
        structures = self.subject.structures
        found = from_trials(self.subject, self.timed(), structures, self.threads)
        return Planner(found, structures)

    def build_plans(self) -> None:
        """Artifacts, each with its latency and error as planned."""
        planner = self.planner()
        prediction = planner.prediction
        dense = prediction.seconds({})
        fastest = prediction.seconds(prediction.uniform(Setting("16x1", 0.97)))
        print(f"trials are predicted within {prediction.worst_error:.1%}")
        planned: dict[str, Planned] = {}
        for share in self.shares:
            plan = planner.plan("latency", fastest + share * (dense - fastest))
            title = f"plan {1e3 * plan.seconds:.3g} ms"
            path = self.directory / f"plan-{share:g}.json"
            write_plan(plan, path)
            sparse_tvm.prune(self.source, path.with_suffix(".onnx"), plan=path)
            _compiled(path.with_suffix(".onnx"), path.with_suffix(".so"))
            lost = self.output_error(path.with_suffix(".onnx"))
            planned[title] = plan.seconds, plan.error, lost, path.stem
            alike = [
                found
                for structure in planner.structures
                for found in [planner.uniform_for(structure, plan.seconds)]
                if found is not None
            ]
            best = min(alike, key=lambda one: planner.error(prediction.uniform(one)))
            title = f"  uniform {best}"
            planned[title] = self._alike(planner, best, build=self.uniform)
        for text in WHAT_IFS[: len(self.shares)]:
            planned[f"what if {text}"] = self._alike(planner, Setting.parse(text))
        (self.directory / "plans.pickle").write_bytes(pickle.dumps(planned))

    def _alike(self, planner: Planner, setting: Setting, build: bool = True) -> Planned:
        """All layers pruned alike."""
        stem = f"uniform-{setting.structure}-{setting.sparsity:g}"
        artifact = self.directory / f"{stem}.so"
        alike = planner.prediction.uniform(setting)
        model = self.subject.pruned(alike)
        if build and not artifact.exists():
            _compiled(model, artifact)
        lost = self.output_error(model.SerializeToString())
        return planner.prediction.seconds(alike), planner.error(alike), lost, stem

    def output_error(self, model: Path | bytes) -> float:
        """How far the output is from the unpruned model's, relative to its norm."""
        difference = self._output(model) - self.unpruned
        return float(np.linalg.norm(difference) / np.linalg.norm(self.unpruned))

    @cached_property
    def unpruned(self) -> np.ndarray:
        return self._output(self.source)

    def _output(self, model: Path | bytes) -> np.ndarray:
        """In ONNX Runtime."""
        feed = random_inputs(sparse_tvm.load(self.directory / "trial0.so").inputs)
        return next(iter(Reference(model, threads=self.threads).run(feed).values()))

    def measure(self) -> None:
        planned = pickle.loads((self.directory / "plans.pickle").read_bytes())
        trials = {f"trial{number}": one.seconds for number, one in enumerate(self.timed())}
        stems = dict.fromkeys((*trials, *(one[-1] for one in planned.values())))
        paths = {stem: self.directory / f"{stem}.so" for stem in stems}
        paths = {stem: path for stem, path in paths.items() if path.exists()}
        timed = measure_trials([{}] * len(paths), list(paths.values()), self.threads, self.rounds)
        seconds = {stem: one.seconds for stem, one in zip(paths, timed, strict=True)}
        pace = median(seconds[stem] / then for stem, then in trials.items())
        numbers = ("planned", "measured", "off by", "error", "output's error")
        table = plain_table("", *numbers, numbers=numbers)
        table.add_row("as it is", "", f"{1e3 * seconds['trial0']:.2f} ms", "", "", "")
        worst = 0.0
        for title, (expected, error, lost, stem) in planned.items():
            cells = ["", ""]
            if stem in seconds:
                off = seconds[stem] / (pace * expected) - 1
                worst = max(worst, abs(off))
                cells = [f"{1e3 * seconds[stem]:.2f} ms", f"{off:+.1%}"]
            at = f"{1e3 * pace * expected:.2f} ms"
            table.add_row(title, at, *cells, f"{error:.1%}", f"{lost:.3f}")
        console = stdout_console()
        console.print(f"{self.name}, {self.threads} threads, {cpu_model()}")
        console.print(f"the machine now takes {pace:.2f} times what it took when trials were timed")
        console.print(table)
        console.print(f"the worst is off by {worst:.1%}; {WITHIN:.0%} are allowed")


def _compiled(model: onnx.ModelProto | Path, artifact: Path) -> None:
    sparse_tvm.compile(model, artifact, verify=False)


if __name__ == "__main__":
    typer.run(main)
