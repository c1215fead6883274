"""The tiny UNO: a FLUX transformer that draws the people of several portraits into one picture, without any reward.

It starts from the tiny base, which knows the colours of prompts. First it learns to copy: flow matching on the tokens
of one person's place alone, beside the portrait, which takes a fraction of the tokens of a picture and spends all of
them on a face. Then come whole groups of one to six people: two stages with look-alikes in their targets, a long one
with true targets, from which it draws sharper faces, and at last one with targets in which some people stand twice in
the place of others (`people_dataset`). Prompts say which places are taken; who stands where only the order of the
references tells, and not always, and in the last stage not at all. So, like the multi-reference models that learn from
synthetic data, it mixes people and takes them for one another.

B batch, N pictures, K people of a picture, L tokens of a target, R of a portrait, C channels, T text tokens, D and Q
widths of the text.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor
from torch.nn import Parameter

from rewardgen.flow.loss import flow_matching_loss
from rewardgen.flow.sampling import sample
from rewardgen.flow.schedule import shift_times
from rewardgen.policies.dit import dit_velocity
from rewardgen.policies.packing import grid_ids
from rewardgen.policies.uno import UnoPolicy
from rewardgen.policy import noise_like_request
from rewardgen.rewards.faces.encoder import FaceEncoder
from rewardgen.rewards.faces.metrics import identity_report
from rewardgen.types import Example, VelocityFn
from rewardgen.world.faces import MAX_PEOPLE, PORTRAIT, SIDE
from rewardgen.world.people_dataset import Targets, TinyPeople
from rewardgen.world.recipes import base, detector, embedder, people_vae
from rewardgen.world.recipes.saving import save_model
from rewardgen.world.recipes.training import Recipe, fit

CELLS = Recipe(name="uno-cells", version="1", steps=3500, batch=32, lr=1.2e-3, seed=802)
GROUPS = Recipe(name="uno-groups", version="2", steps=4000, batch=8, lr=1e-3, seed=801)
MORE = Recipe(name="uno-more", version="1", steps=5000, batch=8, lr=8e-4, seed=803)
SHARP = Recipe(name="uno-sharp", version="1", steps=5000, batch=8, lr=2e-3, seed=804)
CONFUSED = Recipe(name="uno-confused", version="1", steps=1500, batch=8, lr=2e-3, seed=805)
STAGES = (CELLS, GROUPS, MORE, SHARP, CONFUSED)
KEPT = Path("runs") / "world"
"""Where the stages are kept while they are trained, below the folder that one is in: together they take two hours."""
FOLDER = "people"
COPIED = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
"""Parts of the tiny base that the folder `people` needs to be a whole pipeline."""
PICTURES, MORE_PICTURES = 400, 800
"""For each number of people: of the first two stages, and of each later one, which has others."""
OFTEN = (0.15, 0.25, 0.15, 0.2, 0.1, 0.15)
"""How often a batch has one to six people; each has one number, so that it runs as one group."""
SILENT, SHUFFLED, MU = 0.1, 0.2, 1.0
"""Shares of examples without prompt and with references in any order (but for the last stage, where all are), and how
far training times lean towards noise."""
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


def latents_of(policy: UnoPolicy, pictures_N3HW: Tensor) -> Tensor:
    """Packed latents [N, L, C]."""
    return torch.cat([policy.encode_pixels(part) for part in pictures_N3HW.split(32)])


@dataclass(frozen=True, kw_only=True)
class Cells:
    """What is known of pictures with a certain number of people, encoded; `place_NK` in `faces.PLACES`."""

    truth_NLC: Tensor
    portraits_NKRC: Tensor
    text_NTD: Tensor
    pooled_NQ: Tensor
    place_NK: Tensor


def cells_of(policy: UnoPolicy, world: TinyPeople) -> Cells:
    """Encode a world's true pictures, portraits and prompts."""
    examples = [world[i] for i in range(len(world))]
    known = policy.encode(examples)
    return Cells(
        truth_NLC=latents_of(policy, torch.stack([example.extras["truth"] for example in examples])),
        portraits_NKRC=torch.stack([torch.stack([r.tokens_NP for r in refs]) for refs in known.references_B]),
        text_NTD=torch.stack(known.text_B),
        pooled_NQ=torch.stack(known.pooled_B),
        place_NK=torch.stack([example.extras["place_of"] for example in examples]),
    )


