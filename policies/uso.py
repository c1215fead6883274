"""USO (arXiv 2508.18966): a FLUX.1 policy with content references in the sequence and projected style tokens.

Without style pictures it is UNO (`uno.py`). Shape suffixes: S style tokens, V SigLIP tokens, D their width, K tokens
of one style picture, H width of the DiT.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from rewardgen.errors import ConfigError
from rewardgen.policies import official, shapes
from rewardgen.policies.attention import check_backend
from rewardgen.policies.conditions import UsoCondition
from rewardgen.policies.encoders import late_encoders
from rewardgen.policies.encoding_only import take_encoders
from rewardgen.policies.encodings import EncodingStore
from rewardgen.policies.flux import DTYPES, BaseDtype, FluxPolicy, Schedule, VaeEncode, check_choice
from rewardgen.policies.frozen import check_frozen
from rewardgen.policies.packing import PositionEncoding
from rewardgen.policies.parts import FluxParts, Sources, load_parts
from rewardgen.policies.projector import StyleProjector
from rewardgen.policies.shapes import DEFAULT_RANK, DEFAULT_STYLE_TOKENS
from rewardgen.policies.trained import Part, save_trained
from rewardgen.policies.values import check_projector, check_values
from rewardgen.transfer import to_device
from rewardgen.types import Example

if TYPE_CHECKING:
    from transformers import SiglipVisionModel


class UsoPolicy(FluxPolicy):
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
        attention: back end of diffusers for the DiT's attention (`flash`, `_native_cudnn` ...); None is its own choice.
        decoder_channels_last: keep the tensors of the VAE decoder channels last; the encoder is left as it is.
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
        attention: str | None = None,
        decoder_channels_last: bool = False,
    ) -> None:
        check_choice("train", train, Part)
        check_projector(train, there=projector is not None)
        super().__init__(
            parts,
            projector,
            lora_rank=lora_rank or (DEFAULT_RANK if "lora" in train else None),
            train=train,
            schedule=schedule,
            sample_guidance=sample_guidance,
            train_guidance=train_guidance,
            vae_encode=vae_encode,
            content_long_side=content_long_side,
            max_text_tokens=max_text_tokens,
            pe=pe,
            store=store,
            load_text=load_text,
            load_siglip=load_siglip,
            attention=attention,
            decoder_channels_last=decoder_channels_last,
        )

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
        offload: bool = False,
        encodings: str | None = None,
        train: tuple[Part, ...] = ("lora",),
        schedule: Schedule = "official",
        sample_guidance: float = 4.0,
        train_guidance: float = 1.0,
        vae_encode: VaeEncode = "mean",
        content_long_side: int = 512,
        max_text_tokens: int = 512,
        pe: PositionEncoding = "d",
        attention: str | None = None,
        decoder_channels_last: bool = False,
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
            base_dtype: precision of what is not trained. What is trained is float32. "int8" holds the weights of the
                DiT's blocks in 8 bits (see `frozen.quantise`) and the rest in bfloat16; arithmetic is not in 8 bits.
            offload: keep the weights of the DiT's blocks in CPU memory and copy each to the device when it is used.
            encodings: folder that keeps what was encoded. Text encoders and SigLIP are then loaded only when something
                is missing there; `rewardgen encode` fills it ahead.

        Raises:
            CheckpointError: a file is missing, damaged or of another layout.
            ConfigError: the parts do not fit together, or base weights are to be trained that cannot be.
        """
        check_frozen(train, eight_bit=base_dtype == "int8", offload=offload)
        # Found before the base is read: a misspelt path must not cost minutes of loading.
        check_backend(attention)
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
            attention=attention,
            decoder_channels_last=decoder_channels_last,
            **late_encoders(encodings, sources, dtype, vae_encode=vae_encode, max_text_tokens=max_text_tokens),
        )
        policy.hold_base(base_dtype, offload=offload)
        return policy

    @classmethod
    def check_arguments(cls, **arguments: Any) -> None:
        """Refuse values of `from_pretrained`, with nothing read. Raises ConfigError; see `values.check_values`."""
        check_values(**arguments)
        there = arguments["projector"] is not None or arguments["siglip"] is not None
        check_projector(arguments["train"], there=there)

    @classmethod
    def blueprint(cls, base: str | None, **options: Any) -> Self:
        """A policy of the right sizes whose weights mean nothing, where the caller is (`with torch.device(...)`).

        It takes the arguments of `from_pretrained`. Sizes come from the files that are here, else from the table of
        released models; nothing is fetched.

        Raises:
            CheckpointError: the sizes of a part are not known.
            ConfigError: the parts do not fit together.
        """
        check_backend(options.pop("attention", None), here=False)  # it has no say in sizes, and may be missing here
        base_dtype, offload = options.pop("base_dtype", "fp32"), options.pop("offload", False)
        check_frozen(options.get("train", ()), eight_bit=base_dtype == "int8", offload=offload)
        policy = cls(*shapes.take_shapes(base, options, dtype=DTYPES[base_dtype]), **options)
        policy.hold_base(base_dtype, offload=offload)
        return policy

    @classmethod
    def encoding_only(cls, base: str | None, **options: Any) -> Self:
        """A policy that encodes as `from_pretrained`'s with these arguments would, and can do nothing else.

        Its DiT is neither read nor held, so that a device needs room for the encoders alone.

        Raises:
            CheckpointError: a part is missing, damaged or of another layout.
            ConfigError: `encodings` names no folder.
        """
        parts = take_encoders(base, options)
        return cls(parts, None, **options)

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

    def _style_tokens(self, condition: UsoCondition) -> list[Tensor]:
        """Style tokens [S, H] of each example; the projector runs once over all style pictures of the batch."""
        counts = [len(styles) for styles in condition.styles_B]
        if not any(counts):
            return [torch.zeros(0, self.transformer.inner_dim, device=self.device)] * len(counts)
        if self.projector is None:
            raise ConfigError("the condition has style pictures, but the policy has no `projector`")
        weight = next(self.projector.parameters())
        levels_S3VD = torch.stack([levels for styles in condition.styles_B for levels in styles])
        tokens_SKH = self.projector(to_device(levels_S3VD, weight.device, weight.dtype))
        return [tokens.flatten(0, 1) for tokens in tokens_SKH.split(counts)]

    def save(self, folder: Path) -> Mapping[str, Path]:
        """Write what is trained in the official formats, see `trained.save_trained`."""
        return save_trained(self.transformer, self.projector, self.trained_parts, folder)
