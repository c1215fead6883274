"""USO (arXiv 2508.18966): a FLUX.1 policy with content references in the sequence and projected style tokens.

Without style pictures it is UNO, whose weights and UMO's load here as well. Shape suffixes: B batch, L target
tokens, P packed latent channels, V SigLIP tokens, D their width, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from rewardgen.errors import ConfigError, nearest
from rewardgen.flow import schedule as times
from rewardgen.policies import official, shapes
from rewardgen.policies.conditions import Group, UsoCondition, group_by_layout
from rewardgen.policies.dit import grouped_velocity
from rewardgen.policies.encoders import FluxEncoder, vae_latents, vae_pixels
from rewardgen.policies.encodings import EncodingStore
from rewardgen.policies.packing import PATCH, Grid, PositionEncoding, image_ids, pack, unpack
from rewardgen.policies.parts import FluxParts, Sources, check_sizes, encoding_fingerprints
from rewardgen.policies.parts import load_parts as load_parts
from rewardgen.policies.parts import load_siglip as load_siglip
from rewardgen.policies.parts import load_text as load_text
from rewardgen.policies.projector import StyleProjector
from rewardgen.policies.shapes import DEFAULT_RANK, DEFAULT_STYLE_TOKENS
from rewardgen.policies.trained import Part, require_gradients, save_trained
from rewardgen.policy import Mode, Policy
from rewardgen.types import Condition, Example, VelocityFn

if TYPE_CHECKING:
    from transformers import SiglipVisionModel

Schedule = Literal["official", "token_count"]
VaeEncode = Literal["mean", "sample"]
BaseDtype = Literal["fp32", "bf16"]

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
        store, load_text, load_siglip: see `FluxEncoder`. With a store, targets are encoded one by one and kept too.
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
        vae_encode: VaeEncode = "mean",
        content_long_side: int = 512,
        max_text_tokens: int = 512,
        pe: PositionEncoding = "d",
        store: EncodingStore | None = None,
        load_text: Callable[[], Mapping[str, Any]] | None = None,
        load_siglip: Callable[[], SiglipVisionModel] | None = None,
    ) -> None:
        super().__init__()
        _check_choice("train", train, Part)
        _check_choice("schedule", [schedule], Schedule)
        _check_choice("vae_encode", [vae_encode], VaeEncode)
        _check_choice("pe", [pe], PositionEncoding)
        if "projector" in train and projector is None:
            raise ConfigError("train names 'projector', but the policy has none")
        self.transformer, self.vae, self.siglip = parts.transformer, parts.vae, parts.siglip
        self.text_encoder, self.text_encoder_2 = parts.text_encoder, parts.text_encoder_2
        self.projector = projector
        self.trained_parts = tuple(train)
        self.schedule, self.pe, self.vae_encode = schedule, pe, vae_encode
        self.sample_guidance, self.train_guidance = sample_guidance, train_guidance
        self.vae_factor: int = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.encoder = FluxEncoder(
            parts,
            content_long_side=content_long_side,
            max_text_tokens=max_text_tokens,
            sample_posterior=vae_encode == "sample",
            store=store,
            load_text=load_text,
            load_siglip=load_siglip,
        )
        check_sizes(parts, projector)
        if (lora_rank is not None or "lora" in train) and not official.has_lora(self.transformer):
            official.add_lora(self.transformer, lora_rank or DEFAULT_RANK)
        require_gradients(self, self.transformer, projector, self.trained_parts)
        self.train(False)

    @classmethod
    def from_pretrained(
        cls,
        base: str | None,
        *,
        transformer: str | None = None,
        vae: str | None = None,
        text_encoder: str | None = None,
        text_encoder_2: str | None = None,
        siglip: str | None = None,
        lora: str | None = None,
        projector: str | None = None,
        lora_rank: int | None = None,
        style_tokens_per_level: int = DEFAULT_STYLE_TOKENS,
        base_dtype: BaseDtype = "fp32",
        encodings: str | None = None,
        train: tuple[Part, ...] = ("lora",),
        schedule: Schedule = "official",
        sample_guidance: float = 4.0,
        train_guidance: float = 1.0,
        vae_encode: VaeEncode = "mean",
        content_long_side: int = 512,
        max_text_tokens: int = 512,
        pe: PositionEncoding = "d",
    ) -> Self:
        """Load a policy; options not named here are those of the class.

        Args:
            base: folder or hub id in the layout of a diffusers `FluxPipeline`, for all parts not named below; None
                where they are all named.
            transformer, vae: in place of the base's; also the single files of Black Forest Labs' own release.
            text_encoder, text_encoder_2: in place of the base's, each a folder or hub id with its tokenizer.
            siglip: folder or hub id of a SigLIP vision model; needed for style pictures.
            lora: official LoRA file, or `owner/repository:path` on the hub; its rank is taken over.
            projector: official projector file, likewise. Without one, a fresh projector is made if `train` names it.
            style_tokens_per_level: size of such a fresh projector.
            base_dtype: precision of what is not trained. What is trained is float32.
            encodings: folder that keeps what was encoded. Text encoders and SigLIP are then loaded only when something
                is missing there; `rewardgen encode` fills it ahead.

        Raises:
            CheckpointError: a file is missing, damaged or of another layout.
            ConfigError: the parts do not fit together.
        """
        # Found before the base is read: a misspelt path must not cost minutes of loading.
        projector_file, lora_file = (
            None if source is None else official.resolve_file(source) for source in (projector, lora)
        )
        dtype = DTYPES[base_dtype]
        sources = Sources(
            base=base,
            transformer=transformer,
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            siglip=siglip,
        )
        parts = load_parts(sources, dtype=dtype, encoders=encodings is None)
        style: StyleProjector | None = None
        if projector_file is not None:
            style = official.load_projector(projector_file)
        elif "projector" in train and siglip is not None:
            style = shapes.make_projector(
                parts.siglip.config.to_dict() if parts.siglip else shapes.config_of(siglip),
                style_tokens_per_level,
                parts.transformer.inner_dim,
            )
        if lora_file is not None:
            official.load_lora(parts.transformer, lora_file, rank=lora_rank)
        late: dict[str, Any] = {}
        if encodings is not None:
            settings: dict[str, Any] = {"dtype": base_dtype, "vae_encode": vae_encode}
            settings |= {"content_long_side": content_long_side, "max_text_tokens": max_text_tokens}
            late = {
                "store": EncodingStore(Path(encodings).expanduser(), encoding_fingerprints(sources, settings)),
                "load_text": partial(load_text, sources, dtype),
                "load_siglip": None if siglip is None else partial(load_siglip, siglip, dtype),
            }
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
            **late,
        )
        policy.cast_frozen(dtype)
        return policy

    @classmethod
    def blueprint(cls, base: str | None, **options: Any) -> Self:
        """A policy of the right sizes whose weights mean nothing, where the caller is (`with torch.device(...)`).

        It takes the arguments of `from_pretrained`. Sizes come from the files that are here, else from the table of
        released models; nothing is fetched.

        Raises:
            CheckpointError: the sizes of a part are not known.
            ConfigError: the parts do not fit together.
        """
        dtype = DTYPES[options.pop("base_dtype", "fp32")]
        policy = cls(*shapes.take_shapes(base, options, dtype=dtype), **options)
        policy.cast_frozen(dtype)
        return policy

    # -- construction --

    def cast_frozen(self, dtype: torch.dtype) -> None:
        """Hold what is not trained in `dtype` and what is trained in float32."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
        self.encoder.cache.clear()

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

    def compile_blocks(self, **options: Any) -> None:
        """Compile the DiT's blocks one by one: all double and all single ones share one compiled program each."""
        for block in (*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks):
            block.compile(**options)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.transformer.device
        return device

    # -- encoding --

    def encode(self, examples: Sequence[Example]) -> UsoCondition:
        """Encode prompts and references; what was encoded before comes from memory.

        Identity references follow the content references: to the model they are the same (UMO on UNO).

        Raises:
            ConfigError: style pictures without a SigLIP, or a picture that is too thin.
        """
        encoder, multiple = self.encoder, self.multiple
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            text = [encoder.text(item.prompt) for item in examples]
            content = [item.content_refs + item.identity_refs for item in examples]
            return UsoCondition(
                text_B=tuple(states for states, _ in text),
                pooled_B=tuple(pooled for _, pooled in text),
                references_B=tuple(tuple(encoder.reference(image, multiple) for image in images) for images in content),
                styles_B=tuple(tuple(encoder.style(image) for image in item.style_refs) for item in examples),
            )

    def encode_pixels(self, pixels_B3HW: Tensor) -> Tensor:
        """Pictures in [0, 1] -> clean latents [B, L, P], float32, without gradient.

        With `vae_encode` "sample" the posterior is drawn from with torch's global CPU generator.
        """
        self._grid((pixels_B3HW.shape[2], pixels_B3HW.shape[3]))
        if self.encoder.cache.store is not None and self.vae_encode == "mean":
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                return torch.stack([self.encoder.target(pixels_3HW) for pixels_3HW in pixels_B3HW]).to(self.device)
        noise = "global" if self.vae_encode == "sample" else None
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return pack(vae_latents(self.vae, pixels_B3HW * 2 - 1, noise))

    def decode(self, latents_BLC: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Clean latents -> pictures [B, 3, H, W], nominally in [0, 1] but not clamped, under the caller's gradients."""
        with torch.autocast(self.device.type, enabled=False):
            return (vae_pixels(self.vae, unpack(latents_BLC, self._grid(image_size))) + 1) / 2

    def release_encoders(self) -> None:
        """Let text encoders and SigLIP leave memory, where `encodings` lets them come back."""
        self.encoder.release()

    # -- sampling --

    @property
    def multiple(self) -> int:
        """Pixels per token side: pictures must be multiples of it (16 in FLUX.1)."""
        return PATCH * self.vae_factor

    def _grid(self, image_size: tuple[int, int]) -> Grid:
        height, width = image_size
        if height < 1 or width < 1 or height % self.multiple or width % self.multiple:
            raise ConfigError(f"image_size {height}x{width}: both sides must be multiples of {self.multiple}")
        return height // self.multiple, width // self.multiple

    def latent_shape(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(L, P) for a picture of (height, width). Raises ConfigError unless both are multiples of `multiple`."""
        rows, columns = self._grid(image_size)
        return rows * columns, int(self.transformer.config.in_channels)

    def sigmas(self, num_steps: int, image_size: tuple[int, int]) -> Tensor:
        """Sampling times [num_steps + 1], float32, from 1 to 0."""
        num_tokens, _ = self.latent_shape(image_size)
        if self.schedule == "official":
            return times.official_sigmas(num_steps, image_size)
        return times.token_count_sigmas(num_steps, num_tokens)

    def training_sigmas(self, image_size: tuple[int, int]) -> Tensor:
        """The times from which the flow-matching loss draws, float32 [1000]."""
        return times.training_sigmas(self.latent_shape(image_size)[0])

    def velocity_fn(
        self,
        condition: Condition,
        *,
        mode: Mode,
        image_size: tuple[int, int],
        guidance_B: Tensor | None = None,
    ) -> VelocityFn:
        """`(latents_BLP, t_B) -> velocity_BLP` for a condition; style tokens are made here, once.

        Args:
            image_size: (height, width) of the picture, which the position ids need.
            guidance_B: a guidance of its own for each sample, in place of the mode's.

        Raises:
            ConfigError: a size the model cannot draw, or style pictures without a projector.
        """
        if not isinstance(condition, UsoCondition):
            raise TypeError(f"UsoPolicy needs the UsoCondition that it encoded, not a {type(condition).__name__}")
        device = self.device
        if guidance_B is None:
            guidance = self.train_guidance if mode == "train" else self.sample_guidance
            guidance_B = torch.full((len(condition),), guidance)
        groups = group_by_layout(condition, self._style_tokens(condition), self.transformer.config.in_channels, device)

        target = self._grid(image_size)

        def ids_of(group: Group) -> Tensor:
            text_ids = torch.zeros(group.style_BSH.shape[1] + group.text_BTD.shape[1], 3)
            return torch.cat([text_ids, *image_ids(target, group.grids, self.pe)]).to(device)

        return grouped_velocity(self.transformer, groups, guidance_B.to(device), ids_of)

    def _style_tokens(self, condition: UsoCondition) -> list[Tensor]:
        """Style tokens [S, H] of each example; the projector runs once over all style pictures of the batch."""
        counts = [len(styles) for styles in condition.styles_B]
        if not any(counts):
            return [torch.zeros(0, self.transformer.inner_dim, device=self.device)] * len(counts)
        if self.projector is None:
            raise ConfigError("the condition has style pictures, but the policy has no `projector`")
        weight = next(self.projector.parameters())
        levels_S3VD = torch.stack([levels for styles in condition.styles_B for levels in styles])
        tokens_SKH = self.projector(levels_S3VD.to(weight))
        return [tokens.flatten(0, 1) for tokens in tokens_SKH.split(counts)]

    # -- weights --

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trained parameters by their name in this module, in its order; a shared one appears once."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def save(self, folder: Path) -> Mapping[str, Path]:
        """Write what is trained in the official formats, see `trained.save_trained`."""
        return save_trained(self.transformer, self.projector, self.trained_parts, folder)


def _check_choice(name: str, values: Sequence[str], choices: Any) -> None:
    valid = get_args(choices)
    for value in values:
        if value not in valid:
            raise ConfigError(f"{name}: '{value}' is not one of {', '.join(valid)}.{nearest(str(value), valid)}")
