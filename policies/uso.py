"""USO (arXiv 2508.18966): a FLUX.1 policy with content references in the sequence and projected style tokens.

Without style pictures it is UNO, whose weights and UMO's load here as well. Shape suffixes: B batch, L target
tokens, P packed latent channels, V SigLIP tokens, D their width, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn

from rewardgen.errors import ConfigError, nearest
from rewardgen.flow import schedule as times
from rewardgen.policies import official
from rewardgen.policies.dit import dit_velocity
from rewardgen.policies.encodings import EncodingCache, content_hash
from rewardgen.policies.packing import (
    PATCH,
    Grid,
    PositionEncoding,
    image_ids,
    pack,
    preprocess_reference,
    to_pil,
    to_signed,
    unpack,
)
from rewardgen.policies.parts import FluxParts, load_parts, siglip_pixels
from rewardgen.policies.projector import StyleProjector, select_levels
from rewardgen.policy import Mode, Policy
from rewardgen.types import Condition, Example, VelocityFn

Part = Literal["lora", "projector", "transformer"]
Schedule = Literal["official", "token_count"]

DEFAULT_RANK = 128
CACHE_BYTES = 1 << 30
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """A content reference: packed latents [N, P] and its token grid."""

    tokens_NP: Tensor
    grid: Grid


@dataclass(frozen=True, kw_only=True, slots=True)
class UsoCondition(Condition):
    """Encoded examples, one entry per example, on the CPU and without graph.

    Args:
        text_B: T5 states, each [T, D].
        pooled_B: CLIP pooled text, each [Q].
        references_B: content references of each example.
        styles_B: SigLIP levels of each example's style pictures, each [3, V, D].
    """

    text_B: tuple[Tensor, ...]
    pooled_B: tuple[Tensor, ...]
    references_B: tuple[tuple[Reference, ...], ...]
    styles_B: tuple[tuple[Tensor, ...], ...]

    def __len__(self) -> int:
        return len(self.text_B)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Group:
    """Examples whose tokens have the same layout and run through the DiT as one batch."""

    members: Tensor
    text_BTD: Tensor
    pooled_BQ: Tensor
    style_BSH: Tensor
    references_BRP: Tensor
    grids: tuple[Grid, ...]


class UsoPolicy(Policy):
    """FLUX.1 with USO's two kinds of references.

    Content and identity references become VAE tokens in the sequence, style references become style tokens in front
    of the text. Examples of one batch may have any number and size of either; those of equal layout run together,
    without padding, so that a sample does not depend on its neighbours.

    Args:
        parts: the pretrained parts; they are frozen except for what `train` names.
        projector: style projector, or None where no style pictures are used.
        lora_rank: rank of a LoRA to inject (scale 1); None injects one of rank 128 when `train` names it.
        train: what is trained: "lora", "projector", "transformer" (all of the base weights).
        schedule: sampling times of the released pipeline ("official", see
            `rewardgen.flow.schedule.official_token_count`) or those of the true token count.
        sample_guidance: guidance embedding while sampling.
        train_guidance: guidance embedding of the model as trained.
        vae_encode: "mean" of the posterior, or a "sample" of it as the release does.
        content_long_side: pixels of the long side to which content references are resized.
        max_text_tokens: length to which T5 prompts are padded and cut.
        pe: along which axes reference ids are offset; "d" is both, as released.
    """

    def __init__(
        self,
        parts: FluxParts,
        projector: StyleProjector | None,
        *,
        lora_rank: int | None = None,
        train: Sequence[Part] = ("lora",),
        schedule: Schedule = "official",
        sample_guidance: float = 4.0,
        train_guidance: float = 1.0,
        vae_encode: Literal["mean", "sample"] = "mean",
        content_long_side: int = 512,
        max_text_tokens: int = 512,
        pe: PositionEncoding = "d",
    ) -> None:
        super().__init__()
        _check_choice("train", train, Part)
        _check_choice("schedule", [schedule], Schedule)
        _check_choice("vae_encode", [vae_encode], Literal["mean", "sample"])
        _check_choice("pe", [pe], PositionEncoding)
        if "projector" in train and projector is None:
            raise ConfigError("train names 'projector', but the policy has none")
        self.transformer, self.vae = parts.transformer, parts.vae
        self.text_encoder, self.tokenizer = parts.text_encoder, parts.tokenizer
        self.text_encoder_2, self.tokenizer_2 = parts.text_encoder_2, parts.tokenizer_2
        self.siglip, self.siglip_size = parts.siglip, parts.siglip_size
        self.projector = projector
        self.trained_parts = tuple(train)
        self.schedule, self.pe, self.vae_encode = schedule, pe, vae_encode
        self.sample_guidance, self.train_guidance = sample_guidance, train_guidance
        self.content_long_side, self.max_text_tokens = content_long_side, max_text_tokens
        self.vae_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self._cache = EncodingCache(CACHE_BYTES)
        self._check_sizes()
        if (lora_rank is not None or "lora" in train) and not official.has_lora(self.transformer):
            official.add_lora(self.transformer, lora_rank or DEFAULT_RANK)
        self._freeze()
        self.train(False)

    @classmethod
    def from_pretrained(
        cls,
        base: str,
        *,
        siglip: str | None = None,
        lora: str | None = None,
        projector: str | None = None,
        lora_rank: int | None = None,
        style_tokens_per_level: int = 64,
        base_dtype: Literal["fp32", "bf16"] = "fp32",
        train: tuple[Part, ...] = ("lora",),
        schedule: Schedule = "official",
        sample_guidance: float = 4.0,
        train_guidance: float = 1.0,
        vae_encode: Literal["mean", "sample"] = "mean",
        content_long_side: int = 512,
        max_text_tokens: int = 512,
        pe: PositionEncoding = "d",
    ) -> Self:
        """Load a policy; options not named here are those of the class.

        Args:
            base: folder or hub id in the layout of a diffusers `FluxPipeline`.
            siglip: folder or hub id of a SigLIP vision model; needed for style pictures.
            lora: official LoRA file, or `owner/repository:path` on the hub; its rank is taken over.
            projector: official projector file, likewise. Without one, a fresh projector is made if `train` names it.
            style_tokens_per_level: size of such a fresh projector.
            base_dtype: precision of what is not trained. What is trained is float32.

        Raises:
            CheckpointError: a file is missing, damaged or of another layout.
            ConfigError: the parts do not fit together.
        """
        dtype = DTYPES[base_dtype]
        parts = load_parts(base, siglip, dtype=dtype)
        style: StyleProjector | None = None
        if projector is not None:
            style = official.load_projector(official.resolve_file(projector))
        elif "projector" in train and parts.siglip is not None:
            vision = parts.siglip.config
            style = StyleProjector(
                num_tokens=(vision.image_size // vision.patch_size) ** 2,
                token_dim=vision.hidden_size,
                tokens_per_level=style_tokens_per_level,
                hidden_size=parts.transformer.inner_dim,
            )
        if lora is not None:
            official.load_lora(parts.transformer, official.resolve_file(lora), rank=lora_rank)
        policy = cls(
            parts,
            style,
            lora_rank=lora_rank,
            train=train,
            schedule=schedule,
            sample_guidance=sample_guidance,
            train_guidance=train_guidance,
            vae_encode=vae_encode,
            content_long_side=content_long_side,
            max_text_tokens=max_text_tokens,
            pe=pe,
        )
        policy.cast_frozen(dtype)
        return policy

    # -- construction --

    def _check_sizes(self) -> None:
        packed = self.vae.config.latent_channels * PATCH * PATCH
        if self.transformer.config.in_channels != packed:
            raise ConfigError(
                f"the transformer takes {self.transformer.config.in_channels} channels per token, "
                f"but this autoencoder packs to {packed}"
            )
        if self.projector is not None and self.projector.hidden_size != self.transformer.inner_dim:
            raise ConfigError(
                f"the style projector makes tokens of width {self.projector.hidden_size}, "
                f"but the transformer is {self.transformer.inner_dim} wide"
            )

    def _freeze(self) -> None:
        self.requires_grad_(False)
        lora = official.lora_parameters(self.transformer)
        if "transformer" in self.trained_parts:
            self.transformer.requires_grad_(True)
            for parameter in lora.values():
                parameter.requires_grad_(False)
        if "lora" in self.trained_parts:
            for parameter in lora.values():
                parameter.requires_grad_(True)
        if "projector" in self.trained_parts and self.projector is not None:
            self.projector.requires_grad_(True)

    def cast_frozen(self, dtype: torch.dtype) -> None:
        """Hold what is not trained in `dtype` and what is trained in float32."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
        self._cache.clear()

    def train(self, mode: bool = True) -> Self:
        """Frozen parts stay in evaluation mode."""
        super().train(False)
        self.training = mode
        if "transformer" in self.trained_parts or "lora" in self.trained_parts:
            self.transformer.train(mode)
        if "projector" in self.trained_parts and self.projector is not None:
            self.projector.train(mode)
        return self

    def enable_checkpointing(self, enabled: bool = True) -> None:
        """Recompute the blocks of the DiT and of the VAE decoder in the backward pass instead of storing them."""
        for part in (self.transformer, self.vae):
            if enabled:
                part.enable_gradient_checkpointing()
            else:
                part.disable_gradient_checkpointing()

    @property
    def device(self) -> torch.device:
        return self.transformer.x_embedder.weight.device

    # -- encoding --

    def encode(self, examples: Sequence[Example]) -> UsoCondition:
        """Encode prompts and references; what was encoded before comes from memory.

        Each prompt and picture is encoded by itself: in a batch the last bits would depend on what else is in it,
        and so on what happened to be remembered, and a resumed run could not repeat an uninterrupted one.

        Raises:
            ConfigError: style pictures without a SigLIP and a projector, or a picture that is too thin.
        """
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            text = [self._cache.get("text", item.prompt, lambda p=item.prompt: self._encode_text(p)) for item in examples]
            return UsoCondition(
                text_B=tuple(states for states, _ in text),
                pooled_B=tuple(pooled for _, pooled in text),
                references_B=tuple(
                    tuple(self._reference(image) for image in (*item.content_refs, *item.identity_refs))
                    for item in examples
                ),
                styles_B=tuple(tuple(self._style(image) for image in item.style_refs) for item in examples),
            )
