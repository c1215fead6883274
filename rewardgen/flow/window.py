"""The gradient window: which denoising steps carry gradient, and the clean latents they lead to.

A step is named by its index: step i goes from `sigmas_T[i]` to `sigmas_T[i + 1]`. The entry step is the first
step of the window, hence also the number of steps taken without gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from rewardgen.flow.sampling import clean_estimate, sample
from rewardgen.settings import Settings
from rewardgen.transfer import to_device
from rewardgen.types import Trajectory, VelocityFn

_FIELD_OF_KIND = {"refl": "entry_range", "draft": "k", "alignprop": "k_range", "full": None}


class WindowConfig(Settings):
    """Which steps carry gradient."""

    kind: Literal["refl", "draft", "alignprop", "full"] = "refl"
    """`refl`: one late step, then the clean estimate (ReFL, USO's SRL, UMO's ReReFL). `draft`: the last k steps
    (DRaFT-K). `alignprop`: the last k steps with k drawn at random (AlignProp). `full`: all steps."""
    entry_range: tuple[int, int] | None = None
    """For `refl`: first and last entry step (0-based), drawn uniformly, both ends included.
    UMO: the last 10 of 25 steps, that is [15, 24]. USO does not report its range."""
    k: int | None = None
    """For `draft`: number of steps with gradient."""
    k_range: tuple[int, int] | None = None
    """For `alignprop`: least and greatest number of steps with gradient, drawn uniformly, both ends included."""
    checkpoint_steps: bool = False
    """Recompute each step of a chained window in the backward pass: memory of one step, time of one more forward.
    Without effect on `refl`, whose window is a single step."""

    @model_validator(mode="after")
    def _fields_match_kind(self) -> Self:
        wanted = _FIELD_OF_KIND[self.kind]
        for name in ("entry_range", "k", "k_range"):
            given = getattr(self, name)
            if name == wanted and given is None:
                raise ValueError(f"a window of kind '{self.kind}' needs '{name}'")
            if name != wanted and given is not None:
                raise ValueError(f"'{name}' does not belong to a window of kind '{self.kind}'; remove it")
        for name, value, least in (("entry_range", self.entry_range, 0), ("k_range", self.k_range, 1)):
            if value is not None and not least <= value[0] <= value[1]:
                raise ValueError(f"{name} must be [low, high] with {least} <= low <= high, got {list(value)}")
        if self.k is not None and self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")
        return self

    def entry_bounds(self, num_steps: int) -> tuple[int, int]:
        """First and last possible entry step, both included.

        Raises:
            ValueError: the window does not fit into `num_steps` steps.
        """
        if self.kind == "refl" and self.entry_range is not None:
            low, high = self.entry_range
            if high >= num_steps:
                raise ValueError(
                    f"entry_range ends at step {high}, but the last of {num_steps} steps is {num_steps - 1}"
                )
            return low, high
        k_low, k_high = self.k_range or (self.k or num_steps, self.k or num_steps)
        if k_high > num_steps:
            raise ValueError(f"the window is {k_high} steps long, but there are only {num_steps} steps")
        return num_steps - k_high, num_steps - k_low


def draw_entry(window: WindowConfig, num_steps: int, seed: int) -> int:
    """Draw the entry step, uniformly over the window's bounds, from `seed` alone."""
    low, high = window.entry_bounds(num_steps)
    return int(torch.randint(low, high + 1, (), generator=torch.Generator().manual_seed(seed)))


def draw_entries(window: WindowConfig, num_steps: int, seeds: Sequence[int]) -> tuple[int, ...]:
    """Draw one entry step for each seed, all different, in the order of the seeds.

    The first is `draw_entry`'s. Each further one is uniform over those that are left.

    Raises:
        ValueError: fewer entry steps than seeds.
    """
    low, high = window.entry_bounds(num_steps)
    if high - low + 1 < len(seeds):
        raise ValueError(f"{len(seeds)} entry steps are asked for, but the window has only {high - low + 1}")
    left = list(range(low, high + 1))
    drawn = []
    for seed in seeds:
        drawn.append(left.pop(int(torch.randint(0, len(left), (), generator=torch.Generator().manual_seed(seed)))))
    return tuple(drawn)


def by_entry(trajectory: Trajectory) -> Iterator[Trajectory]:
    """A trajectory for each state that a prefix kept, entered there; without kept states the trajectory itself."""
    if trajectory.steps_SBLC is None:
        yield trajectory
        return
    for entry, state_BLC in zip(trajectory.kept_steps, trajectory.steps_SBLC, strict=True):
        yield dataclasses.replace(trajectory, entry_step=entry, entry_BLC=state_BLC, steps_SBLC=None, kept_steps=())


def run_window(velocity: VelocityFn, trajectory: Trajectory, window: WindowConfig, *, enable_grad: bool) -> Tensor:
    """Go from the entry state to clean latents [B, L, C], with gradient in the velocity's weights.

    `refl` makes one forward at the entry step and takes the clean estimate; gradient flows through that forward only,
    never through the state (USO section 3, UMO's ReReFL). The other kinds chain Euler steps to time 0; with the
    weights that drew the trajectory the result equals a full rollout's, bit for bit.
    """
    entry, x_BLC = trajectory.entry_step, trajectory.entry_BLC
    if window.kind != "refl":
        return sample(
            velocity,
            x_BLC,
            trajectory.sigmas_T,
            start=entry,
            stop=trajectory.num_steps,
            enable_grad=enable_grad,
            checkpoint_steps=window.checkpoint_steps,
        )
    t = to_device(trajectory.sigmas_T[entry], x_BLC.device)
    with torch.set_grad_enabled(enable_grad):
        return clean_estimate(x_BLC, velocity(x_BLC, t.expand(len(x_BLC))), t)
