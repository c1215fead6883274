"""Stochastic sampling of a flow-matching model, with the exact log-density of every noisy step.

A noisy step from time t to t' is Gaussian around a mean that is affine in state and velocity:

    x' = a x + b v(x, t) + s noise,     log p(x' | x) = sum over elements of log N(x'; a x + b v, s^2)

so that the coefficients (a, b, s) of a step say everything about it: how to draw, how likely a draw was, and how far
two policies are apart there. The noise keeps the model's marginals in the limit of many steps.

Shape suffixes: B batch, L latent tokens, C channels per token, T denoising steps, S stochastic steps among them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rewardgen.flow.sampling import sample
from rewardgen.seeds import derive_seed
from rewardgen.settings import Settings
from rewardgen.transfer import to_device
from rewardgen.types import Stochastic, VelocityFn


class StochasticWindow(Settings):
    """Which steps are noisy: some consecutive ones (MixGRPO, Flow-GRPO-Fast)."""

    size: int = Field(ge=1)
    """Number of noisy steps, one after the other. MixGRPO: 4 of 25. Each costs a forward and a backward pass."""
    range: tuple[int, int] | None = None
    """First and last step (0-based) that may be noisy, both included; null is all but the last of the schedule."""
    move_every: int | None = Field(default=None, ge=1)
    """Null places the window at random for each training step. A number lets it slide: it begins at the first step of
    `range`, moves on by one after so many training steps, and begins again at the end (MixGRPO: 25)."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.range is not None:
            low, high = self.range
            if not 0 <= low <= high:
                raise ValueError(f"range must be [first, last] with 0 <= first <= last, got {[low, high]}")
            if self.size > high - low + 1:
                raise ValueError(f"{self.size} steps do not fit into {[low, high]}, which has {high - low + 1}")
        return self

    def bounds(self, num_steps: int) -> tuple[int, int]:
        """First and last position of the window's first step, both included.

        Raises:
            ValueError: the window does not fit into `num_steps` steps of which the last is never noisy.
        """
        low, high = self.range or (0, num_steps - 2)
        if high > num_steps - 2:
            raise ValueError(
                f"step {high} of {num_steps} cannot be noisy: the last that can is {num_steps - 2}, because the noise"
                " of the very last step would stay in the picture"
            )
        if self.size > high - low + 1:
            raise ValueError(f"the window has {self.size} steps, but only {max(0, high - low + 1)} can be noisy")
        return low, high - self.size + 1


def noisy_steps(window: StochasticWindow | None, num_steps: int, *, training_step: int, seed: int) -> tuple[int, ...]:
    """The noisy steps of a training step: a function of it and of `seed` alone. No window: all but the last step.

    The release of Flow-GRPO makes the last step noisy too (and does not train on it); here it never is.
    """
    window = window or StochasticWindow(size=max(1, num_steps - 1))
    low, high = window.bounds(num_steps)
    if window.move_every is not None:
        first = low + training_step // window.move_every % (high - low + 1)
    else:
        first = int(torch.randint(low, high + 1, (), generator=torch.Generator().manual_seed(seed)))
    return tuple(range(first, first + window.size))


class Kernel(NamedTuple):
    """A Gaussian step `x' = state * x + velocity * v + std * noise`."""

    state: float
    velocity: float
    std: float


def kernel(sigmas_T: Tensor, step: int, stochastic: Stochastic) -> Kernel:
    """The coefficients of a noisy step from `t = sigmas_T[step]` to `t' = sigmas_T[step + 1]`, with `h = t - t'`.

    Euler-Maruyama on the SDE that has the model's marginals and diffusion `g^2 = noise_level^2 t / (1 - t)`
    (Flow-GRPO, 2505.05470):

        x' = x - h [v + g^2 / (2 t) (x + (1 - t) v)] + g sqrt(h) noise

    At t = 1, where g is infinite, the first time below 1 stands in its denominator, as in the release: however small
    the steps, the first one replaces the same share of the noise. What is wrong with that fades, with K steps, like
    K^(-noise_level^2); at usual K it is less than the Euler steps' own error.

    Raises:
        ValueError: a step without noise: the last one, or a noise level of 0.
    """
    t, t_next = float(sigmas_T[step]), float(sigmas_T[step + 1])
    if not (t_next > 0 and stochastic.noise_level > 0):
        raise ValueError(f"step {step} (from time {t:.3g} to {t_next:.3g}) draws no noise and has no density")
    g2, h = stochastic.noise_level**2 * t / (1 - t if t < 1 else 1 - t_next), t - t_next
    return Kernel(1 - h * g2 / (2 * t), -h * (1 + g2 * (1 - t) / (2 * t)), math.sqrt(g2 * h))


