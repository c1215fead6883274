"""The velocity of a FLUX.1 transformer over style, text, target and reference tokens.

Shape suffixes: B batch, L target tokens, R reference tokens, P packed channels, T text tokens, D text width,
S style tokens, H width of the DiT, Q pooled text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rewardgen.policies.conditions import Group
from rewardgen.transfer import to_device
from rewardgen.types import VelocityFn

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel


def dit_velocity(
    transformer: FluxTransformer2DModel,
    *,
    latents_BLP: Tensor,
    references_BRP: Tensor,
    style_BSH: Tensor,
    text_BTD: Tensor,
    pooled_BQ: Tensor,
    t_B: Tensor,
    guidance_B: Tensor,
    rotary: tuple[Tensor, Tensor],
) -> Tensor:
    """Velocity of the target tokens [B, L, P], in float32 or above.

    It walks diffusers' own modules instead of calling their `forward`, for two reasons: style tokens join the text
    after `context_embedder`, and the sinusoid of the time stays in float32 where that `forward` would round
    1000 t to the model's precision. Adapters and gradient checkpointing work as they do there.

    Args:
        references_BRP, style_BSH: may have no tokens (R = 0, S = 0).
        t_B, guidance_B: un-multiplied, t in [0, 1]. The guidance is ignored by models without its embedding.
        rotary: `pos_embed` of the ids of all tokens, in the order style, text, target, references.
    """
    dtype = transformer.x_embedder.weight.dtype
    image = transformer.x_embedder(torch.cat([latents_BLP, references_BRP.to(latents_BLP)], dim=1).to(dtype))
    text = transformer.context_embedder(text_BTD.to(dtype))
    text = torch.cat([style_BSH.to(text.dtype), text], dim=1)
    scalars = (t_B, guidance_B) if transformer.config.guidance_embeds else (t_B,)
    embedding = transformer.time_text_embed(*(1000 * scalar.float() for scalar in scalars), pooled_BQ.to(dtype))
    checkpointing = transformer.gradient_checkpointing and torch.is_grad_enabled()
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        if checkpointing:
            text, image = transformer._gradient_checkpointing_func(block, image, text, embedding, rotary)
        else:
            text, image = block(image, text, embedding, rotary)
    velocity: Tensor = transformer.proj_out(transformer.norm_out(image[:, : latents_BLP.shape[1]], embedding))
    return velocity.to(torch.promote_types(velocity.dtype, torch.float32))


def grouped_velocity(
    transformer: FluxTransformer2DModel,
    groups: Sequence[Group],
    guidance_B: Tensor,
    rotary: Sequence[tuple[Tensor, Tensor]],
) -> VelocityFn:
    """`(latents_BLP, t_B) -> velocity_BLP` for a batch split into groups of equal layout.

    Args:
        groups: together they hold every example once.
        rotary: of each group, as for `dit_velocity`.
    """
    members = [to_device(torch.tensor(group.members), guidance_B.device) for group in groups]
    order = torch.cat(members).argsort()

    def velocity(latents_BLP: Tensor, t_B: Tensor) -> Tensor:
        t_B = t_B.to(latents_BLP.device)
        parts = [
            dit_velocity(
                transformer,
                latents_BLP=latents_BLP[members[index]],
                references_BRP=group.references_BRP,
                style_BSH=group.style_BSH,
                text_BTD=group.text_BTD,
                pooled_BQ=group.pooled_BQ,
                t_B=t_B[members[index]],
                guidance_B=guidance_B[members[index]],
                rotary=rotary[index],
            )
            for index, group in enumerate(groups)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)[order]

    return velocity
