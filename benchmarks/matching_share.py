"""How much of a training step the matching reward takes: `python benchmarks/matching_share.py [--steps 20] [--write]`.

Real steps of `experiments/umo_matching.yaml` at its batch, from its first step on (references are embedded once each,
and most of them at the beginning). Alignment, warp and matching are timed within them, forward and backward, apart from
the networks: the detector, the face network, and all else in the step. The target: alignment, warp and matching
together take less than 5 % of the step. A first few steps warm up and are not counted.

Seconds are exclusive: what a section calls that is a section itself counts there alone. A backward pass has no calls
to time; marks in the graph tell where it is, by the order of their gradients: value, embeddings, crops, pixels.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for a caller that is no neighbour

import cells as shared

from rewardgen import build
from rewardgen.evaluation.compare import student
from rewardgen.fleet.inline import InlinePool
from rewardgen.rewards.faces import encoder as encoder_module
from rewardgen.rewards.matching import MatchingReward
from rewardgen.rollout import RolloutWorker
from rewardgen.trainer import Trainer
from rewardgen.types import Example, Score, StepReport

EXPERIMENT = shared.EXPERIMENT.with_name("umo_matching.yaml")
TARGET = 0.05
WARM_UP = 2
OWN = ("alignment", "warp", "matching")
NETWORKS = ("detector", "face network")
REST = "the rest of the reward: boxes, cache, clamping"
ELSE = "all else in the step"


class Stopwatch:
    """Exclusive seconds by section; the section entered last runs."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys((*OWN, *NETWORKS, REST, ELSE), 0.0)
        self.open_chains = 0
        self._entered = [ELSE]
        self._since = time.perf_counter()

    def _count(self) -> None:
        now = time.perf_counter()
        self.seconds[self._entered[-1]] += now - self._since
        self._since = now

    def enter(self, name: str) -> None:
        """Begin a section within the present one."""
        self._count()
        self._entered.append(name)

    def leave(self) -> None:
        """Go back to what was there before."""
        self._count()
        self._entered.pop()

    def turn_to(self, name: str) -> None:
        """Another section in the present one's place."""
        self.leave()
        self.enter(name)

    def take(self) -> dict[str, float]:
        """The seconds so far, from zero again."""
        self._count()
        taken, self.seconds = self.seconds, dict.fromkeys(self.seconds, 0.0)
        return taken

    def section(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as a section."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.enter(name)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return timed


class _Mark(torch.autograd.Function):
    """Nothing but a call when the gradient comes by."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, passed: Callable[[], None]) -> Tensor:
        ctx.passed = passed
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.passed()
        return grads[0], None


def mark(tensor: Tensor, passed: Callable[[], None]) -> Tensor:
    """The same tensor; `passed` is called when its gradient is there."""
    if not (tensor.requires_grad and torch.is_grad_enabled()):
        return tensor
    marked: Tensor = _Mark.apply(tensor, passed)
    return marked


@contextmanager
def measured(reward: MatchingReward) -> Iterator[Stopwatch]:
    """Time the parts of a reward wherever it is used meanwhile."""
    watch, faces = Stopwatch(), reward.faces
    score, embed, network = reward.score, faces.embed, faces.network.forward

    def pixels_reached() -> None:
        watch.open_chains -= 1
        if watch.open_chains:  # the miss term embeds a second time
            watch.turn_to("matching")
        else:
            watch.leave()

    def timed_score(pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        watch.open_chains = 0
        found = score(pixels_B3HW, examples)
        return replace(found, value_B=mark(found.value_B, lambda: watch.enter("matching")))

    def timed_embed(pixels_B3HW: Tensor, transforms: Sequence[Tensor]) -> list[Tensor]:
        watch.open_chains += pixels_B3HW.requires_grad and torch.is_grad_enabled()
        return embed(mark(pixels_B3HW, pixels_reached), transforms)

    def timed_network(crops_F3SS: Tensor) -> Tensor:
        embedding_FD: Tensor = network(mark(crops_F3SS, lambda: watch.turn_to("warp")))
        return mark(embedding_FD, lambda: watch.turn_to("face network"))

    with ExitStack() as patches:

        def patch(owner: Any, name: str, section: str, function: Callable[..., Any] | None = None) -> None:
            timed = watch.section(section, function or getattr(owner, name))
            patches.enter_context(mock.patch.object(owner, name, timed))

        patch(reward, "score", "matching", timed_score)
        for name in ("compare", "find", "references"):
            patch(faces, name, REST)
        patch(faces, "embed", REST, timed_embed)
        patch(faces, "align", "alignment")
        patch(encoder_module, "is_usable", "alignment")
        patch(encoder_module, "warp", "warp")
        patch(faces.network, "forward", "face network", timed_network)
        patch(faces.detector, "detect", REST)
        if isinstance(faces.detector, torch.nn.Module):
            patch(faces.detector, "forward", "detector")
        yield watch


class Silent:
    """A reporter that keeps the last report."""

    def step(self, report: StepReport) -> None:
        self.last = report


def make(overrides: Sequence[str], folder: Path) -> Trainer:
    """The bundled experiment's trainer."""
    experiment = shared.load(0, ["evaluation.grid_examples=0", *overrides], examples=1, path=EXPERIMENT)
    parts = build.assemble(experiment)
    return Trainer(
        parts.learner,
        InlinePool(RolloutWorker(parts.policy, precision=experiment.train.precision, colocated=True)),
        parts.train_data,
        rollout=experiment.rollout,
        config=experiment.train,
        seed=experiment.seed,
        folder=folder,
        reporter=Silent(),
    )


def measure(trainer: Trainer, steps: int) -> list[dict[str, float]]:
    """Seconds by section of each of `steps` steps, after a warm-up."""
    (reward,) = trainer.learner.objective.rewards.values()
    if not isinstance(reward, MatchingReward):
        raise SystemExit(f"the experiment's reward is {type(reward).__name__}, not MatchingReward")
    found = []
    with measured(reward) as watch:
        for step in range(WARM_UP + steps):
            watch.take()
            report = trainer.step(step)
            seconds = watch.take()
            if report.skipped or not sum(report.valid_counts.values()):
                raise SystemExit(f"step {step} was skipped: there is nothing to measure")
            if step >= WARM_UP:
                found.append(seconds)
    return found


def share(steps: Sequence[dict[str, float]], names: Sequence[str]) -> dict[str, float]:
    """Mean share of a step, of the sections together, with its 95 % interval (Student's t over the steps)."""
    of_step_N = torch.tensor([sum(step[n] for n in names) / sum(step.values()) for step in steps], dtype=torch.float64)
    interval = student(of_step_N, 0.95)
    if interval is None or interval.low is None or interval.high is None:
        raise SystemExit("an interval needs two steps")
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def render(result: dict[str, Any]) -> str:
    """The figures in Markdown."""
    steps = result["steps"]

    def row(label: str, names: Sequence[str]) -> list[str]:
        milliseconds = 1000 * sum(step[name] for step in steps for name in names) / len(steps)
        found = share(steps, names)
        return [label, f"{milliseconds:.1f}", *(f"{100 * found[name]:.2f}" for name in ("value", "low", "high"))]

    rows = [row(name, [name]) for name in (*OWN, *NETWORKS, REST, ELSE)]
    rows.insert(len(OWN), row("**alignment, warp and matching together**", OWN))
    rows.insert(len(OWN) + 1 + len(NETWORKS), row("**both networks**", NETWORKS))
    machine, found = result["machine"], share(steps, OWN)
    note = (
        f"{len(steps)} steps of `{EXPERIMENT.name}` at its batch of {result['batch']}, forward and backward; 95 %"
        f" interval over the steps; {machine['threads']} threads on {machine['cpus']} CPUs ({machine['processor']}),"
        f" torch {machine['torch']}. Target: alignment, warp and matching less than {100 * TARGET:.0f} % of the step at"
        f" the upper end: **{'met' if found['high'] < TARGET else 'not met'}**."
    )
    table = [shared.line(["", "ms a step", "share, %", "low", "high"]), "|" + "---|" * 5]
    return "\n".join([*table, *map(shared.line, rows), "", note]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="how many are timed, at least 2")
    parser.add_argument("--threads", type=int, help="of torch; its own choice by default")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/matching_share.{json,md}")
    parser.add_argument(
        "overrides", nargs="*", help="of the experiment, such as objective.rewards.people.args.miss=0.5"
    )
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(arguments.overrides, Path(folder))
        steps = measure(trainer, arguments.steps)
    result = {
        "own": share(steps, OWN),
        "networks": share(steps, NETWORKS),
        "batch": trainer.config.batch_size,
        "overrides": arguments.overrides,
        "machine": {
            "threads": torch.get_num_threads(),
            "cpus": os.cpu_count(),
            "processor": platform.machine(),
            "torch": torch.__version__,
        },
        "steps": steps,
    }
    print(render(result))
    if arguments.write:
        (shared.RESULTS / "matching_share.json").write_text(json.dumps(result, indent=1) + "\n")
        (shared.RESULTS / "matching_share.md").write_text(render(result))


if __name__ == "__main__":
    main()
