"""What the policies on FLUX.1 share: frozen parts, sizes, times, the autoencoder, tokens in, velocity out.

Shape suffixes: B batch, L target tokens, P packed latent channels, S style tokens, H and W pixels (as a width, H is
the DiT's).
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor, nn

from rewardgen.errors import ConfigError, nearest
from rewardgen.flow import schedule as times
from rewardgen.policies import official
from rewardgen.policies.attention import BackEnd, check_backend
from rewardgen.policies.conditions import Group, UsoCondition, group_by_layout
from rewardgen.policies.dit import grouped_velocity
from rewardgen.policies.encoders import FluxEncoder, vae_latents, vae_pixels
from rewardgen.policies.encodings import EncodingStore
from rewardgen.policies.frozen import hold_blocks
from rewardgen.policies.packing import PATCH, Grid, PositionEncoding, image_ids, pack, unpack
from rewardgen.policies.parts import FluxParts, check_sizes
from rewardgen.policies.projector import StyleProjector
from rewardgen.policies.trained import Part, require_gradients
from rewardgen.policy import Mode, Policy
from rewardgen.transfer import to_device
from rewardgen.types import Condition, Example, VelocityFn

if TYPE_CHECKING:
    from transformers import SiglipVisionModel

Schedule = Literal["official", "token_count"]
VaeEncode = Literal["mean", "sample"]
BaseDtype = Literal["fp32", "bf16", "int8"]

LAYOUTS = 32
"""Layouts of tokens whose positions are remembered: a few megabytes each at full size."""
DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16}
"""Of what is not trained; of int8 all but the weights of the DiT's blocks."""


