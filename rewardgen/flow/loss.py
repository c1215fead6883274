"""The flow-matching loss.

Shape suffixes: B batch, L latent tokens, C channels per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rewardgen.transfer import to_device
from rewardgen.types import VelocityFn


def draw_times_and_noise(seed_B: Sequence[int], clean_BLC: Tensor, training_sigmas_N: Tensor) -> tuple[Tensor, Tensor]:
    """Draw (t_B, noise_BLC): t is a uniform index into the training grid, noise is standard normal.

    Each sample has a generator of its own on the CPU, so that neither its neighbours nor the device matter.
    """
    t_B, noise_BLC = [], []
    for seed in seed_B:
        generator = torch.Generator().manual_seed(seed)
        t_B.append(training_sigmas_N[torch.randint(training_sigmas_N.numel(), (), generator=generator)])
        noise_BLC.append(torch.randn(clean_BLC.shape[1:], generator=generator))
    device = clean_BLC.device
    return to_device(torch.stack(t_B), device), to_device(torch.stack(noise_BLC), device, clean_BLC.dtype)


def flow_matching_loss(velocity: VelocityFn, clean_BLC: Tensor, noise_BLC: Tensor, t_B: Tensor) -> Tensor:
    """Unweighted mean squared error of the velocity, one value per example [B].

    `x_t = (1 - t) clean + t noise`, target `noise - clean`, computed in at least float32.
    """
    clean_BLC, noise_BLC = (x if x.dtype == torch.float64 else x.float() for x in (clean_BLC, noise_BLC))
    t_B11 = t_B.to(clean_BLC)[:, None, None]
    x_BLC = (1 - t_B11) * clean_BLC + t_B11 * noise_BLC
    error_BLC = velocity(x_BLC, t_B).to(x_BLC.dtype) - (noise_BLC - clean_BLC)
    return error_BLC.square().mean(dim=(1, 2))
