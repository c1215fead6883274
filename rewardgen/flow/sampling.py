"""Euler sampling of a flow-matching model: pure functions over a velocity callable.

Shape suffixes: B batch, L latent tokens, C channels per token, T denoising steps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rewardgen.transfer import to_device
from rewardgen.types import VelocityFn


def sample(
    velocity: VelocityFn,
    latents_BLC: Tensor,
    sigmas_T: Tensor,
    *,
    start: int,
    stop: int,
    enable_grad: bool,
    checkpoint_steps: bool = False,
) -> Tensor:
    """Take the Euler steps `start` to `stop - 1`: `x += (sigma_next - sigma) * velocity(x, sigma)`.

    The prefix without gradient and the window with gradient are both this call, so a window entered at a stored
    state reproduces the states that the same weights drew without gradient, bit for bit.

    Args:
        velocity: `(latents_BLC, t_B) -> velocity_BLC`.
        latents_BLC: state at `sigmas_T[start]`, float32 or float64. It is not modified.
        sigmas_T: [T + 1] times from 1 to 0.
        start: first step taken, in [0, T].
        stop: first step not taken, in [start, T].
        enable_grad: build a graph. Without it the result is detached whatever the caller's gradient mode is.
        checkpoint_steps: keep only the states between steps for the backward pass and compute the rest again.

    Returns:
        The state at `sigmas_T[stop]`, in the dtype of `latents_BLC`.

    Raises:
        ValueError: steps outside of the schedule, or a state in half precision.
    """
    num_steps = sigmas_T.numel() - 1
    if not 0 <= start <= stop <= num_steps:
        raise ValueError(f"steps {start} to {stop} are not within a schedule of {num_steps} steps")
    if latents_BLC.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"latents are accumulated in float32 or float64, not in {latents_BLC.dtype}")
    sigmas_T = to_device(sigmas_T, latents_BLC.device)
    x_BLC = latents_BLC
    with torch.set_grad_enabled(enable_grad):
        for step in range(start, stop):
            arguments = (velocity, x_BLC, sigmas_T[step], sigmas_T[step + 1])
            if enable_grad and checkpoint_steps:
                x_BLC = checkpoint(_euler_step, *arguments, use_reentrant=False)
            else:
                x_BLC = _euler_step(*arguments)
    return x_BLC if enable_grad else x_BLC.detach()


def _euler_step(velocity: VelocityFn, x_BLC: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    v_BLC = velocity(x_BLC, sigma.expand(len(x_BLC)))
    return x_BLC + (sigma_next - sigma) * v_BLC.to(x_BLC.dtype)


def clean_estimate(x_BLC: Tensor, v_BLC: Tensor, t: Tensor) -> Tensor:
    """The picture as seen from time t: `clean_hat = x_t - t v`, as `x_t = (1-t) clean + t noise`, `v = noise - clean`.

    Args:
        x_BLC: state at time t.
        v_BLC: velocity there.
        t: scalar or [B].
    """
    t = t.to(x_BLC).reshape(-1, *[1] * (x_BLC.dim() - 1)) if t.dim() else t.to(x_BLC)
    return x_BLC - t * v_BLC.to(x_BLC.dtype)
