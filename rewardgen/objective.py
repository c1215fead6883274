"""The objective: which terms a loss has, how scores become a loss, and when too many scores have failed.

    L = w_fm * mean(flow matching) - sum_r w_r * mean(reward r) + w_pg * mean(policy gradient)

The rewards r are those learned from through their gradient. The others are scores of samples, which the policy
gradient makes a loss of (`policy_gradient.py`).

Each mean divides by the number of *valid* examples of the whole optimizer step, never of a micro-batch: a term is
carried as a sum and a count until all micro-batches are in. Shape suffix: B batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor

from rewardgen.errors import CheckpointError, ConfigError, ScoringError
from rewardgen.policy_gradient import POLICY_GRADIENT, PolicyGradientConfig
from rewardgen.reward import Reward
from rewardgen.settings import Plugin, Settings
from rewardgen.types import Score

FLOW_MATCHING = "flow_matching"


class TermConfig(Plugin):
    """One reward of the objective."""

    weight: float = Field(default=1.0, ge=0)
    """The loss has `-weight * mean(reward)`. 0 leaves the reward out of training."""
    start_step: int = Field(default=0, ge=0)
    """First training step with this term. No rollout is drawn before the first term starts."""
    max_failed_share: float | None = Field(default=None, ge=0, le=1)
    """As the objective's, for this reward alone: 1 never stops, for rewards that seldom apply."""
    learn_from: Literal["gradient", "samples"] | None = None
    """`gradient`: backpropagation through the reward; `samples`: scores of finished pictures, by
    `objective.policy_gradient`. Null: the gradient where the reward has one."""

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without_nulls(dump(self), "learn_from")


class FlowMatchingConfig(Settings):
    """The flow-matching term on the targets of the data (USO's and UMO's L_pre)."""

    weight: float = Field(default=1.0, ge=0)
    """0 trains on rewards alone."""
    start_step: int = Field(default=0, ge=0)
    """First training step with this term."""


class ObjectiveConfig(Settings):
    """The loss: flow matching plus rewards."""

    flow_matching: FlowMatchingConfig = FlowMatchingConfig()
    """The supervised part."""
    rewards: dict[str, TermConfig] = Field(default_factory=dict)
    """Rewards by a name of one's choice, which names them in every report."""
    max_failed_share: float = Field(default=0.5, ge=0, le=1)
    """The run stops when more than this share of a reward's latest scores failed or did not apply."""
    failure_window: int = Field(default=64, ge=1)
    """How many of the latest scores the share is taken over; nothing is judged before there are as many."""
    policy_gradient: PolicyGradientConfig | None = None
    """How the policy learns from the scores of samples, for rewards without a gradient; null: not at all."""

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without_nulls(dump(self), "policy_gradient")

    @model_validator(mode="after")
    def _has_a_term(self) -> Self:
        for name in (FLOW_MATCHING, POLICY_GRADIENT):
            if name in self.rewards:
                raise ValueError(f"a reward cannot be called '{name}'")
        if not self.flow_matching.weight and not any(term.weight for term in self.rewards.values()):
            raise ValueError("all weights are 0: nothing would be trained")
        return self


def _without_nulls(dumped: dict[str, Any], *names: str) -> dict[str, Any]:
    """Settings that say nothing are not written: what an experiment was before there were any, it stays."""
    return {name: value for name, value in dumped.items() if value is not None or name not in names}


def learns_from_samples(term: TermConfig, reward: type[Reward]) -> bool:
    """Whether a reward is learned from through scores of samples, not through its gradient."""
    return term.learn_from == "samples" or (term.learn_from is None and not reward.differentiable)


def check_learnable(config: ObjectiveConfig, name: str, reward: type[Reward]) -> None:
    """Refuse a reward that the policy could not learn from. Reads a class attribute, loads nothing.

    Raises:
        ConfigError: naming the reward's key.
    """
    term = config.rewards[name]
    if not learns_from_samples(term, reward) or (config.policy_gradient is None and term.learn_from is None):
        check_differentiable(name, reward)
    elif config.policy_gradient is None:
        raise ConfigError(
            f"objective.rewards.{name}.learn_from: samples are learned from by objective.policy_gradient, which is"
            " not there; add it, as in 'policy_gradient: {kind: grpo}'"
        )


def check_differentiable(name: str, reward: type[Reward]) -> None:
    """Refuse a reward without gradient where a gradient window needs one. Reads a class attribute, loads nothing.

    Raises:
        ConfigError: naming the reward's key.
    """
    if not reward.differentiable:
        raise ConfigError(
            f"objective.rewards.{name}: {reward.__name__} has no gradient, but the gradient window needs one;"
            " use a differentiable reward, learn from samples (objective.policy_gradient), or move it to"
            " evaluation.witnesses"
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
        for name, reward in rewards.items():
            check_learnable(config, name, type(reward))
            reward.requires_grad_(False).eval()
        self.config = config
        self.rewards = dict(rewards)
        self.sampled = {n: r for n, r in rewards.items() if learns_from_samples(config.rewards[n], type(r))}
        self._failed = {name: deque[bool](maxlen=config.failure_window) for name in rewards}

    def to(self, device: torch.device) -> Self:
        """Move the reward modules."""
        for reward in self.rewards.values():
            reward.to(device)
        return self

    def weight(self, name: str, step: int) -> float:
        """The weight of a term at a step: 0 before it starts. The policy gradient starts with its first reward."""
        if name == POLICY_GRADIENT:
            config = self.config.policy_gradient
            return config.weight if config is not None and self.active_samples(step) else 0.0
        term = self.config.flow_matching if name == FLOW_MATCHING else self.config.rewards[name]
        return term.weight if step >= term.start_step else 0.0

    def active_rewards(self, step: int) -> tuple[str, ...]:
        """Names of the rewards whose gradient takes part at a step, in the order of the configuration."""
        return tuple(n for n in self.config.rewards if n not in self.sampled and self.weight(n, step) > 0)

    def active_samples(self, step: int) -> dict[str, float]:
        """Weights of the rewards that score samples at a step, in the order of the configuration."""
        return {name: weight for name in self.sampled if (weight := self.weight(name, step)) > 0}

    def needs_rollout(self, step: int) -> bool:
        """Whether a gradient window must be entered at a step, for rewards that have started."""
        return bool(self.active_rewards(step))

    def coefficient(self, name: str, step: int, count: int) -> float:
        """What a term's sum is multiplied by in the loss, given its global number of valid examples.

        `L = sum_k coefficient_k * sum_k`: plus weight / count for flow matching and the policy gradient, minus
        weight / count for a reward with a gradient, 0 for a term without a valid example. A reward that scores samples
        is no term of its own.
        """
        if name in self.sampled:
            return 0.0
        sign = 1.0 if name in (FLOW_MATCHING, POLICY_GRADIENT) else -1.0
        return sign * self.weight(name, step) / count if count else 0.0

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

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON."""
        return {"failed": {name: [int(flag) for flag in flags] for name, flags in self._failed.items()}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore `state()`.

        Raises:
            CheckpointError: the checkpoint belongs to an objective with other rewards.
        """
        failed = state["failed"]
        if set(failed) != set(self._failed):
            raise CheckpointError(
                f"the checkpoint was made with the rewards {sorted(failed)}, this run has {sorted(self._failed)}"
            )
        for name, flags in self._failed.items():
            flags.clear()
            flags.extend(bool(flag) for flag in failed[name])
