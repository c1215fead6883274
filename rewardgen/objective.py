"""The objective: which terms a loss has, how scores become a loss, and when too many scores have failed.

    L = w_fm * mean(flow matching) - sum_r w_r * mean(t_r)

t_r is the score of reward r itself unless the configuration normalises it, gates it, bounds it or joins it to others
in a soft minimum (`composition`). Each mean divides by the number of *valid* examples of the whole optimizer step,
never of a micro-batch: a term is carried as a sum and a count until all micro-batches are in. Shape suffix: B batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rewardgen.adaptive import Constraint, Learned, MultiplierConfig, OfBase, RunningMoments, ScoreSums
from rewardgen.composition import GateConfig, Rule, Schedule, Term, compose, factor_at
from rewardgen.errors import CheckpointError, ConfigError, ScoringError, nearest
from rewardgen.reward import Reward
from rewardgen.settings import Plugin, SparseSettings
from rewardgen.types import Score

FLOW_MATCHING = "flow_matching"


class TermConfig(Plugin, SparseSettings):
    """One reward of the objective."""

    sparse: ClassVar[frozenset[str]] = frozenset({"schedule", "normalize", "gate", "floor", "ceiling", "multiplier"})

    weight: float = Field(default=1.0, ge=0)
    """The loss has `-weight * mean(reward)`. 0 leaves the reward out of training, unless it gates another."""
    start_step: int = Field(default=0, ge=0)
    """First training step with this term. No rollout is drawn before the first term starts."""
    max_failed_share: float | None = Field(default=None, ge=0, le=1)
    """As the objective's, for this reward alone: 1 never stops, for rewards that seldom apply."""
    schedule: Schedule = ()
    """(step, factor) pairs: the weight is multiplied by the factor, with straight lines between the steps."""
    normalize: Literal["none", "standard"] = "none"
    """`standard` takes (score - mean) / standard deviation, both over past steps; the first step only measures."""
    gate: GateConfig | None = None
    """The term counts for a sample only where another reward is above or below a threshold."""
    floor: float | OfBase | None = None
    """Lower bound on the mean reward: the others are raised subject to it. The multiplier takes the place of the
    weight, which must not be given, unless as 0 to leave the reward out."""
    ceiling: float | OfBase | None = None
    """Upper bound on the mean reward, a budget; as `floor`."""
    multiplier: MultiplierConfig = MultiplierConfig()
    """How the multiplier of the floor or ceiling moves."""

    @property
    def bound(self) -> float | OfBase | None:
        """The floor or ceiling; None where there is neither, and where a weight of 0 leaves the reward out."""
        return (self.ceiling if self.floor is None else self.floor) if self.weight else None

    def _left_out(self) -> set[str]:
        return super()._left_out() | ({"weight"} if self.bound is not None else set())

    def weight_at(self, step: int) -> float:
        """Weight times schedule; 0 before the term starts."""
        return self.weight * factor_at(self.schedule, step) if step >= self.start_step else 0.0


class FlowMatchingConfig(SparseSettings):
    """The flow-matching term on the targets of the data (USO's and UMO's L_pre)."""

    sparse: ClassVar[frozenset[str]] = frozenset({"schedule"})

    weight: float = Field(default=1.0, ge=0)
    """0 trains on rewards alone."""
    start_step: int = Field(default=0, ge=0)
    """First training step with this term."""
    schedule: Schedule = ()
    """(step, factor) pairs: the weight is multiplied by the factor, with straight lines between the steps."""

    def weight_at(self, step: int) -> float:
        """Weight times schedule; 0 before the term starts."""
        return self.weight * factor_at(self.schedule, step) if step >= self.start_step else 0.0


class ObjectiveConfig(SparseSettings):
    """The loss: flow matching plus rewards."""

    sparse: ClassVar[frozenset[str]] = frozenset({"combine", "temperature"})

    flow_matching: FlowMatchingConfig = FlowMatchingConfig()
    """The supervised part."""
    rewards: dict[str, TermConfig] = Field(default_factory=dict)
    """Rewards by a name of one's choice, which names them in every report."""
    max_failed_share: float = Field(default=0.5, ge=0, le=1)
    """The run stops when more than this share of a reward's latest scores failed or did not apply."""
    failure_window: int = Field(default=64, ge=1)
    """How many of the latest scores the share is taken over; nothing is judged before there are as many."""
    combine: Literal["sum", "softmin"] = "sum"
    """`softmin` raises mostly the lowest of a sample's weighted rewards; their scales must match, so normalise them."""
    temperature: float | None = Field(default=None, gt=0)
    """Of the soft minimum, in the units of the (normalised) rewards: large is the weighted sum, small the minimum."""

    @model_validator(mode="after")
    def _has_a_term(self) -> Self:
        if FLOW_MATCHING in self.rewards:
            raise ValueError(f"a reward cannot be called '{FLOW_MATCHING}'")
        if not self.flow_matching.weight and not any(term.weight for term in self.rewards.values()):
            raise ValueError("all weights are 0: nothing would be trained")
        return self


