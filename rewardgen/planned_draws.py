"""What a plan draws without gradient: a step for the rewards with one, a sample for the others, and what more would be.

As few denoising steps are walked as will do; the rest differ from them by nothing but their number.

Shape suffixes: B batch, L latent tokens, C channels per token, S states around noisy steps.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from rewardgen.config import Experiment
from rewardgen.dry_run import Observer
from rewardgen.learner import Learner
from rewardgen.planned import places
from rewardgen.policy_gradient import GrpoConfig, NftConfig
from rewardgen.rollout import RolloutConfig, RolloutWorker
from rewardgen.scoring import ScoringWorker
from rewardgen.types import Example, Rollout, RolloutRequest, Stochastic


def size_of(tensor: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """What one micro-batch draws, from as few denoising steps as will do.

    Args:
        prefix: for rewards with a gradient, as if entered where the longest window begins; None where there are none.
        sample: one, scored, from two steps of which the first is noisy (`grpo`), or from one; None where none are
            learned from.
        step: operations of one denoising step.
        finish: of decoding and scoring a sample.
        config: of the policy gradient, as the experiment has it.
    """

    prefix: Rollout | None
    sample: Rollout | None
    step: int
    finish: int
    config: GrpoConfig | NftConfig | None

    @property
    def walked(self) -> int:
        """Bytes of what is here."""
        return _kept_of(self.prefix) + _kept_of(self.sample)

    def kept(self, experiment: Experiment) -> int:
        """Bytes kept of all that a step draws, and of what is drawn ahead in this process."""
        size = _kept_of(self.prefix)
        if self.sample is not None and self.config is not None:
            number = places(self.config, experiment.rollout.num_steps)
            states = self.sample.trajectory.steps_SBLC
            one = _kept_of(self.sample) + (0 if states is None else (number - 1) * size_of(states[0]))
            # The velocities of the policy that drew, and of the base.
            velocities = isinstance(self.config, NftConfig) + (self.config.beta > 0)
            one += velocities * number * size_of(self.sample.trajectory.entry_BLC)
            size += self.config.num_generations * one
        ahead = 0 if experiment.fleet.remote_rollouts else experiment.fleet.staleness
        return experiment.train.accumulation * (1 + ahead) * size

    def operations(self, experiment: Experiment, terms: float, replay: float) -> float:
        """Of a micro-batch in a whole training step.

        Args:
            terms: of everything in an update but the samples.
            replay: of learning from one place of one sample, the base's velocity included.
        """
        rollout = experiment.rollout
        (low, high), entries = rollout.window.entry_bounds(rollout.num_steps), rollout.entries_per_rollout
        # The mean of the last of several different entry steps, each as likely as any other.
        last = low - 1 + entries * (high - low + 2) / (entries + 1)
        prefix = last * self.step if self.prefix is not None else 0.0
        if self.sample is None or self.config is None:
            return prefix + terms
        base = self.step if self.config.beta else 0
        learned = places(self.config, rollout.num_steps)
        drawing = rollout.num_steps * self.step + self.finish + learned * base
        learning = terms + self.config.num_generations * learned * (replay - base)
        return prefix + self.config.num_generations * drawing + self.config.num_iterations * learning


def draw(
    experiment: Experiment, learner: Learner, examples: list[Example], size: tuple[int, int], observer: Observer
) -> Drawn:
    """Draw one denoising step for the rewards with a gradient and one sample for the others, by the real worker.

    Args:
        experiment: as it is, with its own numbers of steps and samples.
        learner: its policy, and the objective that is planned.
        examples: of the micro-batch.
        size: height and width of the pictures.
        observer: counts what it takes; operations so far are forgotten.
    """
    rollout, objective = experiment.rollout, learner.objective
    # Of the settings of samples one place and one update are walked, all of them are counted.
    config = experiment.objective.policy_gradient if objective.active_samples(0) else None
    if config is None and not objective.needs_rollout(0):
        return Drawn(prefix=None, sample=None, step=0, finish=0, config=None)
    observer.take_operations()
    seed_B = tuple(range(len(examples)))
    worker = RolloutWorker(learner.policy, precision=experiment.train.precision)
    request = RolloutRequest(
        step=0, examples=examples, seed_B=seed_B, image_size=size, num_steps=rollout.num_steps, stop_step=1
    )
    begun = worker.rollout(request, learner.publish())
    step = observer.take_operations()
    prefix = _entered(begun, rollout) if objective.needs_rollout(0) else None
    del begun
    if config is None:
        return Drawn(prefix=prefix, sample=None, step=step, finish=0, config=None)
    noisy = isinstance(config, GrpoConfig)
    steps = 1 + noisy
    request = dataclasses.replace(
        request,
        num_steps=steps,
        stop_step=steps,
        decode=True,
        eight_bit=True,
        stochastic=Stochastic(steps=(0,), noise_level=1.0, seed_B=seed_B) if noisy else None,
        group_B=seed_B,
    )
    sample = ScoringWorker(objective.sampled).score(worker.rollout(request, learner.publish()))
    finish = observer.take_operations() - steps * step
    return Drawn(prefix=prefix, sample=sample, step=step, finish=finish, config=config)


def _entered(prefix: Rollout, config: RolloutConfig) -> Rollout:
    """A rollout of a single step that says it has taken as many as the longest window leaves, or kept that many."""
    low, _ = config.window.entry_bounds(config.num_steps)
    trajectory = dataclasses.replace(prefix.trajectory, entry_step=low)
    if config.entries_per_rollout > 1:
        entries = tuple(range(low, low + config.entries_per_rollout))
        steps_SBLC = torch.stack([trajectory.entry_BLC] * len(entries))
        trajectory = dataclasses.replace(trajectory, entry_step=entries[-1], steps_SBLC=steps_SBLC, kept_steps=entries)
    return dataclasses.replace(prefix, trajectory=trajectory)


def _kept_of(rollout: Rollout | None) -> int:
    """Bytes of a rollout's states."""
    if rollout is None:
        return 0
    states = (rollout.trajectory.entry_BLC, rollout.trajectory.steps_SBLC)
    return sum(size_of(tensor) for tensor in states if tensor is not None)
