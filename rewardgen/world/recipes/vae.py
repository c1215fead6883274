"""The tiny autoencoder: `AutoencoderKL`, 4x smaller per side, 8 latent channels, scaled to unit variance."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from rewardgen.world.recipes.saving import save_model
from rewardgen.world.recipes.training import Recipe, fit
from rewardgen.world.scenes import draw_contents, draw_photo_styles, draw_styles, render

ROUNDS = (
    Recipe(name="vae", version="1", steps=1800, batch=16, lr=2e-3, seed=101),
    Recipe(name="vae-colour", version="1", steps=1500, batch=16, lr=1.2e-3, seed=102),
)
"""The second round adds a squared error: after the first, edges were right and the colours of small shapes bled."""


def untrained() -> AutoencoderKL:
    """The autoencoder as training finds it."""
    torch.manual_seed(ROUNDS[0].seed)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=True,
    )


def make(steps_factor: float = 1.0) -> AutoencoderKL:
    """Train the autoencoder on styled and unstyled pictures: L1 on pixels and on their differences, a light KL."""
    vae = untrained()
    for recipe, edge_weight, square_weight in zip(ROUNDS, (0.5, 0.25), (0.0, 3.0), strict=True):
        train_round(vae, recipe, recipe.scaled(steps_factor), edge_weight, square_weight)
    with torch.no_grad():
        latents = vae.encode(pictures(256, 7) * 2 - 1).latent_dist.mean
    vae.register_to_config(
        scaling_factor=round(float(1 / latents.std()), 4), shift_factor=round(float(latents.mean()), 4)
    )
    return vae.eval()


def train_round(
    vae: AutoencoderKL, recipe: Recipe, steps: int, edge_weight: float, square_weight: float
) -> list[float]:
    """One round of training, in place; returns the losses."""

    def loss(step: int) -> Tensor:
        pixels = pictures(recipe.batch, recipe.seed * 1_000_003 + step) * 2 - 1
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(step))
        rebuilt = vae.decode(posterior.mean + posterior.std * noise).sample
        edges = sum(F.l1_loss(rebuilt.diff(dim=d), pixels.diff(dim=d)) for d in (2, 3))
        error: Tensor = F.l1_loss(rebuilt, pixels) + square_weight * F.mse_loss(rebuilt, pixels) + edge_weight * edges
        divergence: Tensor = posterior.kl().mean()
        return error + 1e-4 * divergence / pixels[0].numel()

    return fit(vae, loss, recipe, steps)


def pictures(n: int, seed: int) -> Tensor:
    """Three styled pictures for each unstyled one, [n, 3, 64, 64]."""
    photos = n // 4
    styles = render(draw_contents(n - photos, seed, "train"), draw_styles(n - photos, seed + 1, "train"), seed)
    return torch.cat([styles, render(draw_contents(photos, seed + 2, "train"), draw_photo_styles(photos, seed + 3))])


def reconstruction_psnr(vae: AutoencoderKL, n: int = 128) -> float:
    """Peak signal-to-noise ratio in dB on held-out pictures."""
    pixels = render(draw_contents(n, 11, "held_out"), draw_styles(n, 12, "held_out"))
    with torch.no_grad():
        rebuilt = vae.decode(vae.encode(pixels * 2 - 1).latent_dist.mean).sample / 2 + 0.5
    return float(-10 * torch.log10((rebuilt.clamp(0, 1) - pixels).square().mean()))


def load(folder: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(folder / "base" / "vae", torch_dtype=torch.float32).eval()


def build(folder: Path, steps_factor: float) -> dict[str, float]:
    """Train, save, and report the reconstruction's quality in dB."""
    save_model(make(steps_factor), folder / "base" / "vae")
    return {"psnr_db": reconstruction_psnr(load(folder))}
