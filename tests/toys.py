"""A complete toy world for tests of the engine: a policy, a reward and a dataset of a few hundred numbers.

The policy is a small MLP over latent tokens with a fixed linear "decoder" from each token to a 4x4 patch of pixels.
Everything is seeded by itself and works in float64, so that gradients can be checked by finite differences.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rewardgen.errors import ConfigError
from rewardgen.policy import Mode, Policy
from rewardgen.reward import Reward
from rewardgen.types import Condition, Example, Score, VelocityFn

PATCH = 4
CHANNELS = 6
IMAGE_SIZE = (8, 8)


class ToyCondition(Condition):
    """One vector [B, 7] per batch: a hash of the prompt and the mean colours of the references."""

    __slots__ = ("vector_BD",)

    def __init__(self, vector_BD: Tensor) -> None:
        self.vector_BD = vector_BD

    def __len__(self) -> int:
        return len(self.vector_BD)


class ToyPolicy(Policy):
    """Velocity = MLP(latent token, time, guidance, condition); decoder = a fixed linear map per token."""

    def __init__(self, hidden: int = 12, seed: int = 0, dtype: str = "float32") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        width = CHANNELS + 2 + 7

        def weight(*shape: int) -> Tensor:
            weights: Tensor = torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5
            return weights

        kind = getattr(torch, dtype)
        self.inner = nn.Parameter(weight(hidden, width).to(kind))
        self.bias = nn.Parameter(weight(1, hidden)[0].to(kind))
        self.outer = nn.Parameter(weight(CHANNELS, hidden).to(kind))
        decoder_CP = weight(CHANNELS, 3 * PATCH * PATCH)
        self.register_buffer("decoder_CP", decoder_CP.to(kind))
        self.register_buffer("encoder_PC", torch.linalg.pinv(decoder_CP).to(kind))

    def encode(self, examples: Sequence[Example]) -> ToyCondition:
        with torch.no_grad():
            return ToyCondition(torch.stack([self._vector(example) for example in examples]))

    def _vector(self, example: Example) -> Tensor:
        prompt = hashlib.blake2b(example.prompt.encode(), digest_size=1).digest()[0] / 255 if example.prompt else 0.0
        parts = [torch.tensor([prompt])]
        for refs in (example.content_refs, example.style_refs):
            parts.append(torch.stack([ref.mean(dim=(1, 2)) for ref in refs]).mean(0) if refs else torch.zeros(3))
        return torch.cat([part.to(self.inner) for part in parts])

    def velocity_fn(self, condition: Condition, *, mode: Mode, image_size: tuple[int, int]) -> VelocityFn:
        assert isinstance(condition, ToyCondition)
        guidance = 0.25 if mode == "train" else 1.0

        def velocity(latents_BLC: Tensor, t_B: Tensor) -> Tensor:
            batch, length, _ = latents_BLC.shape
            scalars_B2 = torch.stack([t_B.to(self.inner), torch.full_like(t_B, guidance).to(self.inner)], dim=1)
            given_BD = torch.cat([scalars_B2, condition.vector_BD.to(self.inner)], dim=1)
            inputs_BLW = torch.cat(
                [latents_BLC.to(self.inner), given_BD[:, None].expand(batch, length, given_BD.shape[1])], dim=2
            )
            hidden_BLH = nn.functional.silu(nn.functional.linear(inputs_BLW, self.inner, self.bias))
            return nn.functional.linear(hidden_BLH, self.outer)

        return velocity

    def sigmas(self, num_steps: int, image_size: tuple[int, int]) -> Tensor:
        return torch.linspace(1, 0, num_steps + 1) ** 0.8

    def training_sigmas(self, image_size: tuple[int, int]) -> Tensor:
        return torch.linspace(1, 0.001, 1000)

    def latent_shape(self, image_size: tuple[int, int]) -> tuple[int, int]:
        height, width = image_size
        if height % PATCH or width % PATCH:
            raise ConfigError(f"image size {height}x{width} is not a multiple of {PATCH}")
        return (height // PATCH) * (width // PATCH), CHANNELS

    def encode_pixels(self, pixels_B3HW: Tensor) -> Tensor:
        with torch.no_grad():
            patches_BPL = nn.functional.unfold(pixels_B3HW.to(self.inner) - 0.5, PATCH, stride=PATCH)
            return patches_BPL.transpose(1, 2) @ self.get_buffer("encoder_PC")

    def decode(self, latents_BLC: Tensor, image_size: tuple[int, int]) -> Tensor:
        patches_BLP = latents_BLC.to(self.inner) @ self.get_buffer("decoder_CP")
        return 0.5 + nn.functional.fold(patches_BLP.transpose(1, 2), image_size, PATCH, stride=PATCH)

    def trainable(self) -> dict[str, nn.Parameter]:
        return {"inner": self.inner, "bias": self.bias, "outer": self.outer}

    def save(self, folder: Path) -> Mapping[str, Path]:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "toy.safetensors"
        save_file({name: p.detach().clone() for name, p in self.trainable().items()}, path)
        return {"weights": path}


class ToyReward(Reward):
    """Minus the squared distance between the picture and the mean colour of its style references.

    Not applicable to examples without a style reference, nor to those named in `fail_ids`, for which it returns a
    NaN that depends on the pixels: the worst a reward may do.
    """

    differentiable = True

    def __init__(self, scale: float = 1.0, fail_ids: Sequence[str] = ()) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(float(scale), dtype=torch.float64))
        self.fail_ids = frozenset(fail_ids)

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        values, valid = [], []
        for pixels_3HW, example in zip(pixels_B3HW, examples, strict=True):
            applies = bool(example.style_refs) and example.id not in self.fail_ids
            if applies:
                colour_3 = torch.stack([ref.mean(dim=(1, 2)) for ref in example.style_refs]).mean(0).to(pixels_3HW)
                values.append(-self.scale.to(pixels_3HW) * (pixels_3HW - colour_3[:, None, None]).square().mean())
            else:
                values.append((pixels_3HW.sum() * 0 - 1).sqrt())
            valid.append(applies)
        return Score(value_B=torch.stack(values), valid_B=torch.tensor(valid, device=pixels_B3HW.device))


class ToyJudge(Reward):
    """How close a picture's mean is to 0.9, in steps of 1/256: no gradient. Fails for the examples it is told.

    The sign says whether close is good; 0 makes all pictures equal.
    """

    differentiable = False

    def __init__(self, fail_ids: Sequence[str] = (), sign: int = 1) -> None:
        super().__init__()
        self.fail_ids, self.sign = frozenset(fail_ids), sign

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        value_B = -(256 * (pixels_B3HW.detach().mean(dim=(1, 2, 3)) - 0.9).abs()).round() / 256
        valid_B = torch.tensor([example.id not in self.fail_ids for example in examples], device=value_B.device)
        return Score(value_B=torch.where(valid_B, self.sign * value_B, math.nan), valid_B=valid_B)


class ToyDataset:
    """`size` random examples with one content reference, one style reference and a target of one colour."""

    def __init__(self, size: int = 8, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.examples = [self._example(index, generator) for index in range(size)]

    @staticmethod
    def _example(index: int, generator: torch.Generator) -> Example:
        colour_3 = torch.rand(3, generator=generator)
        content_3HW = torch.rand(3, *IMAGE_SIZE, generator=generator)
        style_3HW = colour_3[:, None, None].expand(3, *IMAGE_SIZE).contiguous()
        return Example(
            id=f"toy-{index:03d}",
            prompt=f"thing {index}",
            content_refs=(content_3HW,),
            style_refs=(style_3HW,),
            target=(0.5 * content_3HW + 0.5 * style_3HW),
        )

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]