def log_density(next_BLC: Tensor, x_BLC: Tensor, v_BLC: Tensor, step: Kernel) -> Tensor:
    """Log-density [B], float64, of going from `x_BLC` with velocity `v_BLC` to `next_BLC`.

    It is the sum over all elements of a sample, not their mean. Rollout and learner both call this, so that equal
    velocities give equal values, bit for bit.
    """
    v_BLC = v_BLC.to(x_BLC.dtype)
    z_BLC = (next_BLC - step.state * x_BLC - step.velocity * v_BLC) / step.std
    constant = math.log(step.std) + 0.5 * math.log(2 * math.pi)
    return -0.5 * z_BLC.square().sum(dim=(1, 2), dtype=torch.float64) - z_BLC[0].numel() * constant


def divergence(v_BLC: Tensor, base_BLC: Tensor, step: Kernel) -> Tensor:
    """`KL(p || p_base)` of one step, per element of the state [B]: `b^2 mean((v - v_base)^2) / (2 s^2)`.

    Both policies have the same `s`, so that the divergence of two Gaussians is a squared distance of velocities. It
    is exactly 0 for equal velocities. (The release of Flow-GRPO leaves h out of s^2; its beta is h times ours.)
    """
    square_B = (v_BLC - base_BLC.to(v_BLC.dtype)).square().mean(dim=(1, 2))
    return square_B * (step.velocity**2 / (2 * step.std**2))


def sample_stochastic(
    velocity: VelocityFn, latents_BLC: Tensor, sigmas_T: Tensor, *, stop: int, stochastic: Stochastic
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample without gradient from noise to `sigmas_T[stop]`; noise is added in `stochastic.steps`, nowhere else.

    Args:
        velocity: `(latents_BLC, t_B) -> velocity_BLC`.
        latents_BLC: the initial noise, float32 or float64.
        sigmas_T: [T + 1] times from 1 to 0.
        stop: first step not taken; the noisy ones lie before it.
        stochastic: the noisy steps, at least one and consecutive.

    Returns:
        The state at `stop`; the states [S + 1, B, L, C] around the noisy steps; their log-densities [B, S], float64.

    Raises:
        ValueError: noisy steps that are not consecutive, or not within `stop`.
    """
    steps = stochastic.steps
    if not steps or steps != tuple(range(steps[0], steps[0] + len(steps))) or steps[-1] >= stop:
        raise ValueError(f"noisy steps must be consecutive and before step {stop}, got {list(steps)}")
    x_BLC = sample(velocity, latents_BLC, sigmas_T, start=0, stop=steps[0], enable_grad=False)
    times_T = to_device(sigmas_T, x_BLC.device)
    states, log_probs = [x_BLC], []
    with torch.no_grad():
        for index in steps:
            step = kernel(sigmas_T, index, stochastic)
            v_BLC = velocity(x_BLC, times_T[index].expand(len(x_BLC))).to(x_BLC.dtype)
            noise_BLC = step_noise(stochastic.seed_B, index, x_BLC)
            next_BLC = step.state * x_BLC + step.velocity * v_BLC + step.std * noise_BLC
            log_probs.append(log_density(next_BLC, x_BLC, v_BLC, step))
            x_BLC = next_BLC
            states.append(x_BLC)
    final_BLC = sample(velocity, x_BLC, sigmas_T, start=steps[-1] + 1, stop=stop, enable_grad=False)
    return final_BLC, torch.stack(states), torch.stack(log_probs, dim=1)


def step_noise(seed_B: Sequence[int], step: int, like_BLC: Tensor) -> Tensor:
    """Standard normal noise of one step, each sample from its own seed, drawn on the CPU in float32."""
    drawn = [
        torch.randn(like_BLC.shape[1:], generator=torch.Generator().manual_seed(derive_seed("sde", seed, step)))
        for seed in seed_B
    ]
    return to_device(torch.stack(drawn), like_BLC.device, like_BLC.dtype)
