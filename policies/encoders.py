"""The frozen encoders of a FLUX.1 policy, each for one prompt or one batch of equal pictures. None is decorated:
the caller decides about gradients.

Shape suffixes: B batch, H and W pixels, T text tokens, D text width, Q pooled width, V SigLIP tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from rewardgen.errors import ConfigError
from rewardgen.policies.conditions import Reference
from rewardgen.policies.encodings import EncodingCache, EncodingStore, content_hash
from rewardgen.policies.packing import PATCH, pack, preprocess_reference, to_pil, to_signed
from rewardgen.policies.parts import FluxParts, Sources, encoding_fingerprints, load_siglip, load_text, siglip_pixels
from rewardgen.policies.projector import select_levels
from rewardgen.types import Example

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import SiglipVisionModel

_LOG = logging.getLogger(__name__)


def encode_text(parts: FluxParts, prompt: str, max_tokens: int) -> tuple[Tensor, Tensor]:
    """T5 states [T, D] and CLIP's pooled output [Q]; T5's padding takes part in attention, as in the release."""
    if parts.text_encoder is None or parts.text_encoder_2 is None or parts.tokenizer is None:
        raise ConfigError(f"the prompt {prompt[:80]!r} was not encoded ahead, and the policy has no text encoders")
    device = parts.text_encoder.device
    clip_length = min(parts.tokenizer.model_max_length, parts.text_encoder.config.max_position_embeddings)

    def token_ids(tokenizer: object, length: int) -> Tensor:
        batch = tokenizer(  # type: ignore[operator]
            [prompt], padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return batch["input_ids"].to(device)  # type: ignore[no-any-return]

    pooled = parts.text_encoder(token_ids(parts.tokenizer, clip_length)).pooler_output
    states = parts.text_encoder_2(token_ids(parts.tokenizer_2, max_tokens)).last_hidden_state
    return states[0], pooled[0]


def vae_latents(vae: AutoencoderKL, signed_B3HW: Tensor, noise: torch.Generator | str | None = None) -> Tensor:
    """Pictures in [-1, 1] -> scaled latents [B, C, H/f, W/f], float32.

    Args:
        noise: None takes the posterior's mean; a generator, or "global" for torch's own, draws from the posterior
            (on the CPU, so that the draw does not depend on the device).
    """
    posterior = vae.encode(signed_B3HW.to(next(vae.parameters()))).latent_dist
    latents = posterior.mean.float()
    if noise is not None:
        generator = None if isinstance(noise, str) else noise
        draw = torch.randn(latents.shape, generator=generator).to(latents)
        latents = latents + posterior.std.float() * draw
    return vae.config.scaling_factor * (latents - vae.config.shift_factor)  # type: ignore[no-any-return]


def vae_pixels(vae: AutoencoderKL, latents_BCHW: Tensor) -> Tensor:
    """Scaled latents -> pictures [B, 3, H, W], nominally in [-1, 1], in float32 or above."""
    latents = latents_BCHW / vae.config.scaling_factor + vae.config.shift_factor
    pixels: Tensor = vae.decode(latents.to(next(vae.parameters()).dtype)).sample
    return pixels.to(torch.promote_types(pixels.dtype, torch.float32))


def style_levels(siglip: SiglipVisionModel, image: Image.Image, size: int) -> Tensor:
    """The hidden states of one style picture that the projector reads, [3, V, D]; `size` is SigLIP's side in pixels."""
    pixels = siglip_pixels(image, size).to(device=siglip.device, dtype=siglip.dtype)
    return select_levels(siglip(pixels, output_hidden_states=True).hidden_states)[0]


