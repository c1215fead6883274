"""The pretrained parts of a FLUX.1 policy, from a folder or a hub repository in diffusers' layout."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from rewardgen import hub
from rewardgen.errors import CheckpointError, ConfigError
from rewardgen.policies import official
from rewardgen.policies.encodings import fingerprint
from rewardgen.policies.packing import PATCH, to_signed
from rewardgen.policies.projector import StyleProjector
from rewardgen.policies.reading import resolve_file

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextModel, PreTrainedTokenizerBase, SiglipVisionModel, T5EncoderModel


SINGLE_FILE = ".safetensors"


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """Where the parts of a FLUX.1 policy lie: each is a local path or a hub id.

    Args:
        base: folder or hub id holding transformer/ vae/ text_encoder/ tokenizer/ text_encoder_2/ tokenizer_2/, for the
            parts that are not named below.
        transformer, vae: a folder of such a model, or one of the single files that Black Forest Labs released
            (`flux1-dev.safetensors`, `ae.safetensors`).
        text_encoder, text_encoder_2: folder or hub id of a CLIP text model and a T5 encoder, each with its tokenizer.
        siglip: folder or hub id of a `SiglipVisionModel`; None for policies that read no style pictures.
    """

    base: str | None = None
    transformer: str | None = None
    vae: str | None = None
    text_encoder: str | None = None
    text_encoder_2: str | None = None
    siglip: str | None = None

    def place(self, part: str) -> tuple[str, str]:
        """(source, subfolder) of a part. Raises ConfigError where neither it nor the base is named."""
        own = getattr(self, part.replace("tokenizer", "text_encoder"))
        if own is not None:
            return own, ""
        if self.base is None:
            raise ConfigError(f"base: the policy needs `base`, or else `{part.replace('tokenizer', 'text_encoder')}`")
        return self.base, part


def load_parts(
    base: str | Sources,
    siglip: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    encoders: bool = True,
    transformer: Callable[[int, torch.dtype], FluxTransformer2DModel] | None = None,
) -> FluxParts:
    """Load the parts of a FLUX.1 policy: those of a `FluxPipeline` folder and a SigLIP vision model, or from `Sources`.

    Args:
        encoders: False leaves out text encoders and SigLIP.
        transformer: makes one, of the autoencoder's number of channels and `dtype`, in place of reading it.

    Raises:
        CheckpointError: a part is missing, unreadable, incomplete or of another shape, or its repository is closed.
    """
    # Here and not above: they take seconds, which checking an experiment must not.
    from diffusers import AutoencoderKL, FluxTransformer2DModel

    sources = base if isinstance(base, Sources) else Sources(base=base, siglip=siglip)
    singles: dict[str, Any] = {"transformer": official.load_transformer, "vae": official.load_vae}
    models: dict[str, Any] = {}
    kinds = {"transformer": FluxTransformer2DModel, "vae": AutoencoderKL}
    for part in ("vae",) if transformer is not None else kinds:
        source, subfolder = sources.place(part)
        if not subfolder and (source.endswith(SINGLE_FILE) or ":" in source):
            models[part] = singles[part](resolve_file(source), dtype=dtype)
        else:
            models[part] = _load(kinds[part], source, subfolder, torch_dtype=dtype)
    if transformer is not None:
        models["transformer"] = transformer(int(models["vae"].config.latent_channels), dtype)
    text = load_text(sources, dtype) if encoders else {}
    vision = load_siglip(sources.siglip, dtype) if encoders and sources.siglip is not None else None
    return FluxParts(**models, **text, siglip=vision)


def load_text(sources: Sources, dtype: torch.dtype) -> dict[str, Any]:
    """The text encoders and tokenizers, as fields of `FluxParts`. Raises CheckpointError like `load_parts`."""
    from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

    return {
        "text_encoder": _load(CLIPTextModel, *sources.place("text_encoder"), **_told(dtype)),
        "tokenizer": _read(AutoTokenizer, *sources.place("tokenizer")),
        "text_encoder_2": _load(T5EncoderModel, *sources.place("text_encoder_2"), **_told(dtype)),
        "tokenizer_2": _read(AutoTokenizer, *sources.place("tokenizer_2")),
    }


def load_siglip(source: str, dtype: torch.dtype) -> SiglipVisionModel:
    """The encoder of style pictures. Raises CheckpointError like `load_parts`."""
    from transformers import SiglipVisionModel

    model: SiglipVisionModel = _load(SiglipVisionModel, source, "", **_told(dtype))
    return model


def _told(dtype: torch.dtype) -> dict[str, Any]:
    """Options of transformers: it tells tensors of another shape only where it may go on without them."""
    return {"dtype": dtype, "ignore_mismatched_sizes": True}


def encoding_fingerprints(sources: Sources, settings: Mapping[str, object]) -> dict[str, str]:
    """What each kind of encoding depends on, as `EncodingStore` takes it.

    Args:
        settings: `dtype`, `vae_encode` and `max_text_tokens` of the policy. The size of a reference is in its key.
    """

    def of(*parts: str) -> list[object]:
        found: list[object] = []
        for part in parts:
            source, subfolder = sources.place(part)
            place = Path(source).expanduser() / subfolder
            found.append(place if place.exists() else f"{source}/{subfolder}")
        return found

    dtype, vae = settings["dtype"], of("vae")
    text = of("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    prints = {
        "text": fingerprint(dtype, settings["max_text_tokens"], *text),
        "content": fingerprint(dtype, settings["vae_encode"], *vae),
        "target": fingerprint(dtype, *vae),
    }
    siglip = Path(sources.siglip).expanduser() if sources.siglip is not None else None
    if siglip is not None:
        prints["style"] = fingerprint(dtype, siglip if siglip.exists() else sources.siglip)
    return prints


def _read(kind: Any, source: str, subfolder: str, **options: Any) -> Any:
    place = f"{source}/{subfolder}" if subfolder else source
    try:
        return kind.from_pretrained(source, subfolder=subfolder, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = f"cannot load a {kind.__name__} from it ({_reason(error)})"
        raise CheckpointError(f"{place}: {reason}{_remedy(source, place, error)}") from error


def _reason(error: Exception) -> str:
    """The line of a library's message that names a tensor, else its first one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"size mismatch for|expected shape", line)]
    return (telling or lines or [type(error).__name__])[0]


