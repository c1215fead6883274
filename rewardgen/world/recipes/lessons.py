"""What the tiny CSD learns from: batches of pictures with the styles that they truly show."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from rewardgen.flow.sampling import clean_estimate, sample
from rewardgen.policy import Policy, noise_like_request
from rewardgen.types import Example
from rewardgen.world.recipes.nuisance import disturb
from rewardgen.world.recipes.readback import read_back
from rewardgen.world.scenes import (
    SIDE,
    Content,
    Style,
    concat,
    describe,
    draw_contents,
    draw_photo_styles,
    draw_styles,
    render,
    spoil,
    take,
)

STEPS, ENTRIES = 10, (5, 7, 9)
"""Denoising steps of the policy's pictures, and the steps at which its clean estimate is taken as well."""


@dataclass(frozen=True)
class Lesson:
    """Pictures [N, 3, 64, 64] in [0, 1], the style each shows, and the content each was meant to show."""

    pixels_N3HW: Tensor
    style: Style
    content: Content


def rendered(n: int, seed: int, vae: AutoencoderKL, *, photos: bool) -> Lesson:
    """`n` rendered pictures of n/4 styles: each in two contents, once spoiled and once changed a little.

    Args:
        photos: spoil towards the unstyled look of content references instead of towards another style.
    """
    k = n // 4
    style, other = draw_styles(k, seed, "train"), draw_styles(k, seed + 1, "train")
    worse = spoil(style, draw_photo_styles(k, seed + 2) if photos else other, seed + 3)
    styles = concat([style, style, worse, nudge(style, other, seed + 4)])
    contents = draw_contents(n, seed + 5, "train")
    return Lesson(disturb(render(contents, styles, seed + 6), vae, seed + 7), styles, contents)


def drawn(n: int, seed: int, vae: AutoencoderKL, policy: Policy) -> Lesson:
    """`n` pictures of n/4 styles: rendered, changed a little, and two that the policy drew, labelled by read-back."""
    k = n // 4
    style, other = draw_styles(k, seed, "train"), draw_styles(k, seed + 1, "train")
    content, reference = draw_contents(k, seed + 2, "train"), draw_contents(k, seed + 3, "train")
    pictures_KE3HW = policy_pictures(policy, content, style, render(reference, style, seed + 4), seed)
    near = nudge(style, other, seed + 5)
    plain = torch.cat([render(reference, style, seed + 4), render(draw_contents(k, seed + 6, "train"), near, seed + 7)])
    rng = torch.Generator().manual_seed(seed)
    pixels, styles, contents = [disturb(plain, vae, seed + 8)], [style, near], [reference, content]
    for _ in range(2):
        which = torch.randint(pictures_KE3HW.shape[1], (k,), generator=rng)
        pixels.append(pictures_KE3HW[torch.arange(k), which])
        styles.append(read_back(pixels[-1], content, style))
        contents.append(content)
    return Lesson(torch.cat(pixels), concat(styles), concat(contents))


def policy_pictures(policy: Policy, content: Content, style: Style, style_refs: Tensor, seed: int) -> Tensor:
    """What the policy makes of content and style: clean estimates at `ENTRIES` and the end, [K, 4, 3, 64, 64]."""
    k = style_refs.shape[0]
    photos = render(content, draw_photo_styles(k, seed + 9))
    examples = [
        Example(id=f"lesson-{seed}-{i}", prompt=prompt, content_refs=(photos[i],), style_refs=(style_refs[i],))
        for i, prompt in enumerate(describe(content))
    ]
    size = (SIDE, SIDE)
    with torch.no_grad():
        velocity = policy.velocity_fn(policy.encode(examples), mode="sample", image_size=size)
        sigmas = policy.sigmas(STEPS, size)
        latents, step, decoded = noise_like_request(policy, range(seed, seed + k), size), 0, []
        for entry in ENTRIES:
            latents = sample(velocity, latents, sigmas, start=step, stop=entry, enable_grad=False)
            t = sigmas[entry]
            decoded.append(clean_estimate(latents, velocity(latents, t.expand(k)), t))
            step = entry
        decoded.append(sample(velocity, latents, sigmas, start=step, stop=STEPS, enable_grad=False))
        return torch.stack([policy.decode(x, size).clamp(0, 1) for x in decoded], 1)


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


def mixed_pairs(n: int, seed: int) -> tuple[Tensor, Style, Tensor, Style]:
    """Held-out pairs to test a judge on: a picture in a style, and one in the same, a near, a spoiled or another."""
    style, other = draw_styles(n, seed, "held_out"), draw_styles(n, seed + 1, "held_out")
    kinds = concat([style, nudge(style, other, seed + 2), spoil(style, other, seed + 3), other])
    shown = take(kinds, torch.arange(n) + n * (torch.arange(n) % 4))
    a = render(draw_contents(n, seed + 4, "held_out"), style)
    return a, style, render(draw_contents(n, seed + 5, "held_out"), shown), shown
