"""Models from their sizes alone: what the released parts measure, and parts that have sizes but no weights of worth.

Used where nothing can or need be read: for the memory plan (on tensors without memory) and for measurements at full
size with random weights. Sizes come from a `config.json` that is here, else from the table below.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from rewardgen.errors import CheckpointError, ConfigError
from rewardgen.policies import official
from rewardgen.policies.parts import SINGLE_FILE, BlankTokenizer, FluxParts, Sources
from rewardgen.policies.projector import StyleProjector

if TYPE_CHECKING:
    from transformers import SiglipVisionModel

Config = Mapping[str, Any]

DEFAULT_RANK = 128
DEFAULT_STYLE_TOKENS = 64
"""For each of the three levels, as released."""

FLUX: Config = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
FLUX_VAE: Config = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
CLIP_L_TEXT: Config = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
T5_XXL: Config = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
SIGLIP_SO400M: Config = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
_DEV = {"transformer": FLUX, "vae": FLUX_VAE, "text_encoder": CLIP_L_TEXT, "text_encoder_2": T5_XXL}
RELEASED: Mapping[str, Mapping[str, Config]] = {
    "black-forest-labs/FLUX.1-dev": _DEV,
    "black-forest-labs/FLUX.1-Krea-dev": _DEV,
    "black-forest-labs/FLUX.1-schnell": {**_DEV, "transformer": {**FLUX, "guidance_embeds": False}},
    "google/siglip-so400m-patch14-384": {"": SIGLIP_SO400M},
    "openai/clip-vit-large-patch14": {"": CLIP_L_TEXT},
    "google/t5-v1_1-xxl": {"": T5_XXL},
}
"""Sizes of released models by hub id and subfolder, as their `config.json` states them."""

SINGLE_FILES: Mapping[str, Config] = {"transformer": FLUX, "vae": FLUX_VAE}
"""Sizes of the parts that are released as single files too (`flux1-dev.safetensors`, `ae.safetensors`)."""


def config_of(source: str, subfolder: str = "") -> dict[str, Any]:
    """The sizes of a model in a folder or a hub repository, without contacting the hub.

    Raises:
        CheckpointError: there is no `config.json` here, and the table does not know the repository.
    """
    inside = f"{subfolder}/config.json" if subfolder else "config.json"
    path = Path(source).expanduser() / inside
    if not path.is_file() and (cached := _in_hub_cache(source, inside)) is not None:
        path = cached
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: not a readable config ({error})") from error
        if not isinstance(found, dict):
            raise CheckpointError(f"{path}: not a config: it holds no mapping")
        return found
    if subfolder in RELEASED.get(source, {}):
        return dict(RELEASED[source][subfolder])
    known = ", ".join(RELEASED)
    raise CheckpointError(
        f"{source}: its {inside} is not here, and it is none of the models whose sizes are known: {known}"
    )


def shape_in_file(source: str | None, key: str) -> tuple[int, ...]:
    """The shape of a tensor in a safetensors file; () where there is no such file here, or no such tensor in it."""
    if source is None:
        return ()
    repository, _, inside = source.partition(":")
    path = Path(source) if Path(source).is_file() else _in_hub_cache(repository, inside) if inside else None
    if path is None:
        return ()
    try:
        with safe_open(path, framework="pt") as file:
            return tuple(file.get_slice(key).get_shape())
    except (SafetensorError, OSError):
        return ()


def _in_hub_cache(source: str, inside: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(source, inside)
    except HFValidationError:  # a path, not a repository
        return None
    return Path(found) if isinstance(found, str) else None


def configs_of(sources: Sources) -> dict[str, Config]:
    """Sizes of all parts that `sources` name. A single file is taken to have the released sizes (`SINGLE_FILES`).

    Raises:
        CheckpointError: the sizes of a part are not known.
    """
    configs: dict[str, Config] = {}
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        source, subfolder = sources.place(part)
        if part in SINGLE_FILES and not subfolder and source.endswith(SINGLE_FILE):
            # Nothing of the file is looked at; one of other sizes is told apart when it is loaded.
            configs[part] = SINGLE_FILES[part]
        else:
            configs[part] = config_of(source, subfolder)
    if sources.siglip is not None:
        configs["siglip"] = config_of(sources.siglip)
    return configs


def take_shapes(
    base: str | None, options: dict[str, Any], *, dtype: torch.dtype, rank: int = DEFAULT_RANK
) -> tuple[FluxParts, StyleProjector | None]:
    """Parts and projector of the sizes that a FLUX.1 policy's `from_pretrained` would load, freshly initialised.

    Args:
        options: its other arguments. What is used up leaves, what loads encoders late comes in their place.
        rank: of a LoRA whose file is not here, where no `lora_rank` is named.

    Raises:
        CheckpointError: the sizes of a part are not known.
        ConfigError: sizes that make no model.
    """
    named = {part: options.pop(part, None) for part in ("transformer", "vae", "text_encoder", "text_encoder_2")}
    sources = Sources(base=base, siglip=options.pop("siglip", None), **named)
    lora, projector, encodings = (options.pop(name, None) for name in ("lora", "projector", "encodings"))
    tokens_per_level = options.pop("style_tokens_per_level", DEFAULT_STYLE_TOKENS)
    configs = configs_of(sources)
    vision = configs.get("siglip")
    if encodings is not None:
        text = {part: configs.pop(part) for part in ("text_encoder", "text_encoder_2")}
        options["load_text"] = partial(make_text, text, dtype)
        if vision is not None:
            options["load_siglip"] = partial(make_siglip, configs.pop("siglip"), dtype)
    parts = make_parts(configs, dtype=dtype)
    style: StyleProjector | None = None
    if vision is not None and (projector is not None or "projector" in options.get("train", ())):
        found = shape_in_file(projector, f"{official.PROJECTOR_PREFIX}high_embedding_linear.0.weight")
        style = make_projector(vision, found[0] if found else tokens_per_level, parts.transformer.inner_dim)
    if lora is not None:
        found = shape_in_file(lora, "double_blocks.0.processor.qkv_lora1.down.weight")
        official.add_lora(parts.transformer, found[0] if found else options.get("lora_rank") or rank)
    return parts, style


def make_parts(configs: Mapping[str, Config], *, dtype: torch.dtype = torch.float32) -> FluxParts:
    """Parts of the given sizes, freshly initialised where the caller is (`with torch.device(...)`), in `dtype`.

    Args:
        configs: by part: `transformer`, `vae`, and where they are wanted `text_encoder`, `text_encoder_2`, `siglip`.

    Raises:
        ConfigError: sizes that make no model.
    """
    from diffusers import AutoencoderKL, FluxTransformer2DModel

    with _making(dtype):
        return FluxParts(
            transformer=FluxTransformer2DModel.from_config(dict(configs["transformer"])).eval(),
            vae=AutoencoderKL.from_config(dict(configs["vae"])).eval(),
            **(make_text(configs, dtype) if "text_encoder" in configs else {}),
            siglip=make_siglip(configs["siglip"], dtype) if "siglip" in configs else None,
        )


def make_text(configs: Mapping[str, Config], dtype: torch.dtype) -> dict[str, Any]:
    """Text encoders of the given sizes, as fields of `FluxParts`. Raises ConfigError like `make_parts`."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    with _making(dtype):
        clip = CLIPTextModel(CLIPTextConfig(**_half(configs["text_encoder"], "text_config"))).eval()
        t5 = T5EncoderModel(T5Config(**_half(configs["text_encoder_2"], "text_config"))).eval()
    return {
        "text_encoder": clip,
        "tokenizer": BlankTokenizer(clip.config.max_position_embeddings),
        "text_encoder_2": t5,
        "tokenizer_2": BlankTokenizer(1 << 30),
    }


def make_siglip(config: Config, dtype: torch.dtype) -> SiglipVisionModel:
    """A SigLIP vision model of the given sizes. Raises ConfigError like `make_parts`."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    with _making(dtype):
        return SiglipVisionModel(SiglipVisionConfig(**_half(config, "vision_config"))).eval()


def make_projector(vision: Config, tokens_per_level: int, hidden_size: int) -> StyleProjector:
    """A fresh style projector for a SigLIP of the given sizes, float32."""
    sizes = _half(vision, "vision_config")
    return StyleProjector(
        num_tokens=(sizes["image_size"] // sizes["patch_size"]) ** 2,
        token_dim=sizes["hidden_size"],
        tokens_per_level=tokens_per_level,
        hidden_size=hidden_size,
    )


@contextmanager
def _making(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"these sizes make no FLUX.1 model: {error}") from error
    finally:
        torch.set_default_dtype(before)


def _half(config: Config, half: str) -> dict[str, Any]:
    """The wanted half of a whole CLIP or SigLIP, or what is one already, without what is no size."""
    sizes = config.get(half, config)
    return {key: value for key, value in sizes.items() if key not in ("architectures", "dtype", "torch_dtype")}
