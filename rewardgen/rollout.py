"""A rollout worker: (request, weights) -> Rollout, pure, without gradient, in one process."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Self, TypeAlias

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rewardgen.flow.sampling import sample
from rewardgen.flow.stochastic import sample_stochastic
from rewardgen.flow.window import WindowConfig
from rewardgen.policy import Mode, Policy, noise_like_request
from rewardgen.seeds import derive_seed, seed_globals
from rewardgen.settings import Settings
from rewardgen.transfer import to_device
from rewardgen.types import Condition, Rollout, RolloutRequest, Trajectory, VelocityFn

Precision: TypeAlias = Literal["fp32", "bf16"]


def _is_none(value: object) -> bool:
    return value is None


def _is_one(value: object) -> bool:
    return value == 1


class RolloutConfig(Settings):
    """How pictures are drawn while training."""

    image_size: tuple[int, int]
    """Height and width in pixels, of drawn pictures and of targets."""
    num_steps: int = Field(default=25, ge=1)
    """Denoising steps of the whole schedule. USO does not report its number; UMO uses 25 with its UNO base."""
    window: WindowConfig
    """Which of the steps carry gradient."""
    entries_per_rollout: int = Field(default=1, ge=1, exclude_if=_is_one)
    """Entry steps for each prefix drawn without gradient, all different; the reward terms are means over them. More
    than one makes more of a prefix: its steps are paid once."""
    buckets: tuple[tuple[int, int], ...] | None = Field(default=None, min_length=1, exclude_if=_is_none)
    """Heights and widths of pictures while training: each example goes to the nearest by its target's proportions, and
    its target is brought to that size. A micro-batch has one size. null: all have `image_size`, and targets must."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if min(self.image_size) < 1:
            raise ValueError(f"image_size must be positive, got {list(self.image_size)}")
        low, high = self.window.entry_bounds(self.num_steps)
        if high - low + 1 < self.entries_per_rollout:
            raise ValueError(
                f"entries_per_rollout is {self.entries_per_rollout}, but the window has {high - low + 1} entry steps"
            )
        if any(min(size) < 1 for size in self.buckets or ()):
            raise ValueError("buckets must be positive heights and widths")
        if len(set(self.buckets or ())) < len(self.buckets or ()):
            raise ValueError("buckets: a size stands there twice")
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """The trainable weights of one version. Nothing else of the policy travels.

    Args:
        version: number of updates.
        tensors: by the names of `Policy.trainable`; only read.
        key: a worker that has loaded weights of this key has these.
    """

    version: int
    tensors: Mapping[str, Tensor]
    key: str = field(default_factory=lambda: secrets.token_hex(8))


