"""The content witness's reader, trained on the generator with autoencoder artefacts, noise and blur."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from rewardgen.world.recipes.nuisance import disturb
from rewardgen.world.recipes.training import Recipe, fit
from rewardgen.world.recipes.vae import load as load_vae
from rewardgen.world.scenes import content_grid, draw_contents, draw_photo_styles, draw_styles, render
from rewardgen.world.witness import CellReader, agreement, load_reader

RECIPE = Recipe(name="reader", version="1", steps=900, batch=32, lr=2e-3, seed=303)


def make(vae: AutoencoderKL, steps: int = RECIPE.steps) -> CellReader:
    torch.manual_seed(RECIPE.seed)
    reader = CellReader()

    def loss(step: int) -> Tensor:
        seed = RECIPE.seed * 1_000_003 + 10 * step
        content = draw_contents(RECIPE.batch, seed, "train")
        styled = draw_styles(RECIPE.batch, seed + 1, "train") if step % 8 else draw_photo_styles(RECIPE.batch, seed + 1)
        pixels = disturb(render(content, styled, seed), vae, seed + 2)
        return F.cross_entropy(reader(pixels).flatten(0, 1), content_grid(content).flatten())

    fit(reader, loss, RECIPE, steps)
    return reader.eval()


def held_out_agreement(reader: CellReader, vae: AutoencoderKL, n: int = 256) -> float:
    """Agreement with the truth on autoencoded held-out pictures, in [0, 1]."""
    content = draw_contents(n, 41, "held_out")
    pixels = render(content, draw_styles(n, 42, "held_out"))
    with torch.no_grad():
        rebuilt = vae.decode(vae.encode(pixels * 2 - 1).latent_dist.mean).sample / 2 + 0.5
        return float(agreement(reader(rebuilt.clamp(0, 1)).argmax(-1), content_grid(content)).mean())


def save(reader: CellReader, folder: Path) -> None:
    save_file({k: v.half().contiguous() for k, v in reader.state_dict().items()}, folder / "reader.safetensors")


def build(folder: Path, steps_factor: float) -> dict[str, float]:
    """Train, save, and report the agreement with the truth on autoencoded pictures."""
    vae = load_vae(folder)
    save(make(vae, RECIPE.scaled(steps_factor)), folder)
    return {"held_out_agreement": held_out_agreement(load_reader(folder / "reader.safetensors"), vae)}
