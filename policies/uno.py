"""UNO (arXiv 2504.02160): a FLUX.1 policy with any number of reference pictures in the sequence, and UMO's base.

It is USO without the style path: the same tokens, position ids (`packing.image_ids`, `pe="d"`), LoRA format and
sampling. Its forward pass is checked against the released code in `tests/parity`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from rewardgen.errors import ConfigError
from rewardgen.policies import official, shapes
from rewardgen.policies.attention import check_backend
from rewardgen.policies.conditions import Reference, UsoCondition
from rewardgen.policies.encoders import late_encoders
from rewardgen.policies.encoding_only import take_encoders
from rewardgen.policies.encodings import EncodingStore
from rewardgen.policies.flux import DTYPES, BaseDtype, FluxPolicy, Schedule, VaeEncode, check_choice
from rewardgen.policies.frozen import check_frozen
from rewardgen.policies.packing import PositionEncoding
from rewardgen.policies.parts import FluxParts, Sources, load_parts
from rewardgen.policies.trained import save_trained
from rewardgen.policies.values import check_values
from rewardgen.types import Example

DEFAULT_RANK = 512
"""Of UNO's and UMO's released LoRA."""

UnoPart = Literal["lora", "transformer"]


class UnoPolicy(FluxPolicy):
    """FLUX.1 with references as VAE tokens behind the target's.

    The references of an example are its `content_refs` (objects), then its `identity_refs` (people), in their order:
    to the model both are pictures on the same staircase of position ids, and only identity rewards tell them apart.

    Args:
        parts: the pretrained parts; they are frozen except for what `train` names. A SigLIP is not used.
        lora_rank: rank of a LoRA to inject (scale 1); None injects one of rank 512 when `train` names it.
        train: what is trained: "lora", "transformer" (all of the base weights).
        schedule: sampling times of the released pipeline ("official", see
            `rewardgen.flow.schedule.official_token_count`) or those of the true token count.
        sample_guidance: guidance embedding while sampling.
        train_guidance: guidance embedding of the model as trained.
        vae_encode: "mean" of the posterior, or a "sample" of it as the release does.
        content_long_side: pixels of the long side to which the reference of an example with only one is resized.
        several_long_side: the same where an example has several references (320 in the releases of UNO and UMO).
        max_text_tokens: length to which T5 prompts are padded and cut.
        pe: along which axes reference ids are offset; "d" is both, as released.
        attention: back end of diffusers for the DiT's attention (`flash`, `_native_cudnn` ...); None is its own choice.
        decoder_channels_last: keep the tensors of the VAE decoder channels last; the encoder is left as it is.
        store, load_text: see `FluxEncoder`. With a store, targets are encoded one by one and kept too.
    """

    takes_styles = False

    def __init__(
        self,
        parts: FluxParts,
        *,
        lora_rank: int | None = None,
        train: Sequence[UnoPart] = ("lora",),
        schedule: Schedule = "official",
        sample_guidance: float = 4.0,
        train_guidance: float = 1.0,
        vae_encode: VaeEncode = "mean",
        content_long_side: int = 512,
        several_long_side: int = 320,
        max_text_tokens: int = 512,
        pe: PositionEncoding = "d",
        store: EncodingStore | None = None,
        load_text: Callable[[], Mapping[str, Any]] | None = None,
        attention: str | None = None,
        decoder_channels_last: bool = False,
    ) -> None:
        check_choice("train", train, UnoPart)
        super().__init__(
            parts,
            None,
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
            attention=attention,
            decoder_channels_last=decoder_channels_last,
        )
        self.several_long_side = several_long_side

    @classmethod
    def from_pretrained(
        cls,
        base: str | None,
        *,
        transformer: str | None = None,
        vae: str | None = None,
        text_encoder: str | None = None,
        text_encoder_2: str | None = None,
        lora: str | None = None,
        lora_rank: int | None = None,
        base_dtype: BaseDtype = "fp32",
        offload: bool = False,
        encodings: str | None = None,
        train: tuple[UnoPart, ...] = ("lora",),
        schedule: Schedule = "official",
        sample_guidance: float = 4.0,
        train_guidance: float = 1.0,
        vae_encode: VaeEncode = "mean",
        content_long_side: int = 512,
        several_long_side: int = 320,
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
            lora: official LoRA file of UNO or UMO, or `owner/repository:path` on the hub; its rank is taken over.
            base_dtype: precision of what is not trained. What is trained is float32. "int8" holds the weights of the
                DiT's blocks in 8 bits (see `frozen.quantise`) and the rest in bfloat16; arithmetic is not in 8 bits.
            offload: keep the weights of the DiT's blocks in CPU memory and copy each to the device when it is used.
            encodings: folder that keeps what was encoded. Text encoders are then loaded only when something is missing
                there; `rewardgen encode` fills it ahead.

        Raises:
            CheckpointError: a file is missing, damaged or of another layout.
            ConfigError: the parts do not fit together, or base weights are to be trained that cannot be.
        """
        check_frozen(train, eight_bit=base_dtype == "int8", offload=offload)
        # Found before the base is read: a misspelt path must not cost minutes of loading.
        check_backend(attention)
        lora_file = None if lora is None else official.resolve_file(lora)
        dtype = DTYPES[base_dtype]
        sources = Sources(
            base=base, transformer=transformer, vae=vae, text_encoder=text_encoder, text_encoder_2=text_encoder_2
        )
        parts = load_parts(sources, dtype=dtype, encoders=encodings is None)
        if lora_file is not None:
            official.load_lora(parts.transformer, lora_file, rank=lora_rank)
        policy = cls(
            parts,
            lora_rank=lora_rank,
            train=train,
            schedule=schedule,
            sample_guidance=sample_guidance,
            train_guidance=train_guidance,
            vae_encode=vae_encode,
            content_long_side=content_long_side,
            several_long_side=several_long_side,
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
        parts, _ = shapes.take_shapes(base, options, dtype=DTYPES[base_dtype], rank=DEFAULT_RANK)
        policy = cls(parts, **options)
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
        return cls(parts, **options)

    def encode(self, examples: Sequence[Example]) -> UsoCondition:
        """Encode prompts and references; what was encoded before comes from memory.

        Raises:
            ConfigError: an example has style references, or a picture is too thin.
        """
        for example in examples:
            if example.style_refs:
                raise ConfigError(f"example '{example.id}' has style references, which UNO cannot take; use `uso`")
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            text = [self.encoder.text(example.prompt) for example in examples]
            return UsoCondition(
                text_B=tuple(states for states, _ in text),
                pooled_B=tuple(pooled for _, pooled in text),
                references_B=tuple(self._references(example) for example in examples),
                styles_B=((),) * len(examples),
            )

    def _references(self, example: Example) -> tuple[Reference, ...]:
        images = example.content_refs + example.identity_refs
        side = self._long_side(images)
        return tuple(self.encoder.reference(image, self.multiple, side) for image in images)

    def _style_tokens(self, condition: UsoCondition) -> list[Tensor]:
        return [torch.zeros(0, self.transformer.inner_dim, device=self.device)] * len(condition)

    def save(self, folder: Path) -> Mapping[str, Path]:
        """Write what is trained in the official formats, see `trained.save_trained`."""
        return save_trained(self.transformer, None, self.trained_parts, folder)
