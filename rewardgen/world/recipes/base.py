"""The tiny USO: a FLUX transformer, its style projector and its LoRA, trained without any reward.

Pre-training (transformer and projector) in two rounds on different triplets, then USO's stage 1 (projector only, from
style and target) and stage 2 (LoRA only, from content, style and target). All targets come from imperfect stylisers,
as they do in reality.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextModel, SiglipVisionModel, T5EncoderModel

from rewardgen.flow.loss import flow_matching_loss
from rewardgen.flow.schedule import shift_times
from rewardgen.policies import official
from rewardgen.policies.parts import FluxParts
from rewardgen.policies.projector import StyleProjector
from rewardgen.policies.trained import Part
from rewardgen.policies.uso import UsoPolicy
from rewardgen.types import Example
from rewardgen.world.dataset import TinyWorld
from rewardgen.world.recipes.saving import save_model
from rewardgen.world.recipes.training import Recipe, cosine
from rewardgen.world.recipes.vae import load as load_vae
from rewardgen.world.scenes import SIDE

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_flux import FluxAttention

PRETRAIN = Recipe(name="pretrain", version="1", steps=4000, batch=16, lr=1.5e-3, seed=505)
PRETRAIN_HORIZON = 7000
"""Steps over which the cosine of the pre-training's learning rate would end; `ANNEAL` takes over before."""
ANNEAL = Recipe(name="anneal", version="1", steps=1300, batch=16, lr=8e-4, seed=508)
PROJECTOR = Recipe(name="projector", version="1", steps=200, batch=16, lr=5e-4, seed=506)
"""Ends the first round: the projector alone."""
LONGER = Recipe(name="longer", version="1", steps=2000, batch=16, lr=1.2e-3, seed=509)
FINISH = Recipe(name="finish", version="1", steps=4000, batch=16, lr=1e-3, seed=511)
"""The second round: everything again, on triplets that the first did not see."""
LONGER_HORIZON = 8000
STAGE_1 = Recipe(name="stage1", version="2", steps=200, batch=16, lr=5e-4, seed=510)
STAGE_2 = Recipe(name="stage2", version="2", steps=400, batch=16, lr=1e-3, seed=507)
STAGES = (PRETRAIN, ANNEAL, PROJECTOR, LONGER, FINISH, STAGE_1, STAGE_2)
TRIPLETS = 6000
"""In each of the two rounds."""
PRETRAIN_MU = 1.0
"""Pre-training times lean towards noise, where everything must come from the conditions."""
DROP = (0.3, 0.08, 0.04)
"""Share of pre-training examples without prompt, and of batches without content and without style."""
WIDTH, HEADS, AXES, STYLE_TOKENS, LORA_RANK = 128, 4, (8, 12, 12), 8, 16
MAX_WORDS = 16
GRID = SIDE // 8


def transformer() -> FluxTransformer2DModel:
    """2.4 M parameters; the output starts at zero as in DiT, one head of each block starts looking at the reference."""
    torch.manual_seed(PRETRAIN.seed)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=32, num_layers=2, num_single_layers=4, attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS, joint_attention_dim=48, pooled_projection_dim=32, guidance_embeds=True,
        axes_dims_rope=AXES,
    )  # fmt: skip
    with torch.no_grad():
        for linear in (model.norm_out.linear, model.proj_out):
            linear.weight.zero_()
            linear.bias.zero_()
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        look_at_reference(block.attn)
    return model


def look_at_reference(attention: FluxAttention, shift: int = GRID) -> None:
    """Let head 0 start by attending from a target token to the reference token of the same place.

    Reference ids begin where the target's end, so that is a constant shift of (`shift`, `shift`). A key bias and a
    query bias rotated by the shift make the attention logit peak there. Training may unlearn it; without it,
    finding the reference takes most of a small budget.
    """
    size, start = sum(AXES), AXES[0]
    query, key = torch.zeros(size), torch.zeros(size)
    for width in AXES[1:]:
        for pair in range(2):
            angle = torch.tensor(shift * 10_000 ** (-2 * pair / width))
            at = start + 2 * pair
            key[at] = 1.0
            query[at], query[at + 1] = angle.cos(), angle.sin()
        start += width
    with torch.no_grad():
        for linear, bias in ((attention.to_q, query), (attention.to_k, key)):
            linear.weight[:size].mul_(0.2)
            linear.bias[:size] = bias
        for norm in (attention.norm_q, attention.norm_k):
            norm.weight.mul_(1.5)