def _remedy(source: str, place: str, error: Exception) -> str:
    """What to do about it, where that can be told."""
    text = f"{type(error).__name__} {error} {error.__cause__}".lower()
    if re.search(r"size mismatch for|expected shape", text):
        return f"; the weights in {place} are not those of its config.json: fetch both again"
    if Path(source).exists():
        return ""
    return f"; {hub.remedy(source, error) or 'it is neither a folder here nor a repository that this account can see'}"


def _load(kind: Any, source: str, subfolder: str, **options: Any) -> Any:
    """A model in evaluation mode. Both libraries only warn about weights that are not there; here that is an error."""
    model, info = _read(kind, source, subfolder, use_safetensors=True, output_loading_info=True, **options)
    place = f"{source}/{subfolder}" if subfolder else source
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{place}: tensor '{missing[0]}' is missing ({len(missing)} missing in all); fetch its weights again"
        )
    if mismatched := sorted(info.get("mismatched_keys") or ()):
        name, found, wanted = mismatched[0]
        raise CheckpointError(
            f"{place}: tensor '{name}' has shape {tuple(found)}; this model needs {tuple(wanted)}: its weights are not"
            " those of its config.json, fetch both again"
        )
    return model.eval()


def siglip_pixels(image: Image.Image, size: int) -> Tensor:
    """A style picture as SigLIP reads it: bicubic resize to a square, float32 [1, 3, size, size] in [-1, 1]."""
    return to_signed(image.convert("RGB").resize((size, size), resample=Image.Resampling.BICUBIC))
