"""Learning from scored samples where a reward has no gradient: settings, and the losses as pure functions.

`grpo` (Flow-GRPO 2505.05470; with a window MixGRPO 2507.21802): samples come from noisy steps; each is made more or
less likely by its advantage, step by step. `nft` (DiffusionNFT 2509.16117): samples come from any sampler; clean
pictures are noised anew, and the velocity is drawn toward good ones and away from bad ones.

Names follow TRL's `GRPOConfig`; its `reward_weights` are the `weight`s of `objective.rewards`.
Shape suffixes: B batch, L latent tokens, C channels per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import torch
from pydantic import Field, field_validator
from torch import Tensor

from rewardgen.flow.advantage import Scale
from rewardgen.flow.stochastic import StochasticWindow
from rewardgen.settings import Settings

POLICY_GRADIENT = "policy_gradient"
"""The term's name in losses, gradients and reports."""
_SMALLEST_WEIGHT = 1e-5
"""Below it an error no longer lowers its own weight (the release of DiffusionNFT)."""


class SamplesConfig(Settings):
    """What both ways of learning from samples share."""

    hints: ClassVar[Mapping[str, str]] = {
        "reward_weights": " Each reward has its own weight: objective.rewards.NAME.weight."
    }
    """What to say of keys that are not here but in TRL's `GRPOConfig`."""

    weight: float = Field(default=1.0, gt=0)
    """The term's weight in the loss, beside flow matching and rewards with a gradient."""
    num_generations: int = Field(default=8, ge=2)
    """Samples drawn for each example of the batch: they are one group, compared with each other alone."""
    num_iterations: int = Field(default=1, ge=1)
    """Updates on the same samples. In each of them every other active term takes part too."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the divergence from the policy that the run began with; 0 neither computes nor keeps that policy."""
    scale_rewards: Scale = "group"
    """Advantages are divided by the standard deviation of the group, of all samples of the step (`batch`), or by
    nothing (`none`). As in TRL, true stands for `group` and false for `none`."""
    advantage_clip: float = Field(default=5.0, gt=0)
    """Largest absolute advantage (5 in the releases of both methods)."""

    @field_validator("scale_rewards", mode="before")
    @classmethod
    def _trl_booleans(cls, given: Any) -> Any:
        return {True: "group", False: "none"}[given] if isinstance(given, bool) else given


class GrpoConfig(SamplesConfig):
    """Flow-GRPO; with a window of noisy steps MixGRPO."""

    kind: Literal["grpo"]
    """`grpo`."""
    epsilon: float = Field(default=1e-4, gt=0)
    """The ratio of likelihoods is clipped to [1 - epsilon, 1 + epsilon]. It is taken per element of the latents, so
    that it stays close to 1: Flow-GRPO's release has 1e-4, where TRL has 0.2 for a word."""
    noise_level: float = Field(default=0.7, gt=0)
    """How noisy the noisy steps are (`a` in Flow-GRPO, 0.7 there)."""
    window: StochasticWindow | None = None
    """Which steps are noisy, and so are learned from; null: all but the last (Flow-GRPO)."""
    same_noise: bool = False
    """The samples of a group begin with the same noise and differ by their noisy steps alone (MixGRPO)."""

    def check(self, num_steps: int) -> None:
        """Raise ValueError where no noisy step, or not the whole window, fits into `num_steps` steps."""
        (self.window or StochasticWindow(size=max(1, num_steps - 1))).bounds(num_steps)


class NftConfig(SamplesConfig):
    """DiffusionNFT. The policy that draws is the one before the step's first update (the release can keep an older)."""

    kind: Literal["nft"]
    """`nft`."""
    nft_beta: float = Field(default=1.0, gt=0)
    """The paper's beta: the implicit policies stand at `old +- beta (trained - old)`. Smaller moves further."""
    times_per_sample: int = Field(default=2, ge=1)
    """Times at which a sample is noised anew, drawn from the flow-matching grid (the release takes the times of its
    sampler). Each costs a forward and a backward pass."""
    adaptive: bool = True
    """Errors of the clean estimate, each divided by its own size, as in the release; false: squared errors of the
    velocity, as in the paper's equation."""

    def check(self, num_steps: int) -> None:
        """Any number of steps will do: no step is noisy."""


PolicyGradientConfig: TypeAlias = Annotated[GrpoConfig | NftConfig, Field(discriminator="kind")]


def clipped_loss(log_ratio_B: Tensor, advantage_B: Tensor, epsilon: float) -> Tensor:
    """`-min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon) A)` for each sample [B] (PPO, GRPO)."""
    ratio_B = log_ratio_B.exp()
    return -torch.minimum(ratio_B * advantage_B, ratio_B.clamp(1 - epsilon, 1 + epsilon) * advantage_B)


def nft_loss(
    v_BLC: Tensor,
    old_BLC: Tensor,
    target_BLC: Tensor,
    t_B: Tensor,
    advantage_B: Tensor,
    *,
    nft_beta: float,
    advantage_clip: float,
    adaptive: bool,
) -> Tensor:
    """DiffusionNFT's loss for each sample [B], times `advantage_clip / nft_beta` as in its release.

        r (v_plus - target)^2 + (1 - r) (v_minus - target)^2,    v_plus, v_minus = old +- nft_beta (v - old)

    with `r = 1/2 + A / (2 advantage_clip)`. The factor makes its gradient at `v = old` that of `A (v - target)^2`,
    whatever `nft_beta` and `advantage_clip` are. With `adaptive` the errors are those of the clean estimate,
    `t (v_plus - target)`, and each square is divided by the mean absolute error of its sample (no gradient in that).

    Args:
        v_BLC: velocity of the trained policy at the noised sample; the others are taken without gradient.
        old_BLC: velocity there of the policy that drew the sample.
        target_BLC: noise minus clean sample.
        t_B: the times.
        advantage_B: in [-advantage_clip, advantage_clip].
    """
    old_BLC, target_BLC = old_BLC.detach(), target_BLC.detach()
    r_B = (0.5 + advantage_B / (2 * advantage_clip)).to(v_BLC.dtype)
    step_BLC = nft_beta * (v_BLC - old_BLC)
    losses = []
    for error_BLC in (old_BLC + step_BLC - target_BLC, old_BLC - step_BLC - target_BLC):
        if adaptive:
            error_BLC = t_B.to(error_BLC)[:, None, None] * error_BLC
            size_B = error_BLC.detach().abs().mean(dim=(1, 2)).clamp(min=_SMALLEST_WEIGHT)
            losses.append(error_BLC.square().mean(dim=(1, 2)) / size_B)
        else:
            losses.append(error_BLC.square().mean(dim=(1, 2)))
    return (r_B * losses[0] + (1 - r_B) * losses[1]) * (advantage_clip / nft_beta)
