"""Denoising times: how FLUX-style models space their steps, as pure functions.

Time 1 is pure noise, time 0 the clean picture. Shape suffix: T denoising steps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BASE_TOKENS, MAX_TOKENS = 256, 4096
BASE_SHIFT, MAX_SHIFT = 0.5, 1.15
TRAINING_GRID_SIZE = 1000


def mu_from_tokens(num_tokens: float, base_shift: float = BASE_SHIFT, max_shift: float = MAX_SHIFT) -> float:
    """Logarithm of the time shift: linear in the number of target tokens, through
    (256, base_shift) and (4096, max_shift), and not clamped outside of them (FLUX.1 release)."""
    slope = (max_shift - base_shift) / (MAX_TOKENS - BASE_TOKENS)
    return slope * num_tokens + (base_shift - slope * BASE_TOKENS)


def shift_times(times_T: Tensor, mu: float) -> Tensor:
    """Move times in [0, 1] toward noise: `e^mu / (e^mu + 1/t - 1)`. Keeps 0, 1 and the order."""
    # A plain number divided by a tensor, because the release rounds that way: the model sees 1000 t, so that one
    # bit of t moves the sampled latents by about 1e-5. The same rounding can put 1 a bit below itself.
    shifted_T = math.exp(mu) / (math.exp(mu) + (1 / times_T - 1))
    return torch.where(times_T == 1, 1.0, shifted_T)


def token_count_sigmas(
    num_steps: int,
    num_tokens: float,
    *,
    base_shift: float = BASE_SHIFT,
    max_shift: float = MAX_SHIFT,
    shift: bool = True,
) -> Tensor:
    """Sampling times [num_steps + 1], float32, from 1 to 0, shifted for a number of target tokens."""
    times_T = torch.linspace(1, 0, num_steps + 1)
    return shift_times(times_T, mu_from_tokens(num_tokens, base_shift, max_shift)) if shift else times_T


def official_token_count(image_size: tuple[int, int]) -> int:
    """The token count that the released USO pipeline gives to its schedule, for (height, width) in pixels.

    It divides by 8 and then once more by 16 x 16, which is 1/64 of the tokens denoised at 1024 x 1024. The released
    weights are sampled that way, so the count is kept as it is, whatever the factor of the autoencoder in use.
    """
    height, width = (side // 16 * 16 for side in image_size)
    return (width // 8) * (height // 8) // (16 * 16)


def official_sigmas(num_steps: int, image_size: tuple[int, int]) -> Tensor:
    """Sampling times [num_steps + 1] of the released USO pipeline for a picture of (height, width) in pixels."""
    return token_count_sigmas(num_steps, official_token_count(image_size))


def training_sigmas(num_tokens: float) -> Tensor:
    """The 1000 times, from 1 to 0, from which training draws uniformly by index (UNO release)."""
    return shift_times(torch.linspace(1, 0, TRAINING_GRID_SIZE), mu_from_tokens(num_tokens))
