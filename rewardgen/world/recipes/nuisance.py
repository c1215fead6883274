"""Disturbances that a judge must not mistake for style or content: autoencoder artefacts, noise, blur, small shifts."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F


def disturb(pixels: Tensor, vae: AutoencoderKL, seed: int) -> Tensor:
    """Pictures [N, 3, S, S] -> the same pictures, each disturbed in its own way; a quarter stays as it is."""
    rng = torch.Generator().manual_seed(seed)
    n = pixels.shape[0]
    order = torch.randperm(n, generator=rng)
    coded, noisy, soft = order[: n // 2], order[n // 4 : n // 2 + n // 8], order[n // 2 : n // 2 + n // 8]
    out = pixels.clone()
    with torch.no_grad():
        latents = vae.encode(pixels[coded] * 2 - 1).latent_dist.mean
        wobble = 0.15 * torch.rand(len(coded), 1, 1, 1, generator=rng) / float(vae.config.scaling_factor)
        out[coded] = vae.decode(latents + wobble * torch.randn(latents.shape, generator=rng)).sample / 2 + 0.5
    sigma = 0.08 * torch.rand(len(noisy), 1, 1, 1, generator=rng)
    out[noisy] = out[noisy] + sigma * torch.randn(out[noisy].shape, generator=rng)
    out[soft] = blur(out[soft], 0.6)
    shift = torch.randint(-1, 2, (2,), generator=rng).tolist()
    return torch.roll(out, shift, (2, 3)).clamp(0, 1)


def blur(pixels: Tensor, sigma: float) -> Tensor:
    """Pictures [N, 3, H, W] through a Gaussian of so many pixels, cut off at 2."""
    axis = torch.arange(-2, 3, dtype=pixels.dtype)
    kernel = torch.exp(-axis.square() / (2 * sigma**2))
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
    padded = F.pad(pixels, (2, 2, 2, 2), mode="replicate")
    return F.conv2d(padded, kernel.expand(3, 1, 5, 5), groups=3)
