"""The identity witness's reader: traits of people from places of group pictures, most of them disturbed.

F places, T traits, N pictures, K people of a picture.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from rewardgen.world.faces import MAX_PEOPLE, draw_groups
from rewardgen.world.people import draw_people
from rewardgen.world.recipes import people_vae
from rewardgen.world.recipes.nuisance import blur, disturb
from rewardgen.world.recipes.training import Recipe, fit
from rewardgen.world.scenes import Split
from rewardgen.world.traits import FILE as FILE
from rewardgen.world.traits import TraitReader, cells, load_trait_reader, traits

RECIPE = Recipe(name="traits", version="1", steps=4000, batch=96, lr=2e-3, seed=704)
PICTURES = 3000
SHIFT, BLURRED, NOISE = 2, 0.5, 0.04
"""Largest shift of a place in pixels, share of a batch that is blurred, and standard deviation of its noise: policies
draw softer pictures than the generator."""


def lessons(n: int, seed: int, split: Split, vae: AutoencoderKL | None) -> tuple[Tensor, Tensor]:
    """The places somebody stands at in `n` pictures of one to six, [F, 3, 48, 32], and the traits of who, [F, T]."""
    people = draw_people(MAX_PEOPLE * n, seed, split)
    count_N = torch.randint(1, MAX_PEOPLE + 1, (n,), generator=torch.Generator().manual_seed(seed + 5))
    who_NK = torch.arange(MAX_PEOPLE * n).reshape(n, MAX_PEOPLE)
    who_NK = who_NK.masked_fill(torch.arange(MAX_PEOPLE) >= count_N[:, None], -1)
    pictures, known, _ = draw_groups(people, who_NK, seed + 6)
    if vae is not None:
        parts = pictures.split(100)
        pictures = torch.cat([disturb(part, vae, seed + 7 + index) for index, part in enumerate(parts)])
    rows, k = (who_NK >= 0).nonzero(as_tuple=True)
    return cells(pictures)[rows, known.place_NK[rows, k]], traits(people)[who_NK[rows, k]]


def make(vae: AutoencoderKL | None, steps: int = RECIPE.steps, pictures: int = PICTURES) -> TraitReader:
    """Teach it what to expect of each trait (squared errors): where it cannot tell, it says the average, 0."""
    torch.manual_seed(RECIPE.seed)
    cells_F3HW, traits_FT = lessons(pictures, RECIPE.seed * 1_000_003, "train", vae)
    reader = TraitReader(traits_FT.shape[1])

    def loss(step: int) -> Tensor:
        rng = torch.Generator().manual_seed(RECIPE.seed * 1_000_003 + step)
        chosen = torch.randint(len(cells_F3HW), (RECIPE.batch,), generator=rng)
        return F.mse_loss(reader(varied(cells_F3HW[chosen], rng)), traits_FT[chosen], reduction="sum") / RECIPE.batch

    fit(reader, loss, RECIPE, steps)
    return reader.eval()


def varied(cells_F3HW: Tensor, rng: torch.Generator) -> Tensor:
    """Shifted together, a part blurred, with noise."""
    shift = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=rng).tolist()
    out = torch.roll(cells_F3HW, shift, (2, 3))
    soft = round(BLURRED * len(out))
    out[:soft] = blur(out[:soft], 0.5 + float(torch.rand(1, generator=rng)))
    return (out + NOISE * torch.randn(out.shape, generator=rng)).clamp(0, 1)


def explained(reader: TraitReader, vae: AutoencoderKL | None, n: int = 100) -> float:
    """Mean agreement of held-out people with their own places: 1 if all of every trait is read."""
    cells_F3HW, traits_FT = lessons(n, 51, "held_out", vae)
    with torch.no_grad():
        return float((reader(cells_F3HW) * traits_FT).sum(1).mean())


def save(reader: TraitReader, folder: Path) -> None:
    save_file({k: v.half().contiguous() for k, v in reader.state_dict().items()}, folder / FILE)


def build(folder: Path, steps_factor: float) -> dict[str, float]:
    """Train, save, and report the agreement on true and on disturbed pictures of held-out people."""
    vae = people_vae.load(folder)
    save(make(vae, RECIPE.scaled(steps_factor), max(100, round(PICTURES * min(1.0, steps_factor)))), folder)
    reader = load_trait_reader(folder / FILE)
    return {"held_out_agreement": explained(reader, vae), "held_out_agreement_true_pictures": explained(reader, None)}
