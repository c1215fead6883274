"""The pretrained parts of a FLUX.1 policy, from a folder or a hub repository in diffusers' layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from rewardgen.errors import CheckpointError, ConfigError
from rewardgen.policies.packing import PATCH, to_signed
from rewardgen.policies.projector import StyleProjector

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextModel, PreTrainedTokenizerBase, SiglipVisionModel, T5EncoderModel


class BlankTokenizer:
    """Stands in for a tokenizer where only the number of tokens counts: every token is number 0."""

    def __init__(self, model_max_length: int) -> None:
        self.model_max_length = model_max_length

    def __call__(self, prompts: list[str], *, max_length: int, **_: Any) -> dict[str, Tensor]:
        return {"input_ids": torch.zeros(len(prompts), max_length, dtype=torch.long)}


@dataclass(frozen=True, kw_only=True)
class FluxParts:
    """Everything a FLUX.1 policy is made of, before any adapter.

    Args:
        text_encoder, tokenizer, text_encoder_2, tokenizer_2: None where prompts were encoded ahead.
        siglip: the encoder of style pictures; None for policies that take none.
        siglip_size: side in pixels of the square pictures it reads; taken from the encoder unless given.
    """

    transformer: FluxTransformer2DModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel | None = None
    tokenizer: PreTrainedTokenizerBase | BlankTokenizer | None = None
    text_encoder_2: T5EncoderModel | None = None
    tokenizer_2: PreTrainedTokenizerBase | BlankTokenizer | None = None
    siglip: SiglipVisionModel | None = None
    siglip_size: int | None = None

    def __post_init__(self) -> None:
        if self.siglip is not None and self.siglip_size is None:
            object.__setattr__(self, "siglip_size", int(self.siglip.config.image_size))


def check_sizes(parts: FluxParts, projector: StyleProjector | None) -> None:
    """Raise ConfigError where transformer, autoencoder and style projector are not made for each other."""
    transformer = parts.transformer
    packed = parts.vae.config.latent_channels * PATCH * PATCH
    if transformer.config.in_channels != packed:
        raise ConfigError(
            f"the transformer takes {transformer.config.in_channels} channels per token, "
            f"but this autoencoder packs to {packed}"
        )
    if projector is not None and projector.hidden_size != transformer.inner_dim:
        raise ConfigError(
            f"the style projector makes tokens of width {projector.hidden_size}, "
            f"but the transformer is {transformer.inner_dim} wide"
        )


def load_parts(base: str, siglip: str | None, *, dtype: torch.dtype = torch.float32) -> FluxParts:
    """Load the parts of a `FluxPipeline` folder and a SigLIP vision model.

    Args:
        base: folder or hub id holding transformer/ vae/ text_encoder/ tokenizer/ text_encoder_2/ tokenizer_2/.
        siglip: folder or hub id of a `SiglipVisionModel`, or None.

    Raises:
        CheckpointError: a part is missing, unreadable or incomplete.
    """
    # Here and not above: they take seconds, which checking an experiment must not.
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import AutoTokenizer, CLIPTextModel, SiglipVisionModel, T5EncoderModel

    return FluxParts(
        transformer=_load(FluxTransformer2DModel, base, "transformer", torch_dtype=dtype),
        vae=_load(AutoencoderKL, base, "vae", torch_dtype=dtype),
        text_encoder=_load(CLIPTextModel, base, "text_encoder", dtype=dtype),
        tokenizer=_read(AutoTokenizer, base, "tokenizer"),
        text_encoder_2=_load(T5EncoderModel, base, "text_encoder_2", dtype=dtype),
        tokenizer_2=_read(AutoTokenizer, base, "tokenizer_2"),
        siglip=None if siglip is None else _load(SiglipVisionModel, siglip, "", dtype=dtype),
    )


def _read(kind: Any, source: str, subfolder: str, **options: Any) -> Any:
    place = f"{source}/{subfolder}" if subfolder else source
    try:
        return kind.from_pretrained(source, subfolder=subfolder, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{place}: cannot load a {kind.__name__} from it ({reason})") from error


def _load(kind: Any, source: str, subfolder: str, **options: Any) -> Any:
    """A model in evaluation mode. Both libraries only warn about weights that are not there; here that is an error."""
    model, info = _read(kind, source, subfolder, use_safetensors=True, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"{source}/{subfolder}: tensor '{missing[0]}' is missing ({len(missing)} missing in all)")
    return model.eval()


def siglip_pixels(image: Image.Image, size: int) -> Tensor:
    """A style picture as SigLIP reads it: bicubic resize to a square, float32 [1, 3, size, size] in [-1, 1]."""
    return to_signed(image.convert("RGB").resize((size, size), resample=Image.Resampling.BICUBIC))
