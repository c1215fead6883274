"""A run's evaluations on held-out examples, and the monitor that watches them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

from rich.console import Console

from rewardgen.config import Experiment
from rewardgen.evaluation.evaluate import Evaluation, evaluate
from rewardgen.evaluation.monitor import Monitor, statistics_metrics, with_diversity
from rewardgen.learner import Learner
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
