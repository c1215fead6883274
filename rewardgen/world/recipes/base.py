"""The tiny USO: a FLUX transformer, its style projector and its LoRA, trained without any reward.

Pre-training (transformer and projector), then USO's stage 1 (projector only, from style and target) and stage 2
(LoRA only, from content, style and target). All targets come from imperfect stylisers, as they do in reality.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from rewardgen.flow.loss import flow_matching_loss
from rewardgen.policies.parts import FluxParts
from rewardgen.policies.projector import StyleProjector
from rewardgen.policies.uso import UsoPolicy
from rewardgen.types import Example
from rewardgen.world.dataset import TinyWorld
from rewardgen.world.recipes.training import Recipe, cosine
from rewardgen.world.scenes import SIDE

PRETRAIN = Recipe(name="base", version="1", steps=7000, batch=16, lr=1.5e-3, seed=505)
STAGE_1 = Recipe(name="stage1", version="1", steps=200, batch=16, lr=5e-4, seed=506)
STAGE_2 = Recipe(name="stage2", version="1", steps=400, batch=16, lr=1e-3, seed=507)
WIDTH, HEADS, AXES, STYLE_TOKENS, LORA_RANK = 128, 4, (8, 12, 12), 8, 16
GRID = SIDE // 8


def transformer() -> FluxTransformer2DModel:
    """2.4 M parameters; gates and output start at zero as in DiT, one head a block starts looking at the reference."""
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=32, num_layers=2, num_single_layers=4, attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS, joint_attention_dim=48, pooled_projection_dim=32, guidance_embeds=True,
        axes_dims_rope=AXES,
    )  # fmt: skip
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and ".norm" in name and name.endswith("linear"):
                module.weight.mul_(0.1)
                module.bias.zero_()
        for linear in (model.norm_out.linear, model.proj_out):
            linear.weight.zero_()
            linear.bias.zero_()
        for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
            look_at_reference(block.attn)
    return model


@torch.no_grad()
def look_at_reference(attention: nn.Module, shift: int = GRID) -> None:
    """Let head 0 start by attending from a target token to the reference token of the same place.

    Reference ids begin where the target's end, so that is a constant shift of (`shift`, `shift`). A key bias k and
    a query bias rotated by the shift make the attention logit peak there. Training may unlearn it; without it,
    finding the reference takes most of a small budget.
    """
    size = sum(AXES)
    start = AXES[0]
    query, key = torch.zeros(size), torch.zeros(size)
    for width in AXES[1:]:
        for pair in range(2):
            angle = torch.tensor(shift * 10_000 ** (-2 * pair / width))
            at = start + 2 * pair
            key[at] = 1.0
            query[at], query[at + 1] = angle.cos(), angle.sin()
        start += width
    for linear, bias in ((attention.to_q, query), (attention.to_k, key)):
        linear.weight[:size].mul_(0.2)
        linear.bias[:size] = bias
    for norm in (attention.norm_q, attention.norm_k):
        norm.weight.mul_(1.5)


def train_stage(
    policy: UsoPolicy, world: TinyWorld, recipe: Recipe, *, drop: tuple[float, float, float], steps: int
) -> None:
    """Flow matching on the world's triplets; `drop` are the shares without prompt, content and style."""
    parameters = list(policy.trainable().values())
    averages = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=0.01, betas=(0.9, 0.99))
    began, recent = time.perf_counter(), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * cosine(step, steps, min(200, steps // 10 + 1))
        rng = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        index = torch.randint(len(world), (recipe.batch,), generator=rng).tolist()
        value = stage_loss(policy, [world[i] for i in index], drop, rng)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        keep = min(0.999, (step + 1) / (step + 10))
        torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1 - keep)
        recent += float(value.detach())
        if step % 100 == 99:
            print(
                f"{recipe.name}: {step + 1}/{steps} loss {recent / 100:.4f} {time.perf_counter() - began:.0f}s",
                flush=True,
            )
            recent = 0.0
    with torch.no_grad():
        for parameter, average in zip(parameters, averages, strict=True):
            parameter.copy_(average)