def parts(folder: Path, model: FluxTransformer2DModel) -> FluxParts:
    """The transformer with the world's frozen encoders from `folder`."""
    base = folder / "base"
    return FluxParts(
        transformer=model,
        vae=load_vae(folder),
        text_encoder=CLIPTextModel.from_pretrained(base / "text_encoder", dtype=torch.float32).eval(),
        tokenizer=AutoTokenizer.from_pretrained(base / "tokenizer"),
        text_encoder_2=T5EncoderModel.from_pretrained(base / "text_encoder_2", dtype=torch.float32).eval(),
        tokenizer_2=AutoTokenizer.from_pretrained(base / "tokenizer_2"),
        siglip=SiglipVisionModel.from_pretrained(folder / "siglip", dtype=torch.float32).eval(),
    )


def train_stage(
    policy: UsoPolicy,
    world: TinyWorld,
    latents_NLC: Tensor,
    recipe: Recipe,
    times_N: Tensor,
    *,
    drop: tuple[float, float, float],
    steps: int,
    horizon: int | None = None,
) -> None:
    """Flow matching on the world's triplets, ending at a moving average of the weights.

    Args:
        latents_NLC: the targets of all triplets.
        times_N: grid from which times are drawn.
        drop: share of examples without prompt, and of batches without content and without style.
        horizon: steps that the learning rate is planned for; with it the stage is cut short and nothing is averaged.
    """
    policy.train()
    parameters = list(policy.trainable().values())
    averages = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=0.01, betas=(0.9, 0.99))
    began, recent = time.perf_counter(), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * cosine(step, horizon or steps, min(200, steps // 10 + 1))
        rng = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        index_B = torch.randint(len(world), (recipe.batch,), generator=rng)
        examples = dropped([world[i] for i in index_B.tolist()], drop, rng)
        clean_BLC = latents_NLC[index_B]
        noise_BLC = torch.randn(clean_BLC.shape, generator=rng)
        t_B = times_N[torch.randint(times_N.numel(), (recipe.batch,), generator=rng)]
        velocity = policy.velocity_fn(policy.encode(examples), mode="train", image_size=(SIDE, SIDE))
        loss = flow_matching_loss(velocity, clean_BLC, noise_BLC, t_B).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        keep = min(0.999, (step + 1) / (step + 10))
        torch._foreach_lerp_(averages, [parameter.detach() for parameter in parameters], 1 - keep)
        recent += float(loss.detach())
        if step % 100 == 99:
            print(
                f"{recipe.name}: {step + 1}/{steps} loss {recent / 100:.4f} {time.perf_counter() - began:.0f}s",
                flush=True,
            )
            recent = 0.0
    if horizon is None:
        with torch.no_grad():
            for parameter, average in zip(parameters, averages, strict=True):
                parameter.copy_(average)
    policy.eval()


def dropped(examples: list[Example], drop: tuple[float, float, float], rng: torch.Generator) -> list[Example]:
    """Leave out prompts per example, content and style references per batch (so that a batch keeps one layout)."""
    without_prompt = (torch.rand(len(examples), generator=rng) < drop[0]).tolist()
    chance = float(torch.rand((), generator=rng))
    content, style = chance < drop[1], drop[1] <= chance < drop[1] + drop[2]
    return [
        replace(
            example,
            prompt="" if silent else example.prompt,
            content_refs=() if content else example.content_refs,
            style_refs=() if style else example.style_refs,
        )
        for example, silent in zip(examples, without_prompt, strict=True)
    ]


def build(folder: Path, steps_factor: float) -> dict[str, float]:
    """Both rounds, then the stages; writes the transformer as a diffusers folder and USO's two files."""
    loaded, projector = parts(folder, transformer()), untrained_projector()
    first_round(loaded, projector, steps_factor)
    return second_round(folder, loaded, projector, steps_factor)


def untrained_projector() -> StyleProjector:
    return StyleProjector(num_tokens=64, token_dim=48, tokens_per_level=STYLE_TOKENS, hidden_size=WIDTH)


def first_round(loaded: FluxParts, projector: StyleProjector, steps_factor: float) -> None:
    """Pre-training whose learning rate is planned for longer than it lasts, an annealing, the projector alone."""
    policy = training_policy(loaded, projector, "transformer", "projector")
    world, latents, noisy = material(policy, 1, steps_factor)
    steps = [recipe.scaled(steps_factor) for recipe in (PRETRAIN, ANNEAL, PROJECTOR)]
    horizon = round(PRETRAIN_HORIZON * steps_factor)
    train_stage(policy, world, latents, PRETRAIN, noisy, drop=DROP, steps=steps[0], horizon=horizon)
    train_stage(policy, world, latents, ANNEAL, noisy, drop=DROP, steps=steps[1])
    through_half(loaded)
    times = policy.training_sigmas((SIDE, SIDE))
    alone = training_policy(loaded, projector, "projector")
    train_stage(alone, world, latents, PROJECTOR, times, drop=(0.1, 1.0, 0.0), steps=steps[2])


def second_round(folder: Path, loaded: FluxParts, projector: StyleProjector, steps_factor: float) -> dict[str, float]:
    """The same on fresh triplets, then USO's stages on them; writes all files and reports the held-out loss."""
    policy = training_policy(loaded, projector, "transformer", "projector")
    world, latents, noisy = material(policy, 2, steps_factor)
    steps = [recipe.scaled(steps_factor) for recipe in (LONGER, FINISH)]
    horizon = round(LONGER_HORIZON * steps_factor)
    train_stage(policy, world, latents, LONGER, noisy, drop=DROP, steps=steps[0], horizon=horizon)
    train_stage(policy, world, latents, FINISH, noisy, drop=DROP, steps=steps[1])
    return stages(folder, loaded, projector, world, latents, steps_factor)


def stages(
    folder: Path, loaded: FluxParts, projector: StyleProjector, world: TinyWorld, latents: Tensor, steps_factor: float
) -> dict[str, float]:
    """USO's stage 1 and 2 on a pre-trained transformer."""
    through_half(loaded)  # what follows trains on exactly what is saved
    save_model(loaded.transformer, folder / "base" / "transformer")
    loaded.transformer.to(torch.float32)
    stage_1 = training_policy(loaded, projector, "projector")
    times, steps = stage_1.training_sigmas((SIDE, SIDE)), [r.scaled(steps_factor) for r in (STAGE_1, STAGE_2)]
    train_stage(stage_1, world, latents, STAGE_1, times, drop=(0.1, 1.0, 0.0), steps=steps[0])
    stage_2 = training_policy(loaded, projector, "lora")
    train_stage(stage_2, world, latents, STAGE_2, times, drop=(0.1, 0.0, 0.0), steps=steps[1])
    (folder / "uso").mkdir(exist_ok=True)
    official.write_tensors(official.export_projector(projector), folder / "uso" / "projector.safetensors")
    official.write_tensors(official.export_lora(loaded.transformer), folder / "uso" / "dit_lora.safetensors")
    FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True).save_pretrained(folder / "base" / "scheduler")
    return {"held_out_loss": held_out_loss(stage_2)}


def training_policy(loaded: FluxParts, projector: StyleProjector, *train: Part) -> UsoPolicy:
    """A policy over the given modules that trains the named parts."""
    rank = LORA_RANK if "lora" in train else None
    return UsoPolicy(loaded, projector, train=train, lora_rank=rank, content_long_side=SIDE, max_text_tokens=MAX_WORDS)


def material(policy: UsoPolicy, seed: int, steps_factor: float) -> tuple[TinyWorld, Tensor, Tensor]:
    """Training triplets, the latents of their targets, and pre-training's times."""
    world = TinyWorld("train", max(64, round(TRIPLETS * min(1.0, steps_factor))), seed=seed)
    batches = [range(i, min(i + 32, len(world))) for i in range(0, len(world), 32)]
    latents = torch.cat([policy.encode_pixels(targets([world[j] for j in batch])) for batch in batches])
    return world, latents, shift_times(torch.linspace(1, 0.001, 1000), PRETRAIN_MU)


def through_half(loaded: FluxParts) -> None:
    """Round the transformer's weights to what half precision keeps."""
    loaded.transformer.to(torch.float16)
    loaded.transformer.to(torch.float32)


def load_policy(folder: Path) -> UsoPolicy:
    """The base as bundled: transformer, projector and stage-2 LoRA from their files."""
    return UsoPolicy.from_pretrained(
        str(folder / "base"),
        siglip=str(folder / "siglip"),
        lora=str(folder / "uso" / "dit_lora.safetensors"),
        projector=str(folder / "uso" / "projector.safetensors"),
        sample_guidance=1.0,
        content_long_side=SIDE,
        max_text_tokens=MAX_WORDS,
    )


def targets(examples: list[Example]) -> Tensor:
    """Their target pictures [n, 3, 64, 64]; every triplet of the world has one."""
    return torch.stack([example.target for example in examples if example.target is not None])


def held_out_loss(policy: UsoPolicy, n: int = 128) -> float:
    """Flow-matching loss on held-out triplets at fixed times and noise."""
    world = TinyWorld("held_out", n, seed=1)
    examples = [world[i] for i in range(n)]
    rng = torch.Generator().manual_seed(0)
    clean = policy.encode_pixels(targets(examples))
    noise, t = torch.randn(clean.shape, generator=rng), torch.rand(n, generator=rng)
    with torch.no_grad():
        velocity = policy.velocity_fn(policy.encode(examples), mode="train", image_size=(SIDE, SIDE))
        return float(flow_matching_loss(velocity, clean, noise, t).mean())