class RolloutWorker:
    """Draws pictures with the weights that come with the request.

    Args:
        policy: a policy of its own, or, `colocated`, the learner's.
        precision: arithmetic of the policy's forward pass, as in the learner.
        colocated: the policy has its own weights back after each call, if others were asked for.
    """

    def __init__(self, policy: Policy, *, precision: Precision = "fp32", colocated: bool = False) -> None:
        self.policy = policy
        self.precision: Precision = precision
        self.colocated = colocated
        self._loaded: str | None = None

    def rollout(self, request: RolloutRequest, weights: Weights) -> Rollout:
        """Encode, sample without gradient to `request.stop_step` and, if asked, decode. Everything is detached.

        Raises:
            ValueError: a picture was asked for from an unfinished trajectory, or a state beyond its end.
        """
        if any(step > request.stop_step for step in request.keep_steps):
            raise ValueError(f"states before {list(request.keep_steps)} are wanted of {request.stop_step} steps")
        if request.keep_steps and request.stochastic is not None:
            raise ValueError("of stochastic steps all states are kept: keep_steps cannot be asked for as well")
        if request.decode and request.stop_step != request.num_steps:
            raise ValueError(f"only {request.stop_step} of {request.num_steps} steps are taken: nothing to decode yet")
        # What a plug-in draws from the global generators belongs to the micro-batch, whichever process has it.
        seed_globals(derive_seed("rollout", *request.seed_B))
        with torch.no_grad(), self._with(weights):
            noise_BLC = noise_like_request(self.policy, request.seed_B, request.image_size)
            sigmas_T = self.policy.sigmas(request.num_steps, request.image_size)
            velocity = velocity_fn(
                self.policy,
                self.policy.encode(request.examples),
                mode="sample",
                image_size=request.image_size,
                precision=self.precision,
            )
            entry_BLC, kept, start = to_device(noise_BLC, device_of(self.policy)), {}, 0
            steps_SBLC, log_prob_BS = None, None
            if request.stochastic is not None:
                entry_BLC, steps_SBLC, log_prob_BS = sample_stochastic(
                    velocity, entry_BLC, sigmas_T, stop=request.stop_step, stochastic=request.stochastic
                )
            else:
                for stop in sorted({*request.keep_steps, request.stop_step}):
                    entry_BLC = sample(velocity, entry_BLC, sigmas_T, start=start, stop=stop, enable_grad=False)
                    kept[stop], start = entry_BLC, stop
            if request.keep_steps:
                steps_SBLC = torch.stack([kept[step] for step in request.keep_steps])
            pixels_B3HW = self.policy.decode(entry_BLC, request.image_size).clamp(0, 1) if request.decode else None
            if pixels_B3HW is not None and request.eight_bit:
                pixels_B3HW = to_eight_bit(pixels_B3HW)
        return Rollout(
            examples=request.examples,
            trajectory=Trajectory(
                sigmas_T=sigmas_T,
                entry_step=request.stop_step,
                entry_BLC=entry_BLC,
                seed_B=request.seed_B,
                stochastic=request.stochastic,
                steps_SBLC=steps_SBLC,
                kept_steps=request.keep_steps,
                log_prob_BS=log_prob_BS,
            ),
            policy_version=weights.version,
            pixels_B3HW=pixels_B3HW,
            group_B=request.group_B,
        )

    @contextmanager
    def _with(self, weights: Weights) -> Iterator[None]:
        """The policy with these weights."""
        parameters = self.policy.trainable()
        if self.colocated:
            # Mostly they are the very tensors that it has, or, where batches are drawn ahead, equal ones.
            changed = {n: p for n, p in parameters.items() if not _equal(p, weights.tensors[n])}
            own = {name: parameter.clone() for name, parameter in changed.items()}
            try:
                _copy(weights.tensors, changed)
                yield
            finally:
                _copy(own, changed)
            return
        if weights.key != self._loaded:
            self._loaded = None  # should it end half way
            _copy(weights.tensors, parameters)
            self._loaded = weights.key
        yield


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() or torch.equal(a, b.to(a.device))


def _copy(sources: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, target in targets.items():
            if target.data_ptr() != sources[name].data_ptr():
                target.copy_(sources[name])


def to_eight_bit(pixels_B3HW: Tensor) -> Tensor:
    """Pictures in [0, 1] rounded to the nearest k / 255, in float32: what a file of 8 bits per channel would hold.

    The values are the same on every device. What is not finite stays so.
    """
    levels_B3HW = (pixels_B3HW.float() * 255).round()
    # By a tensor of its device: on a GPU a plain number would be a product with 1 / 255, off by a last bit.
    return levels_B3HW / levels_B3HW.new_full((), 255.0)


def device_of(policy: Policy) -> torch.device:
    """The device of the policy's trained parameters."""
    # Stops at the first: a walk through all modules would cost milliseconds each time.
    return next(parameter.device for parameter in policy.parameters() if parameter.requires_grad)


def velocity_fn(
    policy: Policy, condition: Condition, *, mode: Mode, image_size: tuple[int, int], precision: Precision
) -> VelocityFn:
    """The policy's velocity in the given precision; used alike by rollouts and by the learner.

    Each forward has an autocast region of its own: its cache of cast weights must not outlive a gradient mode.
    """

    device = device_of(policy).type

    def region() -> torch.autocast:
        return torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16")

    with region():
        inner = policy.velocity_fn(condition, mode=mode, image_size=image_size)

    def velocity(latents_BLC: Tensor, t_B: Tensor) -> Tensor:
        with region():
            return inner(latents_BLC, t_B).to(latents_BLC.dtype)

    return velocity
