"""How GPUs are best split between learners, rollout workers and judges: the run's own loop on a virtual clock.

A plan keeps what a step is: its examples, its micro-batches and its staleness. Splits that a lower bound shows to be
slower than one that was simulated are not simulated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from rewardgen.errors import ConfigError
from rewardgen.fleet.costs import Costs, Work
from rewardgen.fleet.sim import SimPool, VirtualClock, step_seconds

_WARM_STEPS = 8
"""Steps until the loop has found its rhythm, and two more for each that is drawn ahead."""
_MEASURED_STEPS = 16
_ENOUGH = 0.999
"""A split that can be faster only by less than this is not looked at; so the fewest GPUs win among equals."""
_MOST_SIMULATED = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """GPUs by what they do. No workers: each learner draws for itself (`fleet.placement: colocated`).

    Where samples are scored and there are no judges, whoever draws them scores them.
    """

    learners: int
    workers: int = 0
    judges: int = 0

    @property
    def gpus(self) -> int:
        """Together."""
        return self.learners + self.workers + self.judges


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What a split makes of a step; shares are of the time, None where there are no such GPUs."""

    split: Split
    staleness: int
    seconds_per_step: float
    learners_busy: float
    workers_busy: float | None
    judges_busy: float | None

    def price(self, steps: int, per_gpu_hour: float) -> float:
        """What so many steps cost, in the unit of `per_gpu_hour`."""
        return steps * self.seconds_per_step / 3600 * self.split.gpus * per_gpu_hour


def forecast(work: Work, costs: Costs, split: Split, staleness: int) -> Forecast:
    """Simulate a split until it has found its rhythm, and then for some steps.

    Raises:
        ConfigError: learners that cannot have equally many micro-batches.
    """
    if work.micro_batches % split.learners:
        raise ConfigError(f"{work.micro_batches} micro-batches cannot be shared equally by {split.learners} learners")
    clock = VirtualClock()
    drawing = costs.rollout_seconds + (0.0 if split.judges else costs.judge_seconds * work.judged / work.requests)
    pool = SimPool(clock, size=split.workers or split.learners, seconds=lambda *_: drawing)
    judges = SimPool(clock, size=split.judges, seconds=lambda *_: costs.judge_seconds) if split.judges else None
    learning = work.micro_batches // split.learners * costs.learner_seconds + costs.fixed_seconds
    # A learner that draws for itself does one after the other, also ahead, and publishes nothing.
    publishing = costs.weights_seconds if split.workers else 0.0
    warm = _WARM_STEPS + 2 * staleness
    seconds = step_seconds(
        pool,
        clock,
        num_steps=warm + _MEASURED_STEPS + staleness,  # for the last ones there is nothing more to draw ahead
        requests_per_step=work.requests,
        staleness=staleness if split.workers else 0,
        learner_seconds=learning,
        weights_seconds=publishing,
        judges=judges,
        judged_per_step=work.judged,
    )
    step = sum(seconds[warm : warm + _MEASURED_STEPS]) / _MEASURED_STEPS
    drawn = work.requests * drawing
    own = 0.0 if split.workers else drawn / split.learners
    return Forecast(
        split=split,
        staleness=staleness,
        seconds_per_step=step,
        learners_busy=_share(learning + publishing + own, step),
        workers_busy=_share(drawn / split.workers, step) if split.workers else None,
        judges_busy=_share(work.judged * costs.judge_seconds / split.judges, step) if split.judges else None,
    )


def bound(work: Work, costs: Costs, split: Split, staleness: int) -> float:
    """Seconds that a step takes at least: nobody can be busy for more than all of the time."""
    learning = work.micro_batches / split.learners * costs.learner_seconds + costs.fixed_seconds
    drawing = costs.rollout_seconds + (0.0 if split.judges else costs.judge_seconds * work.judged / work.requests)
    scoring = work.judged * costs.judge_seconds / split.judges if split.judges else 0.0
    if not split.workers:
        return max(work.requests * drawing / split.learners, scoring) + learning
    learning += costs.weights_seconds
    if staleness:
        return max(work.requests * drawing / split.workers, scoring, learning)
    return max(math.ceil(work.requests / split.workers) * drawing, scoring) + learning


def splits(work: Work, gpus: int, staleness: int, *, colocated: bool, judged: bool) -> Iterator[Split]:
    """All ways to use at most so many GPUs in which none is without work and learners have equally much of it."""
    on_their_way = 1 + staleness
    for learners in (number for number in range(1, gpus + 1) if work.micro_batches % number == 0):
        if work.samples and not colocated and learners > 1:  # several learners score their own samples
            break
        for judges in range(1, gpus - learners + 1) if judged else (0,):
            if judges > work.judged * on_their_way:
                break
            if colocated:
                yield Split(learners=learners, judges=judges)
                continue
            for workers in range(1, min(gpus - learners - judges, work.requests * on_their_way) + 1):
                yield Split(learners=learners, workers=workers, judges=judges)


def best(work: Work, costs: Costs, gpus: int, staleness: int, *, colocated: bool) -> Forecast | None:
    """The fastest split of one kind, of equally fast ones that with the fewest GPUs; None if there is none.

    Args:
        work: of a step.
        costs: of its parts.
        gpus: at most.
        staleness: as in `FleetConfig`.
        colocated: each learner draws for itself, or else there are workers.
    """
    # A learner that draws its own samples scores them too.
    judged = bool(work.judged and costs.judge_seconds) and not colocated
    ways = list(splits(work, gpus, staleness, colocated=colocated, judged=judged))
    ranked = sorted((round(bound(work, costs, way, staleness), 9), way.gpus, index) for index, way in enumerate(ways))
    found: Forecast | None = None
    for low, _, index in ranked[:_MOST_SIMULATED]:
        if found is not None and low >= found.seconds_per_step * _ENOUGH:
            break
        made = forecast(work, costs, ways[index], staleness)
        if found is None or made.seconds_per_step < found.seconds_per_step * _ENOUGH:
            found = made
    return found


def _share(busy: float, step: float) -> float:
    return min(1.0, busy / step) if step else 0.0
