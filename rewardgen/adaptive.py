"""What the objective learns from step to step: multipliers of floors and ceilings, the base's values, running moments.

All of it is frozen within a step and updated after it from sums over the examples of all processes, so that it is the
same in all of them and does not depend on how the step was cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from pydantic import Field, model_validator

from rewardgen.errors import CheckpointError
from rewardgen.settings import Settings
from rewardgen.types import Score

DECAY = 0.99
"""Of a step's weight in the running moments with each later step: about the last hundred steps count."""
LEAST_STD = 1e-6
"""Standard deviation, relative to a mean above 1, below which scores count as equal and cannot be normalised."""


class OfBase(Settings):
    """A bound relative to what the policy scored before any reward trained it."""

    base: float | None = None
    """The bound is the base's value plus this, in the reward's units: -0.02 allows a loss of 0.02."""
    base_percent: float | None = None
    """The bound is the base's value plus this percentage of its size: -2 allows a loss of 2 %."""
    steps: int = Field(default=16, ge=1)
    """Steps with a valid score over which the base's value is measured; meanwhile no reward trains."""

    @model_validator(mode="after")
    def _has_one_form(self) -> Self:
        if (self.base is None) == (self.base_percent is None):
            raise ValueError("give one of `base` (a difference) and `base_percent`")
        return self

    def bound(self, base: float) -> float:
        """The bound, given the base's value."""
        return base + (self.base if self.base is not None else abs(base) * (self.base_percent or 0.0) / 100)


class MultiplierConfig(Settings):
    """Ascent of the Lagrange multiplier of a floor or ceiling."""

    rate: float = Field(default=1.0, gt=0)
    """After each step: multiplier + rate * (how far the batch's mean is on the wrong side of the bound)."""
    initial: float = Field(default=0.0, ge=0)
    """Where it starts."""
    maximum: float = Field(default=100.0, gt=0)
    """What it never exceeds; a multiplier that stays there says that the bound cannot be met."""

    @model_validator(mode="after")
    def _starts_below_its_maximum(self) -> Self:
        if self.initial > self.maximum:
            raise ValueError(f"initial {self.initial:g} is above maximum {self.maximum:g}")
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreSums:
    """The valid scores of one reward over a whole step: their number, sum and sum of squares.

    `metrics` and `counts` are of what the reward reports beside them (`Score`): of each metric the sum over valid
    examples and the number of these, in batches that reported it; of each count the sum.
    """

    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    metrics: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    counts: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, score: Score) -> Self:
        """Of one batch."""
        chosen = score.value_B.detach()[score.valid_B].double()  # a reward may score in half precision
        number = chosen.numel()
        return cls(
            count=number,
            total=float(chosen.sum()),
            squares=float(chosen.square().sum()),
            metrics={name: (float(mean) * number, number) for name, mean in score.metrics.items()} if number else {},
            counts={name: float(value) for name, value in score.counts.items()},
        )

    def __add__(self, other: ScoreSums) -> ScoreSums:
        metrics, counts = dict(self.metrics), dict(self.counts)
        for name, (total, number) in other.metrics.items():
            known = metrics.get(name, (0.0, 0))
            metrics[name] = (known[0] + total, known[1] + number)
        for name, value in other.counts.items():
            counts[name] = counts.get(name, 0.0) + value
        return ScoreSums(
            count=self.count + other.count,
            total=self.total + other.total,
            squares=self.squares + other.squares,
            metrics=metrics,
            counts=counts,
        )

    def extras(self) -> dict[str, float]:
        """What the reward reported beside its scores, by name in alphabetical order: means and counts."""
        means = {name: total / number for name, (total, number) in self.metrics.items()}
        return dict(sorted((means | dict(self.counts)).items()))

    def to_json(self) -> dict[str, Any]:
        """For another process."""
        return asdict(self)

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Self:
        """Of `to_json()`."""
        return cls(**{**said, "metrics": {name: (float(t), int(n)) for name, (t, n) in said["metrics"].items()}})


