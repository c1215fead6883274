"""What a plan puts in place of an experiment: the same work, with nothing in it that waits for scores.

Weights that start, fade, are learned or wait for the base's scores all become 1, so that the one step that is walked
does all that any step of the run may do. Models are made of their sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rewardgen import plugins, sources
from rewardgen.config import Experiment
from rewardgen.errors import ConfigError, UserError
from rewardgen.flow.stochastic import Kernel
from rewardgen.objective import FlowMatchingConfig, ObjectiveConfig, TermConfig, learns_from_samples
from rewardgen.policy import Policy
from rewardgen.policy_gradient import GrpoConfig, NftConfig
from rewardgen.reward import Reward
from rewardgen.settings import Plugin
from rewardgen.types import Example, Score


def at_once(config: ObjectiveConfig) -> ObjectiveConfig:
    """The objective with every term that ever takes part at weight 1, from the first step on.

    Schedules, starts, floors, ceilings, normalisation and the soft minimum change numbers, not work; gates stay, since
    a reward of weight 0 may be asked for one. Of the samples one place is replayed and one update made. After step 0
    flow matching is silent, so that the replays can be told apart.
    """
    sampled = config.policy_gradient
    if sampled is not None:
        one = {"num_iterations": 1} | ({"times_per_sample": 1} if isinstance(sampled, NftConfig) else {})
        sampled = sampled.model_copy(update=one)
    flow_matching: dict[str, Any] = {"weight": float(config.flow_matching.weight > 0)}
    return ObjectiveConfig(
        flow_matching=FlowMatchingConfig(**flow_matching, schedule=((0, 1.0), (1, 0.0))),
        rewards={
            name: TermConfig(
                use=term.use,
                args=term.args,
                weight=float(term.weight > 0),
                gate=term.gate,
                learn_from=term.learn_from,
            )
            for name, term in config.rewards.items()
        },
        policy_gradient=sampled,
        max_failed_share=1.0,  # whether a score is valid is made up
    )


def image_size(experiment: Experiment) -> tuple[int, int]:
    """Height and width of the largest picture that a step may draw or learn from."""
    sizes = (experiment.rollout.image_size, *(experiment.rollout.buckets or ()))
    return max(sizes, key=lambda size: size[0] * size[1])


def examples_for(policy: Policy, number: int, size: tuple[int, int]) -> list[Example]:
    """Examples with a target and one content and one style reference each, if the policy takes styles."""
    return [_example(index, size, styles=takes_styles(policy)) for index in range(number)]


def _example(index: int, size: tuple[int, int], *, styles: bool) -> Example:
    content, style, target = (torch.zeros(3, *size) for _ in range(3))
    refs = (style,) if styles else ()
    # No two prompts are equal, for each is encoded once.
    return Example(id=str(index), prompt=f"picture {index}", content_refs=(content,), style_refs=refs, target=target)


def pictures_of(examples: Iterable[Example]) -> list[Tensor]:
    """All tensors of the examples: what a dataset read into CPU memory, wherever the models are."""
    columns = [getattr(example, field.name) for example in examples for field in dataclasses.fields(example)]
    return [leaf for leaf in tree_leaves(columns) if isinstance(leaf, Tensor)]


def takes_styles(policy: Policy) -> bool:
    """Whether examples may have style references."""
    return bool(getattr(policy, "takes_styles", True))


def places(config: GrpoConfig | NftConfig, num_steps: int) -> int:
    """Forward and backward passes that one rollout of samples is learned from."""
    if isinstance(config, NftConfig):
        return config.times_per_sample
    return max(1, num_steps - 1) if config.window is None else config.window.size


@contextmanager
def any_noise() -> Iterator[None]:
    """Noisy steps of made-up size: their real one needs the values of the times, which a plan has not."""
    with (
        mock.patch("rewardgen.flow.stochastic.kernel", return_value=_KERNEL),
        mock.patch("rewardgen.replay.kernel", return_value=_KERNEL),
    ):
        yield


_KERNEL = Kernel(1.0, -1.0, 1.0)


class Unasked(Reward):
    """Stands in for a reward without gradient that cannot be asked about made-up pictures; its weights count."""

    differentiable: ClassVar[bool] = False

    def __init__(self, reward: Reward) -> None:
        super().__init__()
        self.reward = reward

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        value_B = pixels_B3HW.detach().mean(dim=(1, 2, 3))
        return Score(value_B=value_B, valid_B=torch.ones_like(value_B, dtype=torch.bool))


def make_rewards(experiment: Experiment) -> tuple[dict[str, Reward], list[str]]:
    """The objective's rewards of the right sizes, and what of them is not counted, in words.

    A reward without a gradient may ask a service or run anything: it is asked only where it has a `blueprint`.

    Raises:
        UserError: a reward cannot be made without its weights.
    """
    rewards, uncounted = {}, []
    for name, term in experiment.objective.rewards.items():
        cls = plugins.resolve("rewards", term.use)
        reward: Reward = _blueprint(f"objective.rewards.{name}", "rewards", term)
        if not cls.differentiable and learns_from_samples(term, cls) and not hasattr(cls, "blueprint"):
            reward = Unasked(reward)
            uncounted.append(f"what reward '{name}' takes to score a sample ({cls.__name__} has no blueprint)")
        rewards[name] = reward
    return rewards, uncounted


def make_witnesses(experiment: Experiment) -> tuple[dict[str, Reward], list[str]]:
    """The evaluation's witnesses, which lie beside the step's models, and which of them are not counted, in words."""
    witnesses, uncounted = {}, []
    for name, plugin in experiment.evaluation.witnesses.items():
        try:
            witnesses[name] = _blueprint(f"evaluation.witnesses.{name}", "rewards", plugin)
        except UserError as error:
            uncounted.append(f"witness '{name}' ({error})")
    return witnesses, uncounted


def make_policy(plugin: Plugin) -> Policy:
    """The policy of the right sizes. Raises UserError where it cannot say them without its weights."""
    made: Policy = _blueprint("policy", "policies", plugin)
    return made


def _blueprint(path: str, kind: plugins.Kind, plugin: Plugin) -> Any:
    """A plug-in of the right sizes: its `blueprint` where it has one, else the thing itself, where it is here."""
    cls = plugins.resolve(kind, plugin.use)
    target = plugins.factory(cls)
    args = plugins.check_args(target, sources.materialise(plugin.args, f"{path}.args", fetch=False), f"{path}.args")
    if hasattr(cls, "blueprint"):
        return cls.blueprint(**args)
    missing = [s.text for s in sources.find_sources(plugin.args, f"{path}.args") if s.location is None]
    if missing:
        raise ConfigError(f"{path}: {cls.__name__} cannot be planned before {', '.join(missing)} is here")
    try:
        return target(**args)
    except UserError:
        raise
    except Exception as error:
        raise ConfigError(f"{path}: {cls.__name__} cannot be made without weights ({type(error).__name__})") from error
