"""Every value that crosses from one room to another.

Shape suffixes: B batch, L latent tokens, C latent channels per token, T denoising steps, S stochastic steps among
them, H and W pixels.
Pictures are float tensors in RGB and [0, 1] unless a docstring says otherwise. Times are flow-matching
times: 1 is pure noise, 0 is the clean picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar

from torch import Tensor

T = TypeVar("T")

VelocityFn: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""`(latents_BLC, t_B) -> velocity_BLC`, where velocity = noise - clean."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One training or evaluation item.

    Args:
        id: unique and stable; seeds and caches derive from it.
        prompt: text given to the policy, may be empty.
        content_refs: pictures [3, H, W] in [0, 1] whose subject or layout should be kept.
        style_refs: pictures [3, H, W] in [0, 1] whose look should be taken over.
        identity_refs: pictures [3, H, W] in [0, 1] of people who should appear.
        target: picture [3, H, W] in [0, 1] for the flow-matching loss; None where there is none.
        correspondences: per content reference, pairs of (reference token, target token) indices.
        extras: further columns of the dataset, passed to plain-function rewards and witnesses.
    """

    id: str
    prompt: str = ""
    content_refs: tuple[Tensor, ...] = ()
    style_refs: tuple[Tensor, ...] = ()
    identity_refs: tuple[Tensor, ...] = ()
    target: Tensor | None = None
    correspondences: tuple[Tensor, ...] = ()
    extras: Mapping[str, Any] = field(default_factory=dict)


class Condition:
    """What a policy made of a batch of examples. Owned by the policy and opaque to everyone else.

    A policy subclasses it; the engine only hands it back and asks for its length (the batch size B).
    """

    __slots__ = ()

    def __len__(self) -> int:
        raise TypeError(f"{type(self).__name__} must define __len__ as its batch size")


@dataclass(frozen=True, kw_only=True, slots=True)
class Stochastic:
    """Which denoising steps draw noise of their own, and how much; the others follow the ODE.

    Args:
        steps: indices of the noisy steps, one after the other and never the last of the schedule.
        noise_level: how noisy, see `flow.stochastic.kernel`.
        seed_B: one seed per sample; the noise of a step derives from it and from the step's index.
    """

    steps: tuple[int, ...]
    noise_level: float
    seed_B: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Trajectory:
    """A sampled prefix, detached.

    Args:
        sigmas_T: [T+1] times from 1 to 0 (T steps).
        entry_step: index of the first step that was *not* taken: the state below is at `sigmas_T[entry_step]`.
        entry_BLC: latents at the entry step.
        seed_B: the seed of each sample's initial noise.
        stochastic: the steps that drew noise of their own, None where all followed the ODE.
        steps_SBLC: stored states when asked for, else None: those before `kept_steps`, or, of stochastic steps,
            [S + 1, B, L, C] from before the first to after the last.
        kept_steps: the steps that those states stand before, in their order; none with stochastic steps.
        log_prob_BS: float64, log-density of each stochastic step under the weights that drew it, else None.
    """

    sigmas_T: Tensor
    entry_step: int
    entry_BLC: Tensor
    seed_B: tuple[int, ...]
    stochastic: Stochastic | None = None
    steps_SBLC: Tensor | None = None
    kept_steps: tuple[int, ...] = ()
    log_prob_BS: Tensor | None = None

    @property
    def num_steps(self) -> int:
        return int(self.sigmas_T.numel()) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One reward's opinion of a batch.

    Args:
        value_B: float [B]; the value where `valid_B` is False carries no meaning and is never used.
        valid_B: bool [B]; False is "not applicable or failed": masked and counted, never 0.
        metrics: extra scalars worth logging, means over the valid examples: over several batches they are averaged by
            the number of these. A scalar tensor stays on its device until the values are read.
        counts: extra numbers worth logging that add up over batches, such as failures by kind.
    """

    value_B: Tensor
    valid_B: Tensor
    metrics: Mapping[str, float | Tensor] = field(default_factory=dict)
    counts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Begun(Generic[T]):
    """A result that is on its way. `finish` waits for it; it is called once at most, in the thread that began it."""

    finish: Callable[[], T]


@dataclass(frozen=True, kw_only=True, slots=True)
class FaceMatches:
    """Which face of one picture belongs to which reference face, for the eye; from rewards that `explain`.

    Args:
        boxes_N4: faces of the picture, corners (x1, y1, x2, y2) in its pixels.
        cosine_MN: similarity of each reference face with each of them.
        matched_MN: bool, the pairs that belong together, at most one in each row and column.
        reference_M: which identity reference each reference face is from.
        reference_boxes_M4: where in it.
        faceless: identity references in which no face was found.
    """

    boxes_N4: Tensor
    cosine_MN: Tensor
    matched_MN: Tensor
    reference_M: tuple[int, ...]
    reference_boxes_M4: Tensor
    faceless: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutRequest:
    """Everything a rollout depends on besides the weights; the micro-batch is part of it.

    Args:
        step: training step the rollout belongs to.
        examples: the micro-batch.
        seed_B: one noise seed per example.
        image_size: (height, width) in pixels of the pictures to draw.
        num_steps: denoising steps T of the whole schedule.
        stop_step: steps to take without gradient; T draws the whole picture.
        decode: also decode the final latents into pixels (needs `stop_step == num_steps`).
        eight_bit: round these pixels to k / 255 in float32, as they would be in a file.
        stochastic: steps that draw noise of their own; all of them must lie before `stop_step`.
        group_B: group of each example, see `Rollout`.
        keep_steps: keep the states before these steps too, each at most `stop_step`; not with stochastic steps.
    """

    step: int
    examples: Sequence[Example]
    seed_B: tuple[int, ...]
    image_size: tuple[int, int]
    num_steps: int
    stop_step: int
    decode: bool = False
    eight_bit: bool = False
    stochastic: Stochastic | None = None
    group_B: tuple[int, ...] = ()
    keep_steps: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """What a rollout worker returns, all of it detached.

    Args:
        examples: as in the request.
        trajectory: the sampled prefix.
        policy_version: version of the weights that drew it.
        pixels_B3HW: pictures in [0, 1] where they were asked for.
        scores: scores of rewards that need no gradient, by term name.
        group_B: group of each sample (same example, several seeds), for group-relative advantages: the example's
            place in the batch of all processes.
    """

    examples: Sequence[Example]
    trajectory: Trajectory
    policy_version: int
    pixels_B3HW: Tensor | None = None
    scores: Mapping[str, Score] = field(default_factory=dict)
    group_B: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """A loss and its parts: `total` is the scalar to minimise, `terms` the weighted parts it sums."""

    total: Tensor
    terms: Mapping[str, Tensor]
    grad_norms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What one training step has to say. All times are seconds, memory is bytes."""

    step: int
    policy_version: int
    loss: float
    terms: Mapping[str, float]
    reward_means: Mapping[str, float]
    valid_counts: Mapping[str, int]
    grad_norm: float
    grad_norms: Mapping[str, float]
    lr: float
    entry_step: int | None
    skipped: bool
    seconds_by_phase: Mapping[str, float]
    peak_memory_bytes: int
    metrics: Mapping[str, float] = field(default_factory=dict)
