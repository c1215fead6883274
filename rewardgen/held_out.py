"""A run's evaluations on held-out examples, and the monitor that watches them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Self

from rich.console import Console

from rewardgen.config import Experiment
from rewardgen.errors import UserError
from rewardgen.evaluation.evaluate import Evaluation, add_counts, evaluate
from rewardgen.evaluation.monitor import Monitor, statistics_metrics, with_diversity
from rewardgen.learner import Learner
from rewardgen.manifest import write_counts
from rewardgen.report import METRICS
from rewardgen.reward import Reward
from rewardgen.types import Example


def evaluate_held_out(
    experiment: Experiment,
    learner: Learner,
    examples: list[Example],
    metrics: Mapping[str, Reward],
    *,
    averaged: bool = True,
    monitored: bool = False,
) -> Evaluation:
    """Held-out scores of the policy as it is; with `averaged`, of its averaged weights where the run keeps them.

    With `monitored`, and where the experiment has a monitor, they have its statistics too.
    """
    settings = experiment.evaluation
    monitored = monitored and experiment.monitor.enabled
    weights: AbstractContextManager[None] = learner.averaged() if averaged else nullcontext()
    draw = partial(
        evaluate,
        learner.policy,
        image_size=experiment.rollout.image_size,
        num_steps=settings.num_steps or experiment.rollout.num_steps,
        batch_size=settings.batch_size,
        precision=experiment.train.precision,
    )
    measured = {**metrics, **(statistics_metrics() if monitored else {})}
    with weights:
        evaluation = draw(examples, measured, seed=settings.seed, keep_pixels=settings.grid_examples)
        few = examples[: experiment.monitor.diversity_examples]
        if not monitored or not few:
            return evaluation
        others = [draw(few, {}, seed=settings.seed + more, keep_pixels=len(few)) for more in (1, 2)]
    return with_diversity(evaluation, others)


def open_monitor(experiment: Experiment, folder: Path) -> Monitor | None:
    """The run's watch over its rewards; what is bounded or has no weight is not trained for. None where it is off.

    Raises:
        ConfigError: `monitor.control` is no folder of a run.
    """
    if not experiment.monitor.enabled:
        return None
    terms = experiment.objective.rewards.items()
    trained_for = [name for name, term in terms if term.weight and term.bound is None]
    return Monitor(experiment.monitor, folder, rewards=trained_for, witnesses=experiment.evaluation.witnesses)


def warn(monitor: Monitor | None, step: int, now: Evaluation, examples: list[Example], console: Console) -> list[str]:
    """Let the monitor look at an evaluation; print what it finds and return it."""
    found = [str(finding) for finding in monitor.check(step, now, examples)] if monitor else []
    if monitor is not None and (remark := monitor.remark(step)):
        console.print(f"note: {remark}", markup=False, highlight=False)
    for warning in found:
        console.print(f"warning: {warning}", markup=False, highlight=False)
    return found


class Tally:
    """What a run's rewards and witnesses counted (`Score.counts`), such as a judge's answers by the way they came.

    As a context it writes them at its end.

    Args:
        folder: the run's folder, which has a manifest and `metrics.jsonl`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._evaluations: defaultdict[str, dict[str, float]] = defaultdict(dict)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        try:
            self.write()
        except UserError:
            if failed is None:  # otherwise the run's own error says more
                raise

    def add(self, evaluation: Evaluation | None) -> None:
        """Add an evaluation's counts to those of the earlier ones."""
        for name, counts in (evaluation.counts() if evaluation else {}).items():
            add_counts(self._evaluations[name], counts)

    def write(self) -> None:
        """Write them into the manifest, for training and for this start's evaluations.

        Training is the whole run, also before a resume. Its rewards are among the evaluation's metrics, and what these
        counted there is summed up here: `metrics.jsonl` does not tell a count from a mean.

        Raises:
            UserError: the manifest cannot be written.
        """
        training: defaultdict[str, dict[str, float]] = defaultdict(dict)
        for told in _told(self._folder / METRICS):
            for name, counts in self._evaluations.items():
                found = {what: told.get(f"reward/{name}/{what}") for what in counts}
                add_counts(training[name], {what: value for what, value in found.items() if value is not None})
        counted = {name: counts for name, counts in training.items() if counts}
        write_counts(self._folder, {"training": counted, "evaluation": self._evaluations})


def _told(path: Path) -> list[dict[str, Any]]:
    """The metrics of each step in a `metrics.jsonl`; lines that are none, and a file that is not there, have none."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            said = json.loads(line)
        except ValueError:
            continue
        if isinstance(said, dict) and isinstance(said.get("metrics"), dict):
            found.append(said["metrics"])
    return found
