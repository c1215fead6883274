"""The tiny CSD, taught to be hard to game.

A CSD trained on plain positives and negatives is raised by the policy while the truth gets worse. Three things
cure it here: *graded* targets (the cosine of two pictures is regressed to the true similarity of their styles, so
that a slightly wrong palette scores slightly lower), *hard negatives* (the same style with a spoiled palette,
texture or outline) and *adversarial disturbance* (one signed-gradient step on half of the pictures, so that what
raises the score is visible) beside autoencoder artefacts, noise, blur and shifts.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional as F

from rewardgen.rewards.csd import CLIP_MEAN, CLIP_STD, CsdConfig, CsdModel, load_csd, save_csd
from rewardgen.rewards.preprocess import normalise
from rewardgen.world.recipes.nuisance import disturb
from rewardgen.world.recipes.training import Recipe, fit
from rewardgen.world.recipes.vae import load as load_vae
from rewardgen.world.scenes import (
    Content,
    Style,
    concat,
    content_grid,
    draw_contents,
    draw_photo_styles,
    draw_styles,
    render,
    spoil,
)
from rewardgen.world.similarity import style_similarity

RECIPE = Recipe(name="csd", version="1", steps=1000, batch=64, lr=1.5e-3, seed=404)
CONFIG = CsdConfig(image_size=64, patch_size=8, width=96, layers=3, heads=3, output_dim=48)
ADVERSARY = 0.04
"""Largest signed-gradient step, in pixel values of [0, 1]."""


LESSONS = 300
"""Batches made beforehand and gone through several times; the adversary's disturbance is new each time."""


def make(vae: AutoencoderKL, steps: int = RECIPE.steps) -> CsdModel:
    torch.manual_seed(RECIPE.seed)
    model = CsdModel(CONFIG)
    count = min(steps, LESSONS)
    lessons = [lesson(RECIPE.batch, RECIPE.seed * 1_000_003 + 20 * i, vae) for i in range(count)]

    def loss(step: int) -> Tensor:
        content, style, pixels = lessons[step % count]
        truth = style_similarity(style, style)
        half = RECIPE.batch // 2
        attacked = pixels[:half].clone().requires_grad_()
        (slope,) = torch.autograd.grad(_regression(model, torch.cat([attacked, pixels[half:]]), truth), attacked)
        strength = ADVERSARY * torch.rand(half, 1, 1, 1, generator=torch.Generator().manual_seed(step))
        pixels = torch.cat([(attacked.detach() + strength * slope.sign()).clamp(0, 1), pixels[half:]])
        _, content_code, _ = model(_normalised(pixels))
        same_place = (content_grid(content)[:, None] == content_grid(content)[None]).float().mean(-1)
        return _regression(model, pixels, truth) + 0.1 * F.mse_loss(content_code @ content_code.T, same_place)

    fit(model, loss, RECIPE, steps)
    return model.eval()


def lesson(n: int, seed: int, vae: AutoencoderKL) -> tuple[Content, Style, Tensor]:
    """`n` pictures of n/4 styles: each style in two contents, once spoiled and once changed a little."""
    k = n // 4
    style, other = draw_styles(k, seed, "train"), draw_styles(k, seed + 1, "train")
    photo = draw_photo_styles(k, seed + 2)
    styles = concat(
        [style, style, spoil(style, other if seed % 40 else photo, seed + 3), nudge(style, other, seed + 4)]
    )
    contents = draw_contents(n, seed + 5, "train")
    return contents, styles, disturb(render(contents, styles, seed + 6), vae, seed + 7)


def nudge(style: Style, other: Style, seed: int) -> Style:
    """A near miss: one of palette, texture amount, texture direction and period a little off."""
    rng = torch.Generator().manual_seed(seed)
    n = style.texture_N.shape[0]
    which = torch.randint(4, (n,), generator=rng)
    mix = (0.1 + 0.4 * torch.rand(n, generator=rng)) * (which == 0)
    amount = torch.where(which == 1, torch.rand(n, generator=rng), torch.ones(n))
    turn = torch.where(which == 2, 0.3 + 0.7 * torch.rand(n, generator=rng), torch.zeros(n))
    stretch = torch.where(which == 3, 0.7 + 0.8 * torch.rand(n, generator=rng), torch.ones(n))
    return replace(
        style,
        background_N3=torch.lerp(style.background_N3, other.background_N3, mix.view(n, 1)),
        fill_NK3=torch.lerp(style.fill_NK3, other.fill_NK3, mix.view(n, 1, 1)),
        amount_N=style.amount_N * amount,
        angle_N=style.angle_N + turn,
        period_N=style.period_N * stretch,
    )


def rank_correlation(model: CsdModel, n: int = 256, seed: int = 51) -> float:
    """Spearman correlation of CSD and true similarity over held-out pairs (right, near, spoiled and unrelated)."""
    style, other = draw_styles(n, seed, "held_out"), draw_styles(n, seed + 1, "held_out")
    quarter = torch.arange(n) % 4
    kinds = [style, nudge(style, other, seed + 2), spoil(style, other, seed + 3), other]
    shown = replace(
        style,
        **{
            name: torch.stack([getattr(kinds[int(q)], name)[i] for i, q in enumerate(quarter)])
            for name in style.__dataclass_fields__
        },
    )
    with torch.no_grad():
        a = model(_normalised(render(draw_contents(n, seed + 4, "held_out"), style)))[2]
        b = model(_normalised(render(draw_contents(n, seed + 5, "held_out"), shown)))[2]
    return float(spearmanr((a * b).sum(1).numpy(), style_similarity(style, shown).diag().numpy()).statistic)


def save(model: CsdModel, folder: Path) -> None:
    save_csd(model, folder / "csd.safetensors")


def _regression(model: CsdModel, pixels: Tensor, truth_NN: Tensor) -> Tensor:
    """Squared error of cosines, near pairs counting more; the diagonal says nothing and is left out."""
    style = model(_normalised(pixels))[2]
    weight = (0.2 + truth_NN) * (1 - torch.eye(truth_NN.shape[0]))
    return (weight * (style @ style.T - truth_NN).square()).sum() / weight.sum()


def _normalised(pixels: Tensor) -> Tensor:
    return normalise(pixels, CLIP_MEAN, CLIP_STD)


def build(folder: Path, steps_factor: float) -> dict[str, float]:
    """Train, save, and report the rank correlation with true similarity."""
    save(make(load_vae(folder), RECIPE.scaled(steps_factor)), folder)
    return {"rank_correlation": rank_correlation(load_csd(str(folder / "csd.safetensors")))}
