"""The tiny CSD, taught to be hard to game.

A CSD trained on plain positives and negatives is raised by the policy while the truth gets worse. Four things cure
it here: *graded* targets (the cosine of two pictures is regressed to the true similarity of their styles, so that a
slightly wrong palette scores slightly lower), *hard negatives* (the same style with a spoiled palette, texture or
outline), *adversarial disturbance* (one signed-gradient step on half of the pictures, so that what raises the score
is visible), and in a second round *pictures that the base policy drew*, with the style read back from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional as F

from rewardgen.policy import Policy
from rewardgen.rewards.csd import CsdConfig, CsdModel, load_csd, save_csd
from rewardgen.rewards.preprocess import CLIP_MEAN, CLIP_STD, normalise
from rewardgen.world.recipes.base import load_policy
from rewardgen.world.recipes.lessons import Lesson, drawn, mixed_pairs, rendered
from rewardgen.world.recipes.training import Recipe, fit
from rewardgen.world.recipes.vae import load as load_vae
from rewardgen.world.scenes import content_grid
from rewardgen.world.similarity import style_similarity

ROUNDS = (
    Recipe(name="csd", version="1", steps=1000, batch=64, lr=1.5e-3, seed=404),
    Recipe(name="csd-longer", version="1", steps=1200, batch=64, lr=1.2e-3, seed=406),
    Recipe(name="csd-policy", version="1", steps=450, batch=64, lr=8e-4, seed=405),
    Recipe(name="csd-policy-longer", version="1", steps=300, batch=64, lr=8e-4, seed=407),
)
"""Two rounds on rendered pictures, then two on half rendered, half drawn ones."""
LESSONS = (300, 160, 64, 80)
"""Batches made beforehand for each round and gone through several times; the adversary is new each time."""
CONFIG = CsdConfig(image_size=64, patch_size=8, width=96, layers=3, heads=3, output_dim=48)
ADVERSARY = 0.04
"""Largest signed-gradient step, in pixel values of [0, 1]. From the second round on, every second step has one."""


def train_round(model: CsdModel, lessons: Sequence[Lesson], recipe: Recipe, steps: int) -> None:
    """One round of training, in place."""
    half = recipe.batch // 2

    def loss(step: int) -> Tensor:
        lesson = lessons[step % len(lessons)]
        truth_NN = style_similarity(lesson.style, lesson.style)
        rng = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        pixels = lesson.pixels_N3HW
        if recipe is ROUNDS[0] or step % 2:
            strength = ADVERSARY * torch.rand(recipe.batch, 1, 1, 1, generator=rng)
            strength[torch.randperm(recipe.batch, generator=rng)[half:]] = 0
            pixels = pixels.clone().requires_grad_()
            (slope,) = torch.autograd.grad(_regression(model, pixels, truth_NN), pixels)
            pixels = (lesson.pixels_N3HW + strength * slope.sign()).clamp(0, 1)
        _, content_code, _ = model(_normalised(pixels))
        grid = content_grid(lesson.content)
        same_place_NN = (grid[:, None] == grid[None]).float().mean(-1)
        return _regression(model, pixels, truth_NN) + 0.1 * F.mse_loss(content_code @ content_code.T, same_place_NN)

    fit(model.train(), loss, recipe, steps)
    model.eval()


def rank_correlation(model: CsdModel, n: int = 256, seed: int = 51) -> float:
    """Spearman correlation of CSD and true similarity over held-out rendered pairs."""
    a, style, b, shown = mixed_pairs(n, seed)
    return _spearman(model, a, b, style_similarity(style, shown).diag())


def rank_correlation_on_policy(model: CsdModel, policy: Policy, folder: Path, n: int = 256, seed: int = 61) -> float:
    """The same between a style reference and what the policy made of it, over unseen training-split styles."""
    lesson = drawn(n, seed, load_vae(folder), policy)
    k = n // 4
    asked, made = torch.arange(k).repeat(2), torch.arange(2 * k, 4 * k)
    truth = style_similarity(lesson.style, lesson.style)[asked, made]
    return _spearman(model, lesson.pixels_N3HW[asked], lesson.pixels_N3HW[made], truth)


def build(folder: Path, steps_factor: float) -> dict[str, float]:
    """Train all rounds, save, and report the rank correlations with true similarity."""
    vae, policy = load_vae(folder), load_policy(folder)
    torch.manual_seed(ROUNDS[0].seed)
    model = CsdModel(CONFIG)
    steps = [recipe.scaled(steps_factor) for recipe in ROUNDS]
    counts = [min(count, most) for count, most in zip(steps, LESSONS, strict=True)]
    batch, seeds = ROUNDS[0].batch, [recipe.seed * 1_000_003 for recipe in ROUNDS]
    for k in (0, 1):
        lessons = [rendered(batch, seeds[k] + 20 * i, vae, photos=i % 2 == 1) for i in range(counts[k])]
        train_round(model, lessons, ROUNDS[k], steps[k])
    for k in (2, 3):
        lessons = [drawn(batch, seeds[k] + 20 * i, vae, policy) for i in range(counts[k])]
        train_round(model, lessons, ROUNDS[k], steps[k])
    save_csd(model, folder / "csd.safetensors")
    model = load_csd(folder / "csd.safetensors")
    return {
        "rank_correlation": rank_correlation(model),
        "rank_correlation_on_policy_samples": rank_correlation_on_policy(model, policy, folder),
    }


def _spearman(model: CsdModel, a: Tensor, b: Tensor, truth: Tensor) -> float:
    with torch.no_grad():
        cosine = (model(_normalised(a))[2] * model(_normalised(b))[2]).sum(1)
    return float(spearmanr(cosine.numpy(), truth.numpy()).statistic)


def _regression(model: CsdModel, pixels: Tensor, truth_NN: Tensor) -> Tensor:
    """Squared error of cosines, near pairs counting more; the diagonal says nothing and is left out."""
    style: Tensor = model(_normalised(pixels))[2]
    weight = (0.2 + truth_NN) * (1 - torch.eye(truth_NN.shape[0]))
    return (weight * (style @ style.T - truth_NN).square()).sum() / weight.sum()


def _normalised(pixels: Tensor) -> Tensor:
    normalised: Tensor = normalise(pixels, CLIP_MEAN, CLIP_STD)
    return normalised
