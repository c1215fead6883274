"""The terms of the loss, each from a micro-batch to its sum, its count and its gradient.

    flow matching    sum_B |velocity(x_t, t) - (noise - clean)|^2                          x_t = (1 - t) clean + t noise
    rewards          sum_B t(r_1 .. r_k),  r = r(decode(clean_hat)),  for each term t of the objective

Scored samples are a third kind, in `replay.py`. Nothing is divided here: one over the number of valid examples is
known only after the last micro-batch of all processes.

Shape suffixes: B batch, L latent tokens, C channels per token, H and W pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from rewardgen import gradients, sharding
from rewardgen.distributed import Processes
from rewardgen.errors import ConfigError
from rewardgen.flow.loss import draw_times_and_noise, flow_matching_loss
from rewardgen.flow.window import WindowConfig, by_entry, run_window
from rewardgen.gradients import Gradient, TermSums
from rewardgen.measure import Clock
from rewardgen.objective import FLOW_MATCHING, Objective
from rewardgen.policy import Mode, Policy
from rewardgen.reward_leg import reward_leg
from rewardgen.rollout import Precision, device_of, velocity_fn
from rewardgen.types import Condition, Example, Rollout, VelocityFn

MERGED = "(all rewards)"
"""Key of the gradient of all rewards together, already divided; no term is called so."""

VelocityOf: TypeAlias = Callable[[Sequence[Example]], Callable[[], VelocityFn]]
"""Encodes examples; each call of what it returns makes a velocity under the present gradient mode."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """What one forward pass of each kind sees.

    Args:
        examples: for the flow-matching term, dropout applied; those without a target are left out and not counted.
        seed_B: one seed per example, for its time and noise.
        image_size: (height, width) in pixels of targets and drawn pictures.
        rollout: a prefix drawn for the reward terms, None where no reward is active.
        samples: scored rollouts to learn from without a reward's gradient; a group of samples lies in one micro-batch.
    """

    examples: Sequence[Example]
    seed_B: Sequence[int]
    image_size: tuple[int, int]
    rollout: Rollout | None = None
    samples: Sequence[Rollout] = ()


class Differentiated:
    """A policy as the terms see it: its velocity, and gradients of its trained parameters.

    Args:
        policy: the policy, perhaps with sharded blocks.
        precision: arithmetic of its forward pass.
        processes: all that make the step.
    """

    def __init__(self, policy: Policy, precision: Precision, processes: Processes) -> None:
        self.policy = policy
        self.precision: Precision = precision
        self.processes = processes
        self.parameters = list(policy.trainable().values())
        # Sharded blocks need every process in each of their backward passes, also one that has no valid example.
        self.sharded = isinstance(policy, sharding.ShardedPolicy)
        self._differentiate = sharding.differentiate if self.sharded else gradients.differentiate

    def velocity(self, condition: Condition, mode: Mode, image_size: tuple[int, int]) -> VelocityFn:
        """The policy's velocity for a condition."""
        return velocity_fn(self.policy, condition, mode=mode, image_size=image_size, precision=self.precision)

    def sampling_velocity(self, image_size: tuple[int, int]) -> VelocityOf:
        """How samples were drawn, to be done again: encode once, then a velocity for each graph."""

        def encoded(examples: Sequence[Example]) -> Callable[[], VelocityFn]:
            condition = self.policy.encode(examples)
            return lambda: self.velocity(condition, "sample", image_size)

        return encoded

    def gradient(self, output: Tensor, grad_output: Tensor | None = None, *, keep_graph: bool = False) -> Gradient:
        """Gradient of `output`, or of its product with `grad_output`. Processes that share blocks meet here."""
        if self.sharded:
            self.processes.exchange("the backward pass")
        return self._differentiate(output, self.parameters, grad_output, keep_graph=keep_graph)


