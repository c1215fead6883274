"""A rollout worker: (request, weights) -> Rollout, pure, without gradient, in one process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self, TypeAlias

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rewardgen.flow.sampling import sample
from rewardgen.flow.stochastic import sample_stochastic
from rewardgen.flow.window import WindowConfig
from rewardgen.policy import Mode, Policy, noise_like_request
from rewardgen.settings import Settings
from rewardgen.types import Condition, Rollout, RolloutRequest, Trajectory, VelocityFn

Precision: TypeAlias = Literal["fp32", "bf16"]


class RolloutConfig(Settings):
    """How pictures are drawn while training."""

    image_size: tuple[int, int]
    """Height and width in pixels, of drawn pictures and of targets."""
    num_steps: int = Field(default=25, ge=1)
    """Denoising steps of the whole schedule. USO does not report its number; UMO uses 25 with its UNO base."""
    window: WindowConfig
    """Which of the steps carry gradient."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if min(self.image_size) < 1:
            raise ValueError(f"image_size must be positive, got {list(self.image_size)}")
        self.window.entry_bounds(self.num_steps)
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """The trainable weights of one version. Nothing else of the policy travels."""

    version: int
    tensors: Mapping[str, Tensor]


class RolloutWorker:
    """Draws pictures with the weights that come with the request.

    Args:
        policy: may be the learner's own (colocated) or a copy; weights are loaded where they differ.
        precision: arithmetic of the policy's forward pass, as in the learner.
    """

    def __init__(self, policy: Policy, *, precision: Precision = "fp32") -> None:
        self.policy = policy
        self.precision: Precision = precision
        self._version: int | None = None

    def rollout(self, request: RolloutRequest, weights: Weights) -> Rollout:
        """Encode, sample without gradient to `request.stop_step` and, if asked, decode. Everything is detached.

        Raises:
            ValueError: a picture was asked for from an unfinished trajectory.
        """
        if request.decode and request.stop_step != request.num_steps:
            raise ValueError(f"only {request.stop_step} of {request.num_steps} steps are taken: nothing to decode yet")
        with torch.no_grad():
            self._load(weights)
            noise_BLC = noise_like_request(self.policy, request.seed_B, request.image_size)
            sigmas_T = self.policy.sigmas(request.num_steps, request.image_size)
            noise_BLC = noise_BLC.to(device_of(self.policy))
            velocity = velocity_fn(
                self.policy,
                self.policy.encode(request.examples),
                mode="sample",
                image_size=request.image_size,
                precision=self.precision,
            )
            steps_SBLC, log_prob_BS = None, None
            if request.stochastic is None:
                entry_BLC = sample(velocity, noise_BLC, sigmas_T, start=0, stop=request.stop_step, enable_grad=False)
            else:
                entry_BLC, steps_SBLC, log_prob_BS = sample_stochastic(
                    velocity, noise_BLC, sigmas_T, stop=request.stop_step, stochastic=request.stochastic
                )
            pixels_B3HW = self.policy.decode(entry_BLC, request.image_size).clamp(0, 1) if request.decode else None
        return Rollout(
            examples=request.examples,
            trajectory=Trajectory(
                sigmas_T=sigmas_T,
                entry_step=request.stop_step,
                entry_BLC=entry_BLC,
                seed_B=request.seed_B,
                stochastic=request.stochastic,
                steps_SBLC=steps_SBLC,
                log_prob_BS=log_prob_BS,
            ),
            policy_version=weights.version,
            pixels_B3HW=pixels_B3HW,
            group_B=request.group_B,
        )

    def _load(self, weights: Weights) -> None:
        if weights.version == self._version:
            return
        for name, parameter in self.policy.trainable().items():
            tensor = weights.tensors[name]
            # A colocated worker is handed the very tensors it already holds.
            if tensor.data_ptr() != parameter.data_ptr():
                parameter.copy_(tensor)
        self._version = weights.version


def device_of(policy: Policy) -> torch.device:
    """The device of the policy's trained parameters."""
    return next(iter(policy.trainable().values())).device


def velocity_fn(
    policy: Policy, condition: Condition, *, mode: Mode, image_size: tuple[int, int], precision: Precision
) -> VelocityFn:
    """The policy's velocity in the given precision; used alike by rollouts and by the learner.

    Each forward has an autocast region of its own: its cache of cast weights must not outlive a gradient mode.
    """

    def region() -> torch.autocast:
        return torch.autocast(device_of(policy).type, dtype=torch.bfloat16, enabled=precision == "bf16")

    with region():
        inner = policy.velocity_fn(condition, mode=mode, image_size=image_size)

    def velocity(latents_BLC: Tensor, t_B: Tensor) -> Tensor:
        with region():
            return inner(latents_BLC, t_B).to(latents_BLC.dtype)

    return velocity
