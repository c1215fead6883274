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

RECIPE = Recipe(name="reader", version="1", steps=2400, batch=64, lr=2e-3, seed=303)
PICTURES = 8192


def make(vae: AutoencoderKL, steps: int = RECIPE.steps, pictures: int = PICTURES) -> CellReader:
    torch.manual_seed(RECIPE.seed)
    reader = CellReader()
    pixels_N3HW, grid_N9 = lessons(vae, pictures)

    def loss(step: int) -> Tensor:
        rng = torch.Generator().manual_seed(RECIPE.seed * 1_000_003 + step)
        chosen = torch.randint(len(grid_N9), (RECIPE.batch,), generator=rng)
        return F.cross_entropy(reader(pixels_N3HW[chosen]).flatten(0, 1), grid_N9[chosen].flatten())

    fit(reader, loss, RECIPE, steps)
    return reader.eval()


def lessons(vae: AutoencoderKL, n: int, chunk: int = 256) -> tuple[Tensor, Tensor]:
    """Disturbed pictures [n, 3, 64, 64] and what stands in their cells [n, 9]; one chunk in eight is unstyled."""
    pixels, grids = [], []
    for i in range(-(-n // chunk)):
        seed = RECIPE.seed * 1_000_003 + 10 * i
        content = draw_contents(chunk, seed, "train")
        style = draw_styles(chunk, seed + 1, "train") if i % 8 else draw_photo_styles(chunk, seed + 1)
        pixels.append(disturb(render(content, style, seed), vae, seed + 2))
        grids.append(content_grid(content))
    return torch.cat(pixels)[:n], torch.cat(grids)[:n]


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
    pictures = max(64, round(PICTURES * min(1.0, steps_factor)))
    save(make(vae, RECIPE.scaled(steps_factor), pictures), folder)
    return {"held_out_agreement": held_out_agreement(load_reader(folder / "reader.safetensors"), vae)}