class FlowMatchingTerm:
    """L_pre of USO, over the examples that have a target."""

    def __init__(self, model: Differentiated) -> None:
        self.model = model

    def add(self, batch: MicroBatch, sums: TermSums) -> None:
        """Add loss, number of targets and gradient of a micro-batch."""
        model, policy = self.model, self.model.policy
        pairs = zip(batch.examples, batch.seed_B, strict=True)
        chosen = [(example, seed) for example, seed in pairs if example.target is not None]
        if not chosen:
            sums.add(FLOW_MATCHING, torch.zeros(()), 0)
            if model.sharded:
                self._pass_along(batch, sums)
            return
        examples, seed_B = [example for example, _ in chosen], [seed for _, seed in chosen]
        targets_B3HW = torch.stack([_target(example, batch.image_size) for example in examples])
        clean_BLC = policy.encode_pixels(targets_B3HW)
        t_B, noise_BLC = draw_times_and_noise(seed_B, clean_BLC, policy.training_sigmas(batch.image_size))
        with torch.enable_grad():
            velocity = model.velocity(policy.encode(examples), "train", batch.image_size)
            loss = flow_matching_loss(velocity, clean_BLC, noise_BLC, t_B).sum()
        sums.add(FLOW_MATCHING, loss, len(examples))
        sums.add_gradient(FLOW_MATCHING, model.gradient(loss))

    def _pass_along(self, batch: MicroBatch, sums: TermSums) -> None:
        """Run the policy forward and backward for nothing, because the other processes need this one's shards."""
        policy = self.model.policy
        length, channels = policy.latent_shape(batch.image_size)
        device, number = device_of(policy), len(batch.examples)
        with torch.enable_grad():
            velocity = self.model.velocity(policy.encode(batch.examples), "train", batch.image_size)
            t_B = torch.ones(number, device=device)
            velocity_BLC = velocity(torch.zeros(number, length, channels, device=device), t_B)
        sums.add_gradient(FLOW_MATCHING, self.model.gradient(velocity_BLC, torch.zeros_like(velocity_BLC)))


class RewardTerms:
    """Rewards of what the gradient window draws, from each entry step of a prefix.

    Backpropagation goes in two legs that meet at the pixels: the rewards' (`reward_leg`), then the policy's.
    """

    def __init__(self, model: Differentiated, objective: Objective, window: WindowConfig) -> None:
        self.model, self.objective, self.window = model, objective, window

    def add(
        self, rollout: Rollout, image_size: tuple[int, int], sums: TermSums, *, step: int, merge: bool, clock: Clock
    ) -> None:
        """Add scores, and each term's sum, count and gradient.

        Args:
            merge: all terms share one backward pass through the policy; their gradient is then that of the loss, under
                the key `MERGED`, already divided. It must be the only prefix of the step, entered once.
        """
        for trajectory in by_entry(rollout.trajectory):
            entered = dataclasses.replace(rollout, trajectory=trajectory)
            self._enter(entered, image_size, sums, step=step, merge=merge, clock=clock)

    def _enter(
        self, rollout: Rollout, image_size: tuple[int, int], sums: TermSums, *, step: int, merge: bool, clock: Clock
    ) -> None:
        policy, examples = self.model.policy, rollout.examples
        with torch.enable_grad(), clock.phase("window"):
            velocity = self.model.velocity(policy.encode(examples), "sample", image_size)
            clean_BLC = run_window(velocity, rollout.trajectory, self.window, enable_grad=True)
        with torch.enable_grad(), clock.phase("decode"):
            pixels_B3HW = policy.decode(clean_BLC, image_size)
        with clock.phase("score"):
            pixel_grads = reward_leg(self.objective, pixels_B3HW, examples, sums, step=step)
            if self.model.sharded:
                weighted = [name for name in self.objective.rules(step) if self.objective.weight(name, step)]
                pixel_grads = {name: pixel_grads.get(name, torch.zeros_like(pixels_B3HW)) for name in weighted}
        if merge and len(self.objective.active_rewards(step)) > 1:
            said = self.model.processes.exchange("the scores", sums.counts)
            counts = {name: sum(other.get(name, 0) for other in said) for name in pixel_grads}
            scaled = [self.objective.coefficient(n, step, counts[n]) * grad for n, grad in pixel_grads.items()]
            pixel_grads = {MERGED: torch.stack(scaled).sum(0)} if scaled else {}
        with clock.phase("backward"):
            for left, (name, grad_B3HW) in zip(reversed(range(len(pixel_grads))), pixel_grads.items(), strict=True):
                sums.add_gradient(name, self.model.gradient(pixels_B3HW, grad_B3HW, keep_graph=left > 0))


def _target(example: Example, image_size: tuple[int, int]) -> Tensor:
    target = example.target
    if target is None or tuple(target.shape) != (3, *image_size):
        shape = None if target is None else list(target.shape)
        raise ConfigError(
            f"example '{example.id}': its target has shape {shape}, but rollout.image_size asks for {[3, *image_size]}"
        )
    return target
