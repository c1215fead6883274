"""Settings of the objective, and which of them go together."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from rewardgen.adaptive import MultiplierConfig, OfBase
from rewardgen.composition import GateConfig, Schedule, factor_at
from rewardgen.errors import ConfigError, nearest
from rewardgen.policy_gradient import POLICY_GRADIENT, PolicyGradientConfig
from rewardgen.reward import Reward
from rewardgen.settings import Plugin, SparseSettings

FLOW_MATCHING = "flow_matching"


class TermConfig(Plugin, SparseSettings):
    """One reward of the objective."""

    sparse: ClassVar[frozenset[str]] = frozenset(
        {"schedule", "normalize", "gate", "floor", "ceiling", "multiplier", "learn_from"}
    )

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

    learn_from: Literal["gradient", "samples"] | None = None
    """`gradient`: backpropagation through the reward; `samples`: scores of finished pictures, by
    `objective.policy_gradient`. Null: the gradient where the reward has one."""

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

    sparse: ClassVar[frozenset[str]] = frozenset({"combine", "temperature", "conflicts", "policy_gradient"})

    flow_matching: FlowMatchingConfig = FlowMatchingConfig()
    """The supervised part."""
    rewards: dict[str, TermConfig] = Field(default_factory=dict)
    """Rewards by a name of one's choice, which names them in every report."""
    max_failed_share: float = Field(default=0.5, ge=0, le=1)
    """The run stops when more than this share of a reward's latest scores failed or did not apply."""
    failure_window: int = Field(default=64, ge=1)
    """How many of the latest examples the share is taken over, in whole steps; of a reward that is learned from samples
    all of an example's count. Nothing is judged before there are as many."""
    combine: Literal["sum", "softmin"] = "sum"
    """`softmin` raises mostly the lowest of a sample's weighted rewards; their scales must match, so normalise them."""
    temperature: float | None = Field(default=None, gt=0)
    """Of the soft minimum, in the units of the (normalised) rewards: large is the weighted sum, small the minimum."""

    conflicts: Literal["keep", "project"] = "keep"
    """`project` takes off each term's gradient what points against another's (PCGrad, arXiv 2001.06782)."""
    policy_gradient: PolicyGradientConfig | None = None
    """How the policy learns from the scores of samples, for rewards without a gradient; null: not at all."""

    @model_validator(mode="after")
    def _has_a_term(self) -> Self:
        for name in (FLOW_MATCHING, POLICY_GRADIENT):
            if name in self.rewards:
                raise ValueError(f"a reward cannot be called '{name}'")
        if not self.flow_matching.weight and not any(term.weight for term in self.rewards.values()):
            raise ValueError("all weights are 0: nothing would be trained")
        return self


def composition_faults(config: ObjectiveConfig, sampled: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    """What does not fit together, as (key path below `objective`, message).

    Args:
        config: of the objective.
        sampled: the rewards that are learned from samples (`learns_from_samples`).
    """
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
    yield from _sample_faults(config, sampled)


def _sample_faults(config: ObjectiveConfig, sampled: Collection[str]) -> Iterator[tuple[str, str]]:
    """What rewards of samples cannot do: join rewards that look at other pictures, or be the only, varying weight."""
    for name, term in config.rewards.items():
        other = term.gate.reward if term.gate is not None else name
        if other in config.rewards and (name in sampled) != (other in sampled):
            yield (
                f"rewards.{name}.gate.reward",
                f"one of '{name}' and '{other}' scores samples and the other the gradient window's pictures; give both"
                " the same `learn_from` (name the gating reward a second time if need be)",
            )
    joined = [name for name, term in config.rewards.items() if term.weight and term.bound is None]
    if config.combine == "softmin" and 0 < sum(name in sampled for name in joined) < len(joined):
        ours, others = [n for n in joined if n in sampled], [n for n in joined if n not in sampled]
        reason = f"{', '.join(ours)} score samples, {', '.join(others)} the gradient window's pictures"
        yield "combine", f"a soft minimum is taken over scores of the same pictures: {reason}; set `learn_from` alike"
    if config.policy_gradient is None or config.policy_gradient.scale_rewards == "none":
        return
    counting = [name for name in sampled if config.rewards[name].weight]
    for name in counting:
        term = config.rewards[name]
        others = [
            other for other in counting if other != name and (term.schedule or config.rewards[other].bound is None)
        ]
        key = "schedule" if term.schedule else "floor" if term.floor is not None else "ceiling"
        if not others and (term.bound is not None or term.schedule):
            yield (
                f"rewards.{name}.{key}",
                "it would be cancelled: advantages are divided by their standard deviation, and no other reward with a"
                " weight is learned from samples; set policy_gradient.scale_rewards: none",
            )


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