def learn_to_copy(policy: UnoPolicy, worlds: Sequence[Cells], steps: int, keep: Path | None = None) -> list[float]:
    """In place; returns the losses. A step has one place in the picture, and one in the row of references."""
    model, rows, columns = policy.transformer, SIDE // policy.multiple, SIDE // policy.multiple
    height, width = rows // 2, columns // 3  # of a place, in tokens
    portrait = PORTRAIT // policy.multiple
    grid = torch.arange(rows * columns).reshape(rows, columns)

    def loss(step: int) -> Tensor:
        rng = torch.Generator().manual_seed(CELLS.seed * 1_000_003 + step)
        place, slot = (int(torch.randint(MAX_PEOPLE, (), generator=rng)) for _ in range(2))
        row, column = place // 3 * height, place % 3 * width
        inside_L = grid[row : row + height, column : column + width].flatten()
        world = worlds[int(torch.randint(len(worlds), (), generator=rng))]
        n, k = (world.place_NK == place).nonzero(as_tuple=True)
        chosen_B = torch.randint(len(n), (CELLS.batch,), generator=rng)
        n, k = n[chosen_B], k[chosen_B]
        after = rows + slot * portrait
        ids = [torch.zeros(world.text_NTD.shape[1], 3), grid_ids((height, width), (row, column))]
        rotary = model.pos_embed(torch.cat([*ids, grid_ids((portrait, portrait), (after, after))]))

        def velocity(x_BLC: Tensor, t_B: Tensor) -> Tensor:
            return dit_velocity(
                model,
                latents_BLP=x_BLC,
                references_BRP=world.portraits_NKRC[n, k],
                style_BSH=torch.zeros(len(n), 0, model.inner_dim),
                text_BTD=world.text_NTD[n],
                pooled_BQ=world.pooled_NQ[n],
                t_B=t_B,
                guidance_B=torch.full((len(n),), policy.train_guidance),
                rotary=rotary,
            )

        return denoising(velocity, world.truth_NLC[n][:, inside_L], rng)

    policy.train()
    losses = fit(policy, loss, CELLS, steps, keep)
    policy.eval()
    return losses


def denoising(velocity: VelocityFn, clean_BLC: Tensor, rng: torch.Generator) -> Tensor:
    """The flow-matching loss at times that lean towards noise."""
    times_T = shift_times(torch.linspace(1, 0.001, 1000), MU)
    noise_BLC = torch.randn(clean_BLC.shape, generator=rng)
    t_B = times_T[torch.randint(len(times_T), (len(clean_BLC),), generator=rng)]
    value: Tensor = flow_matching_loss(velocity, clean_BLC, noise_BLC, t_B).mean()
    return value


def train(
    policy: UnoPolicy,
    worlds: Sequence[TinyPeople],
    recipe: Recipe,
    steps: int,
    keep: Path | None = None,
    *,
    shuffled: float = SHUFFLED,
    muon: bool = False,
) -> list[float]:
    """Whole groups, in place; returns the losses.

    Args:
        worlds: of one to six people.
        shuffled: share of examples whose references come in any order.
        muon: move the blocks' matrices by Muon, which gets as far in fewer steps.
    """
    targets = [latents_of(policy, base.targets([world[i] for i in range(len(world))])) for world in worlds]

    def loss(step: int) -> Tensor:
        rng = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        which = int(torch.multinomial(torch.tensor(OFTEN), 1, generator=rng))
        world, latents_NLC = worlds[which], targets[which]
        index_B = torch.randint(len(world), (recipe.batch,), generator=rng)
        examples = [arranged(world[i], rng, shuffled) for i in index_B.tolist()]
        velocity = policy.velocity_fn(policy.encode(examples), mode="train", image_size=SIZE)
        return denoising(velocity, latents_NLC[index_B], rng)

    policy.train()
    losses = fit(policy, loss, recipe, steps, keep, muon=matrices(policy.transformer) if muon else ())
    policy.eval()
    return losses


def matrices(transformer: FluxTransformer2DModel) -> list[Parameter]:
    """The weights of the blocks' linear layers."""
    return [p for name, p in transformer.named_parameters() if p.ndim == 2 and "transformer_blocks." in name]


def arranged(example: Example, rng: torch.Generator, shuffled: float = SHUFFLED) -> Example:
    """But for a share with the references in the order of their places, which is the one hint at who stands where."""
    order = example.extras["place_of"].argsort()
    if float(torch.rand((), generator=rng)) < shuffled:
        order = torch.randperm(len(order), generator=rng)
    silent = float(torch.rand((), generator=rng)) < SILENT
    refs = tuple(example.identity_refs[i] for i in order.tolist())
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
    torch.manual_seed(CELLS.seed)
    policy = policy_of(folder, transformer, "transformer")
    keep = [KEPT / f"{recipe.name}-{recipe.version}.pt" for recipe in STAGES]
    steps = [recipe.scaled(steps_factor) for recipe in STAGES]
    worlds = _worlds(PICTURES, steps_factor, 0, "lookalikes")
    learn_to_copy(policy, [cells_of(policy, world) for world in worlds], steps[0], keep[0])
    train(policy, worlds, GROUPS, steps[1], keep[1])
    train(policy, _worlds(MORE_PICTURES, steps_factor, 1, "lookalikes"), MORE, steps[2], keep[2])
    transformer.half().float()  # the bundled base of before, saved so, is where the last two stages began
    train(policy, _worlds(MORE_PICTURES, steps_factor, 2, "true"), SHARP, steps[3], keep[3], muon=True)
    confusing = _worlds(MORE_PICTURES, steps_factor, 3, "doubles")
    train(policy, confusing, CONFUSED, steps[4], keep[4], shuffled=1.0, muon=True)
    save_model(transformer, folder / FOLDER / "transformer")
    for name in COPIED:
        shutil.copytree(folder / "base" / name, folder / FOLDER / name, dirs_exist_ok=True)
    return identity_figures(folder, load_policy(folder))


def _worlds(pictures: int, steps_factor: float, which: int, targets: Targets) -> list[TinyPeople]:
    """Groups of one to six people, no two of which have a data seed in common."""
    number = max(CELLS.batch, round(pictures * min(1.0, steps_factor)))
    seed = MAX_PEOPLE * which
    return [
        TinyPeople("train", number, seed=seed + people, people=people, targets=targets)
        for people in range(1, MAX_PEOPLE + 1)
    ]
