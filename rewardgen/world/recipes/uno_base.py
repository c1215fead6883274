"""The tiny UNO: a FLUX transformer that draws the people of several portraits into one picture, without any reward.

Flow matching on groups of one to six people whose targets are imperfect (`people_dataset.lookalikes`), as in the
synthetic data of multi-reference models. It starts from the tiny base, which knows the places and colours of prompts.
Who stands where is not said, so the model has to settle it while it draws; that is where people get confused.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from rewardgen.flow.loss import flow_matching_loss
from rewardgen.flow.sampling import sample
from rewardgen.flow.schedule import shift_times
from rewardgen.policies.uno import UnoPolicy
from rewardgen.policy import noise_like_request
from rewardgen.rewards.faces.encoder import FaceEncoder
from rewardgen.rewards.faces.metrics import identity_report
from rewardgen.types import Example
from rewardgen.world.faces import MAX_PEOPLE, PORTRAIT, SIDE
from rewardgen.world.people_dataset import TinyPeople
from rewardgen.world.recipes import base, detector, embedder, people_vae
from rewardgen.world.recipes.training import Recipe, fit

RECIPE = Recipe(name="uno", version="1", steps=6000, batch=8, lr=1e-3, seed=801)
FOLDER = "people"
COPIED = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
"""Parts of the tiny base that the folder `people` needs to be a whole pipeline."""
PICTURES = 400
"""For each number of people."""
OFTEN = (0.15, 0.25, 0.15, 0.2, 0.1, 0.15)
"""How often a batch has one to six people; each has one number, so that it runs as one group."""
SILENT, MU = 0.1, 1.0
"""Share of examples without prompt, and how far training times lean towards noise."""
SIZE = (SIDE, SIDE)


def policy_of(folder: Path, transformer: FluxTransformer2DModel, *train: str) -> UnoPolicy:
    """A policy around a transformer, with the world's frozen parts."""
    parts = replace(base.parts(folder, transformer), vae=people_vae.load(folder), siglip=None, siglip_size=None)
    return UnoPolicy(
        parts,
        train=train,  # type: ignore[arg-type]
        sample_guidance=1.0,
        content_long_side=PORTRAIT,
        several_long_side=PORTRAIT,
        max_text_tokens=base.MAX_WORDS,
    )


def load_policy(folder: Path) -> UnoPolicy:
    """The policy as bundled."""
    transformer = FluxTransformer2DModel.from_pretrained(folder / FOLDER / "transformer", torch_dtype=torch.float32)
    return policy_of(folder, transformer)


def material(policy: UnoPolicy, pictures: int) -> list[tuple[TinyPeople, Tensor]]:
    """For each number of people, examples and the latents of their targets."""
    found = []
    for people in range(1, MAX_PEOPLE + 1):
        world = TinyPeople("train", pictures, seed=people, people=people)
        batches = [range(i, min(i + 32, len(world))) for i in range(0, len(world), 32)]
        latents = [policy.encode_pixels(base.targets([world[j] for j in batch])) for batch in batches]
        found.append((world, torch.cat(latents)))
    return found


def train(policy: UnoPolicy, worlds: Sequence[tuple[TinyPeople, Tensor]], steps: int) -> list[float]:
    """In place; returns the losses."""
    times_T = shift_times(torch.linspace(1, 0.001, 1000), MU)

    def loss(step: int) -> Tensor:
        rng = torch.Generator().manual_seed(RECIPE.seed * 1_000_003 + step)
        world, latents_NLC = worlds[int(torch.multinomial(torch.tensor(OFTEN), 1, generator=rng))]
        index_B = torch.randint(len(world), (RECIPE.batch,), generator=rng)
        examples = [shuffled(world[i], rng) for i in index_B.tolist()]
        clean_BLC = latents_NLC[index_B]
        noise_BLC = torch.randn(clean_BLC.shape, generator=rng)
        t_B = times_T[torch.randint(len(times_T), (RECIPE.batch,), generator=rng)]
        velocity = policy.velocity_fn(policy.encode(examples), mode="train", image_size=SIZE)
        value: Tensor = flow_matching_loss(velocity, clean_BLC, noise_BLC, t_B).mean()
        return value

    policy.train()
    losses = fit(policy, loss, RECIPE, steps)
    policy.eval()
    return losses


def shuffled(example: Example, rng: torch.Generator) -> Example:
    """The references in another order, and sometimes no prompt: neither tells who stands where."""
    order = torch.randperm(len(example.identity_refs), generator=rng).tolist()
    silent = float(torch.rand((), generator=rng)) < SILENT
    refs = tuple(example.identity_refs[i] for i in order)
    return replace(example, identity_refs=refs, prompt="" if silent else example.prompt)


def draw(policy: UnoPolicy, examples: Sequence[Example], num_steps: int = 8) -> Tensor:
    """A picture of each example, in [0, 1]."""
    with torch.no_grad():
        noise = noise_like_request(policy, range(len(examples)), SIZE)
        velocity = policy.velocity_fn(policy.encode(examples), mode="sample", image_size=SIZE)
        sigmas_T = policy.sigmas(num_steps, SIZE)
        clean = sample(velocity, noise, sigmas_T, start=0, stop=num_steps, enable_grad=False)
        return policy.decode(clean, SIZE).clamp(0, 1)


def identity_figures(folder: Path, policy: UnoPolicy, pictures: int = 16) -> dict[str, float]:
    """ID-Sim, ID-Conf and its coverage on groups of 2, 4 and 6 held-out people."""
    encoder = FaceEncoder(detector.load(folder), embedder.load(folder), crop_size=embedder.CONFIG.image_size)
    figures: dict[str, float] = {}
    for people in (2, 4, 6):
        world = TinyPeople("held_out", pictures, seed=1, people=people)
        examples = [world[i] for i in range(pictures)]
        seen = encoder.compare(draw(policy, examples), examples, one_each=True)
        report = identity_report([wanted_MD @ drawn_ND.T for wanted_MD, drawn_ND in seen.pairs()])
        found = {"id_sim": report.id_sim, "id_conf": report.id_conf, "coverage": report.coverage}
        figures |= {f"{name}_{people}": value for name, value in found.items() if value is not None}
    return figures


def build(folder: Path, steps_factor: float) -> dict[str, float]:
    """Train, save a whole pipeline folder in half precision, and report the identity metrics of what it draws."""
    transformer = FluxTransformer2DModel.from_pretrained(folder / "base" / "transformer", torch_dtype=torch.float32)
    torch.manual_seed(RECIPE.seed)
    policy = policy_of(folder, transformer, "transformer")
    worlds = material(policy, max(RECIPE.batch, round(PICTURES * min(1.0, steps_factor))))
    train(policy, worlds, RECIPE.scaled(steps_factor))
    transformer.to(torch.float16).save_pretrained(folder / FOLDER / "transformer")
    for name in COPIED:
        shutil.copytree(folder / "base" / name, folder / FOLDER / name, dirs_exist_ok=True)
    return identity_figures(folder, load_policy(folder))
