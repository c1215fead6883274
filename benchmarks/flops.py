"""Floating-point operations of the models by closed formulas: a multiplication and an addition are two.

Only matrix products, convolutions and attention are counted. `model` operations are those that the mathematics asks
for; recomputed activations come on top (`full_scale.py` reports both). The forward passes agree with torch's counter
to the last operation (`tests/test_full_scale.py`).

h width, N tokens, r LoRA rank, D width of CSD, S side of the picture that CSD sees.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TIME_CHANNELS = 256
"""Width of the sinusoid of time and guidance."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """Tokens of one example: style and text (one stream), target, references."""

    context: int
    target: int
    references: int = 0

    @property
    def image(self) -> int:
        return self.target + self.references

    @property
    def total(self) -> int:
        return self.context + self.image


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """A forward pass and its backward pass towards inputs and LoRA (frozen weights get no gradient)."""

    forward: float
    backward: float = 0.0


def dit(config: Mapping[str, Any], tokens: Tokens, *, rank: int, attention_backward: float = 2.0) -> Cost:
    """One evaluation of the transformer for one example.

    The backward pass goes through every frozen product once (towards its input) and through every LoRA product twice.
    It ends at the first block, whose inputs depend on nothing trained; modulations depend on time and pooled text
    alone and have none.

    Args:
        attention_backward: of the forward pass's products; 2 by the mathematics, 2.5 for kernels that recompute
            the scores, as torch's counter takes it.
    """
    h = config["attention_head_dim"] * config["num_attention_heads"]
    doubles, singles = config["num_layers"], config["num_single_layers"]
    n, out = tokens.total, config.get("out_channels") or config["in_channels"]
    scalars = 2 if config["guidance_embeds"] else 1
    embed = 2 * (config["in_channels"] * h * tokens.image + config["joint_attention_dim"] * h * tokens.context)
    embed += 2 * (scalars * (TIME_CHANNELS * h + h * h) + config["pooled_projection_dim"] * h + h * h)
    modulation = 2 * h * h * (doubles * 12 + singles * 3 + 2)
    frozen = 2 * 12 * h * h * n * (doubles + singles)
    adapters = 2 * rank * h * n * (doubles * 8 + singles * 12)
    attention = 4 * n * n * h * (doubles + singles)
    head = 2 * h * out * tokens.target
    # The first block's q, k and v, or their LoRA's `down`, would only lead to inputs that need no gradient.
    first = 2 * 3 * (h * h + rank * h) * n
    return Cost(
        forward=embed + modulation + frozen + adapters + attention + head,
        backward=frozen + 2 * adapters + attention_backward * attention + head - first,
    )


def vae(config: Mapping[str, Any], image_size: tuple[int, int], *, attention_backward: float = 2.0) -> dict[str, Cost]:
    """`encode` (the mean) and `decode` of one picture."""
    widths, layers, latent = config["block_out_channels"], config["layers_per_block"], config["latent_channels"]
    factor = 2 ** (len(widths) - 1)
    pixels = image_size[0] * image_size[1]
    small = pixels // factor**2
    deep = widths[-1]

    def conv(inputs: int, outputs: int, places: int, kernel: int = 3) -> int:
        return 2 * inputs * outputs * kernel**2 * places

    def resnet(inputs: int, outputs: int, places: int) -> int:
        shortcut = 0 if inputs == outputs else conv(inputs, outputs, places, 1)
        return conv(inputs, outputs, places) + conv(outputs, outputs, places) + shortcut

    scores = 4 * small * small * deep
    middle = 2 * resnet(deep, deep, small) + 2 * 4 * deep * deep * small
    encode, decode, before = conv(3, widths[0], pixels), conv(latent, deep, small), widths[0]
    for level, width in enumerate(widths):
        places = pixels // 4**level
        encode += resnet(before, width, places) + (layers - 1) * resnet(width, width, places)
        encode += conv(width, width, places // 4) if level < len(widths) - 1 else 0
        before = width
    encode += conv(deep, 2 * latent, small)
    before = deep
    for level, width in reversed(list(enumerate(widths))):
        places = pixels // 4**level
        decode += resnet(before, width, places) + layers * resnet(width, width, places)
        decode += conv(width, width, 4 * places) if level else 0
        before = width
    decode += conv(widths[0], 3, pixels)
    decode += middle
    return {
        "encode": Cost(forward=encode + middle + scores),
        "decode": Cost(forward=decode + scores, backward=decode + attention_backward * scores),
    }


def csd(
    *,
    image_size: int,
    patch_size: int,
    width: int,
    layers: int,
    output_dim: int,
    pixels: tuple[int, int],
    attention_backward: float = 2.0,
) -> Cost:
    """One picture of `pixels` (height, width) through the resize and CSD; its backward pass leads to the pixels.

    The content descriptor is computed too and has no backward pass.
    """
    patches = (image_size // patch_size) ** 2
    n = patches + 1
    height, wide = pixels
    resize = 2 * 3 * (height * wide * image_size + image_size * height * image_size)
    patch = 2 * 3 * patch_size**2 * width * patches
    linear, attention = layers * 24 * width * width * n, layers * 4 * n * n * width
    head = 2 * width * output_dim
    return Cost(
        forward=resize + patch + linear + attention + 2 * head,
        backward=resize + patch + linear + attention_backward * attention + head,
    )