def composition_faults(config: ObjectiveConfig) -> Iterator[tuple[str, str]]:
    """What does not fit together, as (key path below `objective`, message)."""
    for name, term in config.rewards.items():
        place = f"rewards.{name}"
        if term.floor is not None and term.ceiling is not None:
            yield f"{place}.ceiling", "a reward has a floor or a ceiling; for both name the reward twice"
        if term.floor is None and term.ceiling is None and "multiplier" in term.model_fields_set:
            yield f"{place}.multiplier", "there is no floor or ceiling whose multiplier it could be"
        if term.bound is not None:
            for key in ("weight", "schedule", "normalize", "gate"):
                if key in term.model_fields_set and (key == "weight" or getattr(term, key) not in ((), "none", None)):
                    kind = "floor" if term.floor is not None else "ceiling"
                    yield f"{place}.{key}", f"a reward with a {kind} counts by its multiplier alone; leave `{key}` out"
        if term.gate is not None and (term.gate.reward not in config.rewards or term.gate.reward == name):
            others = [other for other in config.rewards if other != name]
            guess = nearest(term.gate.reward, others) or f" There are: {', '.join(others) or 'none'}."
            yield f"{place}.gate.reward", f"'{term.gate.reward}' is no other reward of the objective.{guess}"
        if isinstance(term.bound, OfBase):
            earlier = [other for other, t in config.rewards.items() if t.weight and t.start_step < term.start_step]
            if earlier:
                reason = f"{', '.join(earlier)} would train before the base's value is measured"
                yield f"{place}.start_step", f"{reason}; let them start at step {term.start_step} or later"
    if (config.combine == "softmin") != (config.temperature is not None):
        missing = config.temperature is None
        yield "temperature", "a soft minimum needs one" if missing else "it belongs to `combine: softmin`"
    if config.combine == "softmin" and sum(bool(t.weight) and t.bound is None for t in config.rewards.values()) < 2:
        yield "combine", "a soft minimum is taken over at least two rewards with a weight"


def check_differentiable(name: str, reward: type[Reward]) -> None:
    """Refuse a reward without gradient where a gradient window needs one. Reads a class attribute, loads nothing.

    Raises:
        ConfigError: naming the reward's key.
    """
    if not reward.differentiable:
        raise ConfigError(
            f"objective.rewards.{name}: {reward.__name__} has no gradient, but the gradient window needs one;"
            " use a differentiable reward, or move it to evaluation.witnesses"
        )


def masked_sum(score: Score) -> tuple[Tensor, int]:
    """Sum and number of the valid values of a score.

    Invalid rows are left out by index, not multiplied by 0: 0 * NaN is NaN. Their values get a gradient of exactly 0,
    which a reward's own backward may still turn into NaN (the root of 0); the learner clears those pixels' rows.
    """
    chosen = score.value_B[score.valid_B]
    return chosen.sum(), int(chosen.numel())