class Constraint:
    """A floor or ceiling on a reward's mean: `max f subject to mean(r) >= c` by ascent on its multiplier.

    The loss has `-multiplier * (mean(r) - c)` for a floor and `-multiplier * (c - mean(r))` for a ceiling; after each
    step `multiplier <- clip(multiplier - rate * slack, 0, maximum)`, where slack is the bracket (projected dual ascent,
    Arrow, Hurwicz and Uzawa 1958). The multiplier rises while the bound is broken and falls back to 0 where it holds
    by itself.

    Args:
        bound: c itself, or relative to the base.
        ceiling: else a floor.
        config: of the ascent.
        start: first step at which the bound holds and is measured.
    """

    def __init__(self, bound: float | OfBase, *, ceiling: bool, config: MultiplierConfig, start: int = 0) -> None:
        self.config = config
        self.start = start
        self.sign = -1.0 if ceiling else 1.0
        self.multiplier = config.initial
        self._bound = bound
        self._measured: list[float] = []

    @property
    def level(self) -> float | None:
        """The bound c; None while the base is measured."""
        if isinstance(self._bound, float | int):
            return float(self._bound)
        missing = len(self._measured) < self._bound.steps
        return None if missing else self._bound.bound(math.fsum(self._measured) / len(self._measured))

    def slack(self, mean: float) -> float:
        """How far a mean is on the right side of the bound; below 0 the bound is broken. The bound must be known."""
        if self.level is None:
            raise ValueError("the base's value is not known yet")
        return self.sign * (mean - self.level)

    def weight_at(self, step: int) -> float:
        """The multiplier; 0 before the start."""
        return self.multiplier if step >= self.start else 0.0

    def update(self, sums: ScoreSums, step: int) -> None:
        """Measure the base, or else move the multiplier. Without a valid score nothing changes."""
        if not sums.count or step < self.start:
            return
        mean = sums.total / sums.count
        if self.level is None:
            self._measured.append(mean)
        else:
            risen = self.multiplier - self.config.rate * self.slack(mean)
            self.multiplier = min(max(risen, 0.0), self.config.maximum)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON."""
        return {"multiplier": self.multiplier, "measured": list(self._measured)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore `state()`."""
        self.multiplier = float(state["multiplier"])
        self._measured = [float(mean) for mean in state["measured"]]


class RunningMoments:
    """Mean and standard deviation of a reward's scores over past steps; older steps count less (`DECAY`)."""

    def __init__(self) -> None:
        self._sums = (0.0, 0.0, 0.0)

    def mean_std(self) -> tuple[float, float] | None:
        """Mean and standard deviation; None before there are two different scores."""
        count, total, squares = self._sums
        if count <= 1:
            return None
        mean = total / count
        std = math.sqrt(max(squares / count - mean * mean, 0.0))
        return (mean, std) if std > LEAST_STD * max(1.0, abs(mean)) else None

    def update(self, sums: ScoreSums) -> None:
        """Learn from a step; without a valid score nothing changes."""
        if sums.count:
            new = (sums.count, sums.total, sums.squares)
            self._sums = tuple(DECAY * old + now for old, now in zip(self._sums, new, strict=True))  # type: ignore[assignment]

    def state(self) -> list[float]:
        """What a resumed run needs, as JSON."""
        return list(self._sums)

    def load_state(self, state: list[float]) -> None:
        """Restore `state()`."""
        count, total, squares = map(float, state)
        self._sums = (count, total, squares)


class Learned:
    """All that one objective learns: constraints and running moments by reward.

    Args:
        constraints: of the bounded rewards.
        moments: of the normalised rewards.
    """

    def __init__(self, constraints: Mapping[str, Constraint], moments: Mapping[str, RunningMoments]) -> None:
        self.constraints, self.moments = dict(constraints), dict(moments)

    @property
    def measuring(self) -> bool:
        """Whether a base value is still being measured; until then no reward trains."""
        return any(constraint.level is None for constraint in self.constraints.values())

    def update(self, sums: Mapping[str, ScoreSums], step: int) -> None:
        """Learn from the scores of a finished step."""
        for name, of in sums.items():
            if name in self.constraints:
                self.constraints[name].update(of, step)
            if name in self.moments:
                self.moments[name].update(of)

    def metrics(self, sums: Mapping[str, ScoreSums]) -> dict[str, float]:
        """`multiplier/NAME`, `bound/NAME`, `slack/NAME` (below 0: broken), `running_mean/NAME`, `running_std/NAME`."""
        found: dict[str, float] = {}
        for name, constraint in self.constraints.items():
            found[f"multiplier/{name}"] = constraint.multiplier
            of = sums.get(name, ScoreSums())
            if constraint.level is not None:
                found[f"bound/{name}"] = constraint.level
                found |= {f"slack/{name}": constraint.slack(of.total / of.count)} if of.count else {}
        for name, moments in self.moments.items():
            known = moments.mean_std()
            found |= {f"running_mean/{name}": known[0], f"running_std/{name}": known[1]} if known else {}
        return found

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON; empty where nothing is learned."""
        constraints = {name: constraint.state() for name, constraint in self.constraints.items()}
        moments = {name: moments.state() for name, moments in self.moments.items()}
        return {key: part for key, part in (("constraints", constraints), ("moments", moments)) if part}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore `state()`.

        Raises:
            CheckpointError: the checkpoint belongs to an objective with other bounds or normalisation.
        """
        constraints, moments = state.get("constraints", {}), state.get("moments", {})
        for what, there, own in (("bounds", constraints, self.constraints), ("normalisation", moments, self.moments)):
            if set(there) != set(own):
                raise CheckpointError(f"the checkpoint was made with {what} on {sorted(there)}, not on {sorted(own)}")
        for name, constraint in self.constraints.items():
            constraint.load_state(constraints[name])
        for name, moment in self.moments.items():
            moment.load_state(moments[name])
