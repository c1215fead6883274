"""The tiny face network: an IResNet trained with ArcFace (arXiv 1801.07698) to tell training identities apart.

M people, L looks of each, F faces, S side of a crop, D length of an embedding, 52 = landmarks.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from rewardgen.rewards.faces.align import similarity_transform, template, warp
from rewardgen.rewards.faces.iresnet import IResNet, IResNetConfig, load_iresnet, save_iresnet
from rewardgen.world.faces import portraits
from rewardgen.world.people import draw_people, take
from rewardgen.world.recipes import people_vae
from rewardgen.world.recipes.training import Recipe, fit

RECIPE = Recipe(name="embedder", version="1", steps=1200, batch=64, lr=2e-3, seed=703)
FILE = "people/embedder.safetensors"
CONFIG = IResNetConfig(layers=(1, 1, 1, 1), widths=(16, 32, 64, 96), embedding_dim=64, image_size=32)
PEOPLE, LOOKS, REBUILT = 600, 10, 0.3
"""Identities, pictures of each, and the share of pictures that goes through the autoencoder."""
OFF = 1.0
"""Standard deviation of the landmarks in pixels, about the error of the detector. Taught with half of it, a person's
cosine with their own portrait fell by a third once a detector placed the landmarks."""
SCALE, MARGIN = 16.0, 0.3
"""Of ArcFace: of the logits, and of the angle to one's own centre in radians."""


class Centres(nn.Module):
    """The face network with a centre for each identity, which only training needs."""

    def __init__(self, network: IResNet, people: int) -> None:
        super().__init__()
        self.network = network
        self.centre_MD = nn.Parameter(torch.randn(people, network.config.embedding_dim))

    def forward(self, crops_F3SS: Tensor, who_F: Tensor, margin: float) -> Tensor:
        """ArcFace's loss."""
        cosine_FM = F.normalize(self.network(crops_F3SS)) @ F.normalize(self.centre_MD).T
        own_F = cosine_FM.gather(1, who_F[:, None])[:, 0].clamp(-1 + 1e-6, 1 - 1e-6)
        harder_F = torch.where(own_F > -math.cos(margin), (own_F.acos() + margin).cos(), own_F - margin)
        return F.cross_entropy(SCALE * cosine_FM.scatter(1, who_F[:, None], harder_F[:, None]), who_F)


def album(people: int, looks: int, seed: int, vae: AutoencoderKL | None, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Portraits as bytes [F, 3, S, S], their landmarks [F, 5, 2] and whose they are [F]; a `share` autoencoded."""
    who_F = torch.arange(people).repeat(looks)
    pixels, _, landmarks_F52 = portraits(take(draw_people(people, seed, "train"), who_F), seed + 1)
    if vae is not None:
        through = torch.rand(len(who_F), generator=torch.Generator().manual_seed(seed + 2)) < share
        pixels[through] = people_vae.rebuild(vae, pixels[through], batch=128)
    return (255 * pixels).round().byte(), landmarks_F52, who_F


def crops(pixels_F3SS: Tensor, landmarks_F52: Tensor, rng: torch.Generator) -> Tensor:
    """Aligned crops in [-1, 1] as a detector would give them: landmarks off by `OFF` pixels, colours and noise."""
    n = len(pixels_F3SS)
    off = OFF * torch.randn(landmarks_F52.shape, generator=rng)
    transform_F23 = similarity_transform(landmarks_F52 + off, template(CONFIG.image_size))
    gain = 1 + 0.06 * torch.randn(n, 3, 1, 1, generator=rng)
    noise = 0.04 * torch.rand(n, 1, 1, 1, generator=rng) * torch.randn(pixels_F3SS.shape, generator=rng)
    images = 2 * (pixels_F3SS * gain + noise).clamp(0, 1) - 1
    return warp(images, list(transform_F23[:, None]), CONFIG.image_size)


def train(model: Centres, pixels: Tensor, landmarks: Tensor, who: Tensor, steps: int, batch: int) -> list[float]:
    """In place; returns the losses. The margin grows over the first third of the steps."""

    def loss(step: int) -> Tensor:
        rng = torch.Generator().manual_seed(RECIPE.seed * 1_000_003 + step)
        index_F = torch.randint(len(who), (batch,), generator=rng)
        crops_F3SS = crops(pixels[index_F].float() / 255, landmarks[index_F], rng)
        value: Tensor = model(crops_F3SS, who[index_F], MARGIN * min(1.0, 3 * step / steps))
        return value

    model.train()
    losses = fit(model, loss, RECIPE, steps)
    model.eval()
    return losses


def separation(network: IResNet, vae: AutoencoderKL | None, people: int = 96, looks: int = 3) -> dict[str, float]:
    """Mean cosine of two pictures of one held-out person, and of two people."""
    who_F = torch.arange(people).repeat(looks)
    pixels, _, landmarks_F52 = portraits(take(draw_people(people, 41, "held_out"), who_F), 42)
    if vae is not None:
        pixels = people_vae.rebuild(vae, pixels, batch=128)
    transform_F23 = similarity_transform(landmarks_F52, template(CONFIG.image_size))
    with torch.no_grad():
        unit_FD = F.normalize(network(warp(2 * pixels - 1, list(transform_F23[:, None]), CONFIG.image_size)))
    cosine_FF = unit_FD @ unit_FD.T
    same_FF = who_F[:, None] == who_F[None]
    itself_FF = torch.eye(len(who_F), dtype=torch.bool)
    return {
        "same": float(cosine_FF[same_FF & ~itself_FF].mean()),
        "different": float(cosine_FF[~same_FF].mean()),
    }


def load(folder: Path) -> IResNet:
    return load_iresnet(folder / FILE)


def build(folder: Path, steps_factor: float) -> dict[str, float]:
    """Train, save in half precision, and report the cosines of held-out people on autoencoded portraits."""
    vae, few = people_vae.load(folder), min(1.0, steps_factor)
    people = max(16, round(PEOPLE * few))
    pixels, landmarks, who = album(people, LOOKS, RECIPE.seed, vae, REBUILT)
    torch.manual_seed(RECIPE.seed)
    model = Centres(IResNet(CONFIG), people)
    train(model, pixels, landmarks, who, RECIPE.scaled(steps_factor), RECIPE.batch)
    save_iresnet(model.network.half(), folder / FILE)
    network = load(folder)
    return separation(network, vae) | {f"true_pictures_{k}": v for k, v in separation(network, None).items()}