class Objective:
    """Composition of terms; holds the reward modules, frozen and in evaluation mode.

    Args:
        config: weights and starts.
        rewards: one module for each name in `config.rewards`.

    Raises:
        ConfigError: names that do not match, or a reward that cannot give the gradient it has to.
    """

    def __init__(self, config: ObjectiveConfig, rewards: Mapping[str, Reward]) -> None:
        if set(rewards) != set(config.rewards):
            raise ConfigError(f"objective.rewards names {sorted(config.rewards)}, but {sorted(rewards)} were built")
        for path, fault in composition_faults(config):
            raise ConfigError(f"objective.{path}: {fault}")
        for name, reward in rewards.items():
            check_differentiable(name, type(reward))
            reward.requires_grad_(False).eval()
        self.config = config
        self.rewards = dict(rewards)
        self._failed = {name: deque[bool](maxlen=config.failure_window) for name in rewards}
        self._learned = Learned(
            {
                name: Constraint(term.bound, ceiling=term.floor is None, config=term.multiplier, start=term.start_step)
                for name, term in config.rewards.items()
                if term.bound is not None
            },
            {name: RunningMoments() for name, term in config.rewards.items() if term.normalize == "standard"},
        )

    def to(self, device: torch.device) -> Self:
        """Move the reward modules."""
        for reward in self.rewards.values():
            reward.to(device)
        return self

    def weight(self, name: str, step: int) -> float:
        """What a term counts with at a step: its weight or, for a bounded reward, its multiplier.

        0 before it starts, and while it is only measured: every reward until the values of the base are known that
        bounds refer to, a normalised one until it has a standard deviation.
        """
        if name == FLOW_MATCHING:
            return self.config.flow_matching.weight_at(step)
        term = self.config.rewards[name]
        constraint, moments = self._learned.constraints.get(name), self._learned.moments.get(name)
        if self._learned.measuring or (moments is not None and moments.mean_std() is None):
            return 0.0
        return term.weight_at(step) if constraint is None else constraint.weight_at(step)

    def active_rewards(self, step: int) -> tuple[str, ...]:
        """Names of the rewards that are scored at a step, in the order of the configuration.

        Those with a weight, bounds from their start on (whatever the multiplier), and those in the gates of the others.
        A function of the configuration and the step alone.
        """
        terms = self.config.rewards
        chosen = {n for n, t in terms.items() if (step >= t.start_step if t.bound is not None else t.weight_at(step))}
        gating = {gate.reward for name in chosen if (gate := terms[name].gate) is not None}
        return tuple(name for name in terms if name in chosen | gating)

    def needs_rollout(self, step: int) -> bool:
        """Whether pictures must be drawn at a step. Before the first reward starts there is nobody to look at them."""
        return bool(self.active_rewards(step))

    def terms(self, scores: Mapping[str, Score], step: int) -> dict[str, Term]:
        """Compose the scores of all active rewards into terms of the loss, sample by sample (`composition.compose`)."""
        return compose(scores, self.rules(step), self.config.temperature)

    def rules(self, step: int) -> dict[str, Rule]:
        """How the terms of a step are made of scores; rewards that only gate have none."""
        rules = {}
        for name in self.active_rewards(step):
            term, weight, shift, scale = self.config.rewards[name], self.weight(name, step), 0.0, 1.0
            constraint, moments = self._learned.constraints.get(name), self._learned.moments.get(name)
            if constraint is not None:
                shift, scale = constraint.level or 0.0, constraint.sign
            elif moments is not None:
                shift, scale = moments.mean_std() or (0.0, 1.0)
            elif not term.weight_at(step):
                continue
            joined = self._joined(name) and weight > 0
            rules[name] = Rule(weight=weight, shift=shift, scale=scale, gate=term.gate, joined=joined)
        return rules

    def coefficient(self, name: str, step: int, count: int) -> float:
        """What a term's sum is multiplied by in the loss, given its global number of counted examples.

        `L = sum_k coefficient_k * sum_k`: plus weight / count for flow matching, minus weight / count for a reward
        (its weight is inside where it is part of a soft minimum), 0 for a term without a counted example.
        """
        weight = self.weight(name, step)
        if not count or not weight:
            return 0.0
        sign = 1.0 if name == FLOW_MATCHING else -1.0
        return sign * (1.0 if self._joined(name) else weight) / count

    def _joined(self, name: str) -> bool:
        """Whether a term takes part in a soft minimum."""
        return self.config.combine == "softmin" and name != FLOW_MATCHING and name not in self._learned.constraints

    def observe(self, name: str, valid_B: Tensor) -> None:
        """Count failures of a reward.

        Raises:
            ScoringError: the share of failures among the latest scores is above the allowed one.
        """
        failed = self._failed[name]
        failed.extend((~valid_B).tolist())
        own = self.config.rewards[name].max_failed_share
        allowed = self.config.max_failed_share if own is None else own
        if len(failed) == failed.maxlen and sum(failed) > allowed * len(failed):
            raise ScoringError(
                f"reward '{name}': {sum(failed)} of its last {len(failed)} scores failed or did not apply, more than"
                f" the allowed share of {allowed:g}; check the reward and its references,"
                f" or raise objective.rewards.{name}.max_failed_share"
            )

    def update(self, sums: Mapping[str, ScoreSums], step: int) -> None:
        """Learn from the scores of a finished step, over all processes: multipliers, base values, moments."""
        self._learned.update(sums, step)

    def metrics(self, sums: Mapping[str, ScoreSums], step: int) -> dict[str, float]:
        """What changes from step to step, as it was in this one: multipliers, bounds, slacks, moments, weights."""
        terms: dict[str, FlowMatchingConfig | TermConfig] = {FLOW_MATCHING: self.config.flow_matching}
        terms |= self.config.rewards
        scheduled = {f"weight/{name}": term.weight_at(step) for name, term in terms.items() if term.schedule}
        return self._learned.metrics(sums) | scheduled

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON."""
        failed = {name: [int(flag) for flag in flags] for name, flags in self._failed.items()}
        return {"failed": failed} | self._learned.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore `state()`.

        Raises:
            CheckpointError: the checkpoint belongs to an objective with other rewards, bounds or normalisation.
        """
        failed = state["failed"]
        if set(failed) != set(self._failed):
            raise CheckpointError(
                f"the checkpoint was made with the rewards {sorted(failed)}, this run has {sorted(self._failed)}"
            )
        self._learned.load_state(state)
        for name, flags in self._failed.items():
            flags.clear()
            flags.extend(bool(flag) for flag in failed[name])
