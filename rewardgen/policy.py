"""The policy contract: a conditional flow-matching model that can be sampled, differentiated and saved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from rewardgen.errors import ConfigError
from rewardgen.types import Condition, Example, VelocityFn

Mode = Literal["train", "sample"]


class Policy(nn.Module, ABC):
    """A model that turns noise and a condition into a picture, step by step.

    Nothing here speaks of tokens, position ids or guidance: those are the policy's own affair.
    Latents are [B, L, C] with L and C fixed by the picture's size. A class method `check_arguments` refuses values
    before anything is loaded (`rewardgen.arguments`).
    """

    @abstractmethod
    def encode(self, examples: Sequence[Example]) -> Condition:
        """Run the frozen encoders once for a batch (any number and size of references). Never builds a graph."""

    def read_encodings(self, examples: Sequence[Example]) -> None:
        """Bring what is stored of the examples' encodings into memory, for an `encode` to come.

        The trainer calls it in another thread while a step runs: it computes nothing, touches no device and draws from
        no global generator. Without an override nothing happens.
        """

    @abstractmethod
    def velocity_fn(self, condition: Condition, *, mode: Mode, image_size: tuple[int, int]) -> VelocityFn:
        """Return `(latents_BLC, t_B) -> velocity_BLC` for a condition and pictures of (height, width).

        `train` is the model as trained (guidance 1), `sample` as sampled (guidance of the release). What depends
        on trainable weights but not on the step (the style tokens) is computed here, once, under the caller's
        gradient mode.
        """

    @abstractmethod
    def sigmas(self, num_steps: int, image_size: tuple[int, int]) -> Tensor:
        """Sampling times [num_steps + 1], float32, from 1 to 0, for a picture of (height, width)."""

    @abstractmethod
    def training_sigmas(self, image_size: tuple[int, int]) -> Tensor:
        """The grid of times from which the flow-matching loss draws, float32 [1000]."""

    @abstractmethod
    def latent_shape(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(L, C) for a picture of (height, width). Raises ConfigError for a size the model cannot draw."""

    @abstractmethod
    def encode_pixels(self, pixels_B3HW: Tensor) -> Tensor:
        """Pictures in [0, 1], on any device -> clean latents [B, L, C] on the policy's, without gradient."""

    @abstractmethod
    def decode(self, latents_BLC: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Clean latents -> pictures [B, 3, H, W], under the caller's gradient mode.

        Nominally in [0, 1], but not clamped.
        """

    def enable_checkpointing(self, enabled: bool = True) -> None:
        """Recompute activations in the backward pass instead of storing them. Raises ConfigError where it cannot."""
        if enabled:
            raise ConfigError(f"{type(self).__name__} cannot recompute activations: leave gradient_checkpointing off")

    def compile_blocks(self, **options: Any) -> None:
        """Compile the model's repeated blocks with `torch.compile(**options)`. Raises ConfigError where it cannot."""
        raise ConfigError(f"{type(self).__name__} has no blocks to compile: leave train.compile off")

    @abstractmethod
    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained parameters by a stable name, in a stable order."""

    @abstractmethod
    def save(self, folder: Path) -> Mapping[str, Path]:
        """Write the trained parts in the official format into `folder`; returns what was written."""


def noise_like_request(policy: Policy, seed_B: Sequence[int], image_size: tuple[int, int]) -> Tensor:
    """Standard normal latents [B, L, C], float32 on the CPU, each sample from its own seed.

    One generator per sample, so that a sample's noise does not depend on its neighbours or on the device.
    """
    import torch

    length, channels = policy.latent_shape(image_size)
    return torch.stack(
        [torch.randn(length, channels, generator=torch.Generator().manual_seed(int(seed))) for seed in seed_B]
    )
