"""The parts of a FLUX.1 policy that encode, without the transformer: what `rewardgen encode` has to hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from rewardgen.errors import ConfigError
from rewardgen.policies.encoders import late_encoders
from rewardgen.policies.flux import DTYPES
from rewardgen.policies.packing import PATCH
from rewardgen.policies.parts import FluxParts, Sources, load_parts

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

_OF_THE_REST = ("attention", "lora", "lora_rank", "offload", "projector", "style_tokens_per_level", "train")
"""Arguments of `from_pretrained` that have no say in what is encoded."""


def take_encoders(base: str | None, options: dict[str, Any]) -> FluxParts:
    """The encoding parts that a FLUX.1 policy's `from_pretrained` would load, beside a transformer of no blocks.

    Args:
        options: its other arguments, with `encodings`. What is used up leaves, what the policy's constructor needs
            comes in its place: text encoders and SigLIP load when something is to be encoded.

    Raises:
        CheckpointError: a part is missing, unreadable, incomplete or of another shape.
        ConfigError: no folder is named that keeps what is encoded.
    """
    for name in _OF_THE_REST:
        options.pop(name, None)
    folder = options.pop("encodings", None)
    if folder is None:
        raise ConfigError("encodings: nothing is encoded ahead without a folder that keeps it")
    names = ("transformer", "vae", "text_encoder", "text_encoder_2", "siglip")
    sources = Sources(base=base, **{name: options.pop(name, None) for name in names})
    dtype = DTYPES[options.pop("base_dtype", "fp32")]
    parts = load_parts(sources, dtype=dtype, encoders=False, transformer=no_transformer)
    settings = {name: options[name] for name in ("vae_encode", "max_text_tokens") if name in options}
    options |= late_encoders(folder, sources, dtype, **({"vae_encode": "mean", "max_text_tokens": 512} | settings))
    options["train"] = ()
    return parts


def no_transformer(latent_channels: int, dtype: torch.dtype) -> FluxTransformer2DModel:
    """A DiT of a few numbers and no blocks, for an autoencoder of so many channels: it says where tensors go."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=latent_channels * PATCH * PATCH,
        num_layers=0,
        num_single_layers=0,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
    ).to(dtype)