class FluxEncoder:
    """Encodes prompts and reference pictures one at a time, and remembers what it encoded.

    In a batch the last bits of an encoding would depend on what else is in it, and so on what happened to be
    remembered; a resumed run could not repeat an uninterrupted one.

    Args:
        parts: holds the encoders.
        content_long_side: pixels of the long side to which content references are resized.
        max_text_tokens: length to which T5 prompts are padded and cut.
        sample_posterior: draw content latents from the posterior. The draw is seeded by the picture, so it repeats.
        store: where encodings are kept between runs.
        load_text: gives the text encoders' fields of `parts` where those lack them and a prompt was never encoded.
        load_siglip: gives SigLIP, likewise.
    """

    def __init__(
        self,
        parts: FluxParts,
        *,
        content_long_side: int,
        max_text_tokens: int,
        sample_posterior: bool,
        store: EncodingStore | None = None,
        load_text: Callable[[], Mapping[str, Any]] | None = None,
        load_siglip: Callable[[], SiglipVisionModel] | None = None,
    ) -> None:
        self.parts = parts
        self.content_long_side, self.max_text_tokens = content_long_side, max_text_tokens
        self.sample_posterior = sample_posterior
        self.cache = EncodingCache(store=store)
        self._load_text, self._load_siglip = load_text, load_siglip

    def text(self, prompt: str) -> tuple[Tensor, Tensor]:
        """T5 states [T, D] and pooled CLIP text [Q]."""

        def encode() -> tuple[Tensor, Tensor]:
            if self.parts.text_encoder is None and self._load_text is not None:
                self._take("text encoders", **self._load_text())
            return encode_text(self.parts, prompt, self.max_text_tokens)

        states, pooled = self.cache.get("text", prompt, encode)
        return states, pooled

    def remember_text(self, prompt: str, states_TD: Tensor, pooled_Q: Tensor) -> None:
        """Take encodings of a prompt from elsewhere, in place of the text encoders'."""
        self.cache.get("text", prompt, lambda: (states_TD, pooled_Q))

    def reference(self, image_3HW: Tensor, multiple: int, long_side: int | None = None) -> Reference:
        """A content reference as tokens, cropped to a multiple of `multiple` pixels.

        `long_side` in pixels takes the place of `content_long_side`.
        """
        side = long_side or self.content_long_side
        digest = content_hash(image_3HW)

        def encode() -> tuple[Tensor, ...]:
            image = preprocess_reference(to_pil(image_3HW), side, multiple)
            noise = torch.Generator().manual_seed(int(digest[:15], 16)) if self.sample_posterior else None
            return (self._tokens(to_signed(image), noise),)

        (tokens_RCP,) = self.cache.get("content", f"{digest} {side}", encode)
        return Reference(tokens_NP=tokens_RCP.flatten(0, 1), grid=(tokens_RCP.shape[0], tokens_RCP.shape[1]))

    def target(self, image_3HW: Tensor) -> Tensor:
        """The mean encoding of a picture of its own size as packed tokens [L, P]."""
        encode = partial(self._tokens, image_3HW[None] * 2 - 1, None)
        (tokens_RCP,) = self.cache.get("target", content_hash(image_3HW), lambda: (encode(),))
        return tokens_RCP.flatten(0, 1)

    def _tokens(self, signed_13HW: Tensor, noise: torch.Generator | None) -> Tensor:
        """Packed tokens by row and column [rows, columns, P]."""
        latents_1CHW = vae_latents(self.parts.vae, signed_13HW, noise)
        rows, columns = latents_1CHW.shape[2] // PATCH, latents_1CHW.shape[3] // PATCH
        tokens_RCP: Tensor = pack(latents_1CHW)[0].unflatten(0, (rows, columns))
        return tokens_RCP

    def style(self, image_3HW: Tensor) -> Tensor:
        """SigLIP levels of a style picture, [3, V, D]. Raises ConfigError where there is no SigLIP."""

        def encode() -> tuple[Tensor]:
            if self.parts.siglip is None and self._load_siglip is not None:
                self._take("SigLIP", siglip=self._load_siglip())
            siglip, size = self.parts.siglip, self.parts.siglip_size
            if siglip is None or size is None:
                raise ConfigError("an example has style references, but the policy has no `siglip` to read them")
            return (style_levels(siglip, to_pil(image_3HW), size),)

        return self.cache.get("style", content_hash(image_3HW), encode)[0]

    def read_ahead(self, example: Example, references: Sequence[Tensor], long_side: int | None) -> None:
        """Bring what the store has of an example into memory. Nothing is computed, so any thread may call it.

        Args:
            example: as the dataset gave it.
            references: the pictures of it that become content references.
            long_side: theirs, as for `reference`.
        """
        if self.cache.store is None:
            return
        side = long_side or self.content_long_side
        self.cache.read_ahead("text", example.prompt)
        for image in references:
            self.cache.read_ahead("content", f"{content_hash(image)} {side}")
        for image in example.style_refs:
            self.cache.read_ahead("style", content_hash(image))
        if example.target is not None and not self.sample_posterior:
            self.cache.read_ahead("target", content_hash(example.target))

    def _take(self, what: str, **parts: Any) -> None:
        """Load encoders late, frozen, beside the transformer."""
        device = next(self.parts.transformer.parameters()).device
        for part in parts.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).to(device)
        _LOG.warning("not everything is encoded yet: loading the %s; `rewardgen encode` does it ahead", what)
        self.parts = replace(self.parts, **parts)

    def release(self) -> None:
        """Let go of the encoders that were loaded late; they come back when something new is to be encoded."""
        if self._load_text is not None:
            nothing = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
            self.parts = replace(self.parts, **nothing)
        if self._load_siglip is not None:
            self.parts = replace(self.parts, siglip=None)


def late_encoders(folder: str | None, sources: Sources, dtype: torch.dtype, **settings: object) -> dict[str, Any]:
    """`store`, `load_text` and `load_siglip` of a policy that keeps its encodings in `folder`; nothing without one.

    Args:
        settings: see `encoding_fingerprints`.
    """
    if folder is None:
        return {}
    late: dict[str, Any] = {
        "store": EncodingStore(Path(folder).expanduser(), encoding_fingerprints(sources, {"dtype": dtype, **settings})),
        "load_text": partial(load_text, sources, dtype),
    }
    if sources.siglip is not None:
        late["load_siglip"] = partial(load_siglip, sources.siglip, dtype)
    return late
