"""The models, the example and the trainer of `full_scale.py`, at full size and at toy size, all of random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewardgen.fleet.inline import InlinePool
from rewardgen.learner import Learner, OptimizerConfig
from rewardgen.objective import Objective, ObjectiveConfig
from rewardgen.policies import official, shapes
from rewardgen.policies.projector import StyleProjector
from rewardgen.policies.uso import UsoPolicy
from rewardgen.rewards.csd import CsdConfig, CsdModel, CsdReward
from rewardgen.rollout import RolloutConfig, RolloutWorker
from rewardgen.trainer import TrainConfig, Trainer
from rewardgen.types import Example, StepReport

ENTRY_STEP, NUM_STEPS = 20, 25


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """Sizes of everything.

    Args:
        configs: of the parts, as `shapes.make_parts` takes them.
        text_tokens, style_tokens_per_level, rank: of prompts, of the projector and of the LoRA.
        content_side: long side of the content reference in pixels.
        product_side: side of the matrix product that utilisation is measured against.
    """

    configs: Mapping[str, Mapping[str, Any]]
    csd: CsdConfig
    text_tokens: int
    style_tokens_per_level: int
    rank: int
    content_side: int
    product_side: int


FULL = Scale(
    configs={"transformer": shapes.FLUX, "vae": shapes.FLUX_VAE, "siglip": shapes.SIGLIP_SO400M},
    csd=CsdConfig(),
    text_tokens=512,
    style_tokens_per_level=shapes.DEFAULT_STYLE_TOKENS,
    rank=128,
    content_side=512,
    product_side=8192,
)
TOY = Scale(
    configs={
        "transformer": shapes.FLUX
        | {
            "num_layers": 2,
            "num_single_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 24,
            "pooled_projection_dim": 12,
            "axes_dims_rope": (4, 6, 6),
        },
        "vae": shapes.FLUX_VAE | {"block_out_channels": (8, 16, 24, 24), "norm_num_groups": 4},
        "siglip": shapes.SIGLIP_SO400M
        | {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 20,
            "num_attention_heads": 2,
            "image_size": 28,
        },
    },
    csd=CsdConfig(image_size=28, width=32, layers=2, heads=2, output_dim=8),
    text_tokens=8,
    style_tokens_per_level=2,
    rank=4,
    content_side=32,
    product_side=256,
)
TOY_SIZES = (32, 64)
PROMPTS = ("", "a red cat")


class Pictures:
    """One example of random pictures, again and again."""

    def __init__(self, side: int, content_side: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def picture(side: int) -> Tensor:
            return torch.rand(3, side, side, generator=generator)

        content, style, target = picture(content_side), picture(content_side), picture(side)
        self.example = Example(id="0", prompt=PROMPTS[1], content_refs=(content,), style_refs=(style,), target=target)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Example:
        return self.example


class Latest:
    """A reporter that keeps nothing."""

    def step(self, report: StepReport) -> None:
        pass


def make_policy(scale: Scale, device: torch.device, dtype: torch.dtype) -> UsoPolicy:
    """A policy of random weights on a device; the LoRA's `up` is not 0, so that all its gradients can be seen."""
    torch.manual_seed(0)
    with torch.device(device):
        parts = shapes.make_parts(scale.configs, dtype=dtype)
        assert parts.siglip is not None
        vision = parts.siglip.config
        projector = StyleProjector(
            num_tokens=(vision.image_size // vision.patch_size) ** 2,
            token_dim=vision.hidden_size,
            tokens_per_level=scale.style_tokens_per_level,
            hidden_size=parts.transformer.inner_dim,
        )
        policy = UsoPolicy(
            parts,
            projector,
            lora_rank=scale.rank,
            content_long_side=scale.content_side,
            max_text_tokens=scale.text_tokens,
        )
    policy.cast_frozen(dtype)
    policy.to(device)
    with torch.no_grad():
        for name, parameter in official.lora_parameters(policy.transformer).items():
            if ".lora_B." in name:
                parameter.normal_(std=0.01)
    remember_prompts(policy, scale)
    return policy


def remember_prompts(policy: UsoPolicy, scale: Scale) -> None:
    """Random text encodings."""
    transformer = policy.transformer.config
    for number, prompt in enumerate(PROMPTS):
        generator = torch.Generator().manual_seed(number)
        states_TD = torch.randn(scale.text_tokens, transformer.joint_attention_dim, generator=generator)
        pooled_Q = torch.randn(transformer.pooled_projection_dim, generator=generator)
        dtype = policy.transformer.x_embedder.weight.dtype
        policy.encoder.remember_text(prompt, states_TD.to(dtype), pooled_Q.to(dtype))


def make_trainer(policy: UsoPolicy, scale: Scale, side: int, folder: Path) -> Trainer:
    """The trainer of the flux-dev flavor, at one size of pictures."""
    objective = Objective(
        ObjectiveConfig.model_validate({"rewards": {"style": {"use": "csd"}}}),
        {"style": CsdReward(CsdModel(scale.csd))},
    ).to(policy.device)
    rollout = RolloutConfig.model_validate(
        {
            "image_size": (side, side),
            "num_steps": NUM_STEPS,
            "window": {"kind": "refl", "entry_range": (ENTRY_STEP, ENTRY_STEP)},
        }
    )
    config = TrainConfig(num_steps=1000, precision="bf16", gradient_checkpointing=True, checkpoint_every=0)
    policy.enable_checkpointing()
    learner = Learner(policy, objective, optimizer=OptimizerConfig(), window=rollout.window, precision=config.precision)
    return Trainer(
        learner,
        InlinePool(RolloutWorker(policy, precision=config.precision)),
        Pictures(side, scale.content_side),
        rollout=rollout,
        config=config,
        seed=0,
        folder=folder,
        reporter=Latest(),
    )


# -- checks ------------------------------------------------------------------------------------------------------
