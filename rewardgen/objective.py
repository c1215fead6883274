"""The objective: which terms a loss has, how scores become a loss, and when too many scores have failed.

    L = w_fm * mean(flow matching) - sum_r w_r * mean(t_r) + w_pg * mean(policy gradient)

t_r is the score of reward r itself unless the configuration normalises it, gates it, bounds it or joins it to others
in a soft minimum (`composition`). The sum is over the rewards learned from through their gradient. The others score
samples: sum_r w_r t_r of a sample, composed alike, is what the policy gradient makes a loss of (`policy_gradient`).
Each mean divides by the number of *valid* examples of the whole optimizer step, never of a micro-batch: a term is
carried as a sum and a count until all micro-batches are in. Shape suffix: B batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from rewardgen.adaptive import Constraint, Learned, RunningMoments, ScoreSums
from rewardgen.composition import Rule, Term, compose, composed_value
from rewardgen.errors import CheckpointError, ConfigError, ScoringError
from rewardgen.objective_config import (
    FLOW_MATCHING,
    FlowMatchingConfig,
    ObjectiveConfig,
    TermConfig,
    check_differentiable,
    check_learnable,
    composition_faults,
    learns_from_samples,
)
from rewardgen.policy_gradient import POLICY_GRADIENT
from rewardgen.reward import Reward
from rewardgen.types import Score

__all__ = [
    "FLOW_MATCHING",
    "FlowMatchingConfig",
    "Objective",
    "ObjectiveConfig",
    "TermConfig",
    "check_differentiable",
    "check_learnable",
    "composition_faults",
    "learns_from_samples",
    "masked_sum",
]


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
        self.sampled = {n: r for n, r in rewards.items() if learns_from_samples(config.rewards[n], type(r))}
        for name, reward in rewards.items():
            check_learnable(config, name, type(reward))
            reward.requires_grad_(False).eval()
        for path, fault in composition_faults(config, self.sampled):
            raise ConfigError(f"objective.{path}: {fault}")
        self.config = config
        self.rewards = dict(rewards)
        self._failed = {name: deque[tuple[int, int]]() for name in rewards}
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
        bounds refer to, a normalised one until it has a standard deviation. The policy gradient starts with the first
        reward that scores samples.
        """
        if name == POLICY_GRADIENT:
            config = self.config.policy_gradient
            return config.weight if config is not None and self.active_samples(step) else 0.0
        if name == FLOW_MATCHING:
            return self.config.flow_matching.weight_at(step)
        term = self.config.rewards[name]
        constraint, moments = self._learned.constraints.get(name), self._learned.moments.get(name)
        if self._learned.measuring or (moments is not None and moments.mean_std() is None):
            return 0.0
        return term.weight_at(step) if constraint is None else constraint.weight_at(step)

    def active_rewards(self, step: int) -> tuple[str, ...]:
        """Names of the rewards scored in the gradient window at a step, in the order of the configuration.

        Those with a weight, bounds from their start on (whatever the multiplier), and those in the gates of the others.
        A function of the configuration and the step alone.
        """
        return tuple(name for name in self._active(step) if name not in self.sampled)

    def active_samples(self, step: int) -> tuple[str, ...]:
        """Names of the rewards that score samples at a step; otherwise as `active_rewards`."""
        return tuple(name for name in self._active(step) if name in self.sampled)

    def _active(self, step: int) -> list[str]:
        terms = self.config.rewards
        chosen = {n for n, t in terms.items() if (step >= t.start_step if t.bound is not None else t.weight_at(step))}
        gating = {gate.reward for name in chosen if (gate := terms[name].gate) is not None}
        return [name for name in terms if name in chosen | gating]

    def needs_rollout(self, step: int) -> bool:
        """Whether a gradient window must be entered at a step, for rewards that have started."""
        return bool(self.active_rewards(step))

    def terms(self, scores: Mapping[str, Score], step: int) -> dict[str, Term]:
        """Compose the scores of all active rewards into terms of the loss, sample by sample (`composition.compose`)."""
        return compose(scores, self.rules(step), self.config.temperature)

    def sample_values(self, scores: Mapping[str, Score], group_B: Sequence[int], step: int) -> Score:
        """What the rewards that score samples make of each together, weights inside (`composition.composed_value`).

        Args:
            scores: of each reward in `active_samples`, [B].
            group_B: the group of each sample.
            step: of training.
        """
        active = self.active_samples(step)
        rules = self._rules(active, step)
        weights = {name: 1.0 if rule.joined else rule.weight for name, rule in rules.items()}
        return composed_value(
            compose({name: scores[name] for name in active}, rules, self.config.temperature), weights, group_B
        )

    def rules(self, step: int) -> dict[str, Rule]:
        """How the terms of the gradient window are made of scores; rewards that only gate have none."""
        return self._rules(self.active_rewards(step), step)

    def _rules(self, names: Iterable[str], step: int) -> dict[str, Rule]:
        rules = {}
        for name in names:
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

        `L = sum_k coefficient_k * sum_k`: plus weight / count for flow matching and the policy gradient, minus
        weight / count for a reward (its weight is inside where it is part of a soft minimum), 0 for a term without a
        counted example.
        """
        weight = self.weight(name, step)
        if not count or not weight:
            return 0.0
        sign = 1.0 if name in (FLOW_MATCHING, POLICY_GRADIENT) else -1.0
        return sign * (1.0 if self._joined(name) else weight) / count

    def _joined(self, name: str) -> bool:
        """Whether a term takes part in a soft minimum."""
        return self.config.combine == "softmin" and name in self.rewards and name not in self._learned.constraints

    def observe(self, name: str, valid_B: Tensor) -> None:
        """Count failures of a reward in a step, over all processes.

        The share is that of the fewest latest steps with `failure_window` examples, each with all its samples: those of
        one example tend to fail together, and processes must not be judged one by one.

        Raises:
            ScoringError: the share of failures among the latest scores is above the allowed one.
        """
        gradient = self.config.policy_gradient
        each = gradient.num_generations if gradient is not None and name in self.sampled else 1
        window = self.config.failure_window * each
        steps = self._failed[name]
        if valid_B.numel():
            steps.append((int((~valid_B).sum()), valid_B.numel()))
        while sum(count for _, count in steps) - (steps[0][1] if steps else 0) >= window:
            steps.popleft()
        failed, seen = sum(count for count, _ in steps), sum(count for _, count in steps)
        own = self.config.rewards[name].max_failed_share
        allowed = self.config.max_failed_share if own is None else own
        if seen >= window and failed > allowed * seen:
            raise ScoringError(
                f"reward '{name}': {failed} of its last {seen} scores failed or did not apply, more than"
                f" the allowed share of {allowed:g}; check the reward and its references,"
                f" or raise objective.rewards.{name}.max_failed_share"
            )

    def update(self, sums: Mapping[str, ScoreSums], step: int) -> None:
        """Learn from the scores of a finished step, over all processes: multipliers, base values, moments."""
        self._learned.update(sums, step)

    def metrics(self, sums: Mapping[str, ScoreSums], step: int) -> dict[str, float]:
        """What a step has to say beside its terms: multipliers, bounds, slacks, moments and weights as they were in it,
        and what rewards reported (`Score.metrics`, `Score.counts`) as `reward/NAME/WHAT`, over all processes."""
        terms: dict[str, FlowMatchingConfig | TermConfig] = {FLOW_MATCHING: self.config.flow_matching}
        terms |= self.config.rewards
        scheduled = {f"weight/{name}": term.weight_at(step) for name, term in terms.items() if term.schedule}
        told = {f"reward/{name}/{what}": value for name, of in sums.items() for what, value in of.extras().items()}
        return self._learned.metrics(sums) | scheduled | told

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON."""
        failed = {name: [list(counts) for counts in steps] for name, steps in self._failed.items()}
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
        for name, steps in self._failed.items():
            steps.clear()
            steps.extend((int(failures), int(count)) for failures, count in failed[name])
