"""The autoencoder of the identity world: the tiny one, trained on with people.

Faces are finer than the styled shapes that the first was made for: it keeps them at 23 dB and loses the eyes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from rewardgen.world.faces import MAX_PEOPLE, draw_groups, portraits
from rewardgen.world.people import draw_people
from rewardgen.world.recipes import vae
from rewardgen.world.recipes.saving import save_model
from rewardgen.world.recipes.training import Recipe, fit

RECIPE = Recipe(name="people-vae", version="1", steps=1600, batch=8, lr=1e-3, seed=701)
CROP = 48
"""Pixels of a side of the crops it learns from."""
FOLDER = "people/vae"


def make(folder: Path, steps: int) -> AutoencoderKL:
    """Train the world's autoencoder on; the latents' scale is measured again."""
    model = vae.load(folder)
    train(model, steps)
    with torch.no_grad():
        latents = torch.cat([model.encode(crops(64, seed) * 2 - 1).latent_dist.mean for seed in (7, 8)])
    model.register_to_config(
        scaling_factor=round(float(1 / latents.std()), 4), shift_factor=round(float(latents.mean()), 4)
    )
    return model.eval()


def train(model: AutoencoderKL, steps: int) -> list[float]:
    """In place; returns the losses: L1, squares and edges of pixels, a light KL."""

    def loss(step: int) -> Tensor:
        pixels = crops(RECIPE.batch, RECIPE.seed * 1_000_003 + step) * 2 - 1
        posterior = model.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(step))
        rebuilt = model.decode(posterior.mean + posterior.std * noise).sample
        edges = sum(F.l1_loss(rebuilt.diff(dim=d), pixels.diff(dim=d)) for d in (2, 3))
        error: Tensor = F.l1_loss(rebuilt, pixels) + 3 * F.mse_loss(rebuilt, pixels) + 0.25 * edges
        divergence: Tensor = posterior.kl().mean()
        return error + 1e-4 * divergence / pixels[0].numel()

    return fit(model, loss, RECIPE, steps)


def crops(n: int, seed: int) -> Tensor:
    """Parts [n, 3, 48, 48] of group pictures of training identities, four of each picture."""
    groups = group_pictures(-(-n // 4), seed)
    rng = torch.Generator().manual_seed(seed + 1)
    corners = torch.randint(groups.shape[2] - CROP + 1, (n, 2), generator=rng).tolist()
    return torch.stack([groups[i // 4, :, y : y + CROP, x : x + CROP] for i, (y, x) in enumerate(corners)])


def group_pictures(n: int, seed: int, held_out: bool = False) -> Tensor:
    """Six people each, [n, 3, 96, 96]."""
    people = draw_people(MAX_PEOPLE * n, seed, "held_out" if held_out else "train")
    return draw_groups(people, torch.arange(MAX_PEOPLE * n).reshape(n, MAX_PEOPLE), seed + 3)[0]


def rebuild(model: AutoencoderKL, pixels: Tensor, batch: int = 32) -> Tensor:
    """Pictures in [0, 1] encoded and decoded again, without gradient."""
    with torch.no_grad():
        return torch.cat(
            [
                (model.decode(model.encode(part * 2 - 1).latent_dist.mean).sample / 2 + 0.5).clamp(0, 1)
                for part in pixels.split(batch)
            ]
        )


def reconstruction_psnr(model: AutoencoderKL, n: int = 24) -> dict[str, float]:
    """Peak signal-to-noise ratio in dB on held-out people, in groups and alone."""
    alone, *_ = portraits(draw_people(2 * n, 12, "held_out"), 13)
    return {
        name: float(-10 * torch.log10((rebuild(model, pixels) - pixels).square().mean()))
        for name, pixels in (("groups_psnr_db", group_pictures(n, 11, held_out=True)), ("portraits_psnr_db", alone))
    }


def load(folder: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(folder / FOLDER, torch_dtype=torch.float32).eval()


def build(folder: Path, steps_factor: float) -> dict[str, float]:
    """Train, save, and report the reconstruction's quality in dB."""
    save_model(make(folder, RECIPE.scaled(steps_factor)), folder / FOLDER)
    return reconstruction_psnr(load(folder))