class FluxPolicy(Policy):
    """FLUX.1 with reference pictures in the token sequence. Abstract: `UsoPolicy` and `UnoPolicy` are its leaves.

    They say which pictures become tokens (`encode`), which style tokens stand before the text (`_style_tokens`), and
    how what was trained is written (`save`). Examples of one batch may have any number and size of references; those
    of equal layout run together, without padding, so that a sample does not depend on its neighbours.

    Args:
        parts: the pretrained parts; they are frozen except for what `train` names.
        projector: style projector, or None where no style pictures are used.
        lora_rank: rank of a LoRA to inject (scale 1) where there is none yet; None injects none.
        train: what is trained: "lora", "projector", "transformer" (all of the base weights).
        schedule: sampling times of the released pipeline ("official", see
            `rewardgen.flow.schedule.official_token_count`) or those of the true token count.
        sample_guidance: guidance embedding while sampling.
        train_guidance: guidance embedding of the model as trained.
        vae_encode: "mean" of the posterior, or a "sample" of it as the release does.
        content_long_side: pixels of the long side to which references are resized.
        max_text_tokens: length to which T5 prompts are padded and cut.
        pe: along which axes reference ids are offset; "d" is both, as released.
        attention: back end of diffusers for the DiT's attention (`flash`, `_native_cudnn` ...); None is its own choice.
        decoder_channels_last: keep the tensors of the VAE decoder channels last; the encoder is left as it is.
        store, load_text, load_siglip: see `FluxEncoder`. With a store, targets are encoded one by one and kept too.
    """

    takes_styles: ClassVar[bool] = True
    """Whether examples may have style references."""
    offloaded_bytes = 0
    """Bytes of base weights that stay in CPU memory."""
    several_long_side: int | None = None
    """Long side in pixels of each reference where an example has several, None for the usual one."""

    def __init__(
        self,
        parts: FluxParts,
        projector: StyleProjector | None,
        *,
        lora_rank: int | None,
        train: Sequence[Part],
        schedule: Schedule,
        sample_guidance: float,
        train_guidance: float,
        vae_encode: VaeEncode,
        content_long_side: int,
        max_text_tokens: int,
        pe: PositionEncoding,
        store: EncodingStore | None,
        load_text: Callable[[], Mapping[str, Any]] | None,
        load_siglip: Callable[[], SiglipVisionModel] | None = None,
        attention: str | None = None,
        decoder_channels_last: bool = False,
    ) -> None:
        super().__init__()
        check_choice("schedule", [schedule], Schedule)
        check_choice("vae_encode", [vae_encode], VaeEncode)
        check_choice("pe", [pe], PositionEncoding)
        check_backend(attention)
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
        if lora_rank is not None and not official.has_lora(self.transformer):
            official.add_lora(self.transformer, lora_rank)
        require_gradients(self, self.transformer, projector, self.trained_parts)
        self.attention = BackEnd(attention, self.transformer)
        self.decoder_channels_last = decoder_channels_last
        if decoder_channels_last:
            self.vae.decoder.to(memory_format=torch.channels_last)
        self._rotary: OrderedDict[object, tuple[Tensor, Tensor]] = OrderedDict()
        self.train(False)

    # -- construction --

    def cast_frozen(self, dtype: torch.dtype) -> None:
        """Hold what is not trained in `dtype` and what is trained in float32."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
        self.encoder.cache.clear()

    def hold_base(self, base_dtype: BaseDtype, *, offload: bool) -> None:
        """Hold what is not trained as these arguments of `from_pretrained` say. A LoRA must be there by now."""
        self.cast_frozen(DTYPES[base_dtype])
        if base_dtype == "int8" or offload:
            self.offloaded_bytes = hold_blocks(self._blocks(), eight_bit=base_dtype == "int8", offload=offload)

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
        for block in self._blocks():
            block.compile(**options)

    def _blocks(self) -> tuple[nn.Module, ...]:
        return (*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks)

    @property
    def device(self) -> torch.device:
        # Not `transformer.device`: diffusers looks through all modules for hooks each time it is asked.
        device: torch.device = next(self.transformer.parameters()).device
        return device

    # -- encoding --

    def encode_pixels(self, pixels_B3HW: Tensor) -> Tensor:
        """Pictures in [0, 1] -> clean latents [B, L, P], float32, without gradient.

        With `vae_encode` "sample" the posterior is drawn from with torch's global CPU generator.
        """
        self._grid((pixels_B3HW.shape[2], pixels_B3HW.shape[3]))
        if self.encoder.cache.store is not None and self.vae_encode == "mean":
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                known_BLP = torch.stack([self.encoder.target(pixels_3HW) for pixels_3HW in pixels_B3HW])
                return to_device(known_BLP, self.device)
        noise = "global" if self.vae_encode == "sample" else None
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return pack(vae_latents(self.vae, to_device(pixels_B3HW, self.device) * 2 - 1, noise))

    def decode(self, latents_BLC: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Clean latents -> pictures [B, 3, H, W], nominally in [0, 1] but not clamped, under the caller's gradients."""
        latents_BCHW = unpack(latents_BLC, self._grid(image_size))
        if self.decoder_channels_last:
            latents_BCHW = latents_BCHW.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, enabled=False):
            pixels_B3HW = (vae_pixels(self.vae, latents_BCHW) + 1) / 2
        return pixels_B3HW.contiguous() if self.decoder_channels_last else pixels_B3HW

    def read_encodings(self, examples: Sequence[Example]) -> None:
        """See `Policy.read_encodings`."""
        for example in examples:
            images = example.content_refs + example.identity_refs
            self.encoder.read_ahead(example, images, self._long_side(images))

    def _long_side(self, images: Sequence[Tensor]) -> int | None:
        """Long side in pixels of so many references, None for the usual one."""
        return self.several_long_side if len(images) > 1 else None

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

    @abstractmethod
    def _style_tokens(self, condition: UsoCondition) -> list[Tensor]:
        """Style tokens [S, H] of each example, under the caller's gradient mode; S may be 0."""

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
            raise TypeError(
                f"{type(self).__name__} needs the condition that it encoded, not a {type(condition).__name__}"
            )
        device = self.device
        self.attention.try_on(self.transformer, device)
        if guidance_B is None:
            guidance = self.train_guidance if mode == "train" else self.sample_guidance
            guidance_B = torch.full((len(condition),), guidance)
        groups = group_by_layout(condition, self._style_tokens(condition), self.transformer.config.in_channels, device)

        rotary = [self._positions(self._grid(image_size), group) for group in groups]
        return grouped_velocity(self.transformer, groups, to_device(guidance_B, device), rotary)

    def _positions(self, target: Grid, group: Group) -> tuple[Tensor, Tensor]:
        """Rotary embedding of the positions of all tokens of a group; those of the last few layouts are remembered."""
        length, device = group.style_BSH.shape[1] + group.text_BTD.shape[1], self.device
        layout = (target, group.grids, length, device)
        if layout not in self._rotary:
            with torch.inference_mode(False), torch.no_grad():
                ids = torch.cat([torch.zeros(length, 3), *image_ids(target, group.grids, self.pe)])
                self._rotary[layout] = self.transformer.pos_embed(ids.to(device))
            if len(self._rotary) > LAYOUTS:
                self._rotary.popitem(last=False)
        return self._rotary[layout]

    # -- weights --

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trained parameters by their name in this module, in its order; a shared one appears once."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


def check_choice(name: str, values: Sequence[str], choices: Any) -> None:
    """Raise ConfigError for the first value that is not among the choices of a `Literal`."""
    valid = get_args(choices)
    for value in values:
        if value not in valid:
            raise ConfigError(f"{name}: '{value}' is not one of {', '.join(valid)}.{nearest(str(value), valid)}")
