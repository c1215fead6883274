"""The reward contract, the one way the engine calls a reward, and `check_reward` for authors of new ones."""

from __future__ import annotations

import dataclasses
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor, nn

from rewardgen.errors import ScoringError
from rewardgen.types import Begun, Example, Score


class RewardWarning(UserWarning):
    """A reward could not score and masked what it was asked for. `check_reward` takes it for a fault."""


class Reward(nn.Module, ABC):
    """Scores pictures; higher is better.

    A subclass sets `differentiable` and implements `score`. Weights it holds are frozen by the engine. A class method
    `check_arguments` refuses values before anything is loaded (`rewardgen.arguments`).
    """

    differentiable: ClassVar[bool]
    """Whether `score` carries gradient from the value back to the pixels."""
    operational: ClassVar[frozenset[str]] = frozenset()
    """Arguments that say how scores are come by and not what they are, such as a server's address: a run may be resumed
    with others."""

    @abstractmethod
    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        """Score pictures in [0, 1] (values may stray slightly outside: clamp where it matters).

        Returns a `Score` whose `valid_B` is False for examples the reward does not apply to.
        """

    def begin(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Begun[Score]:
        """Start to score finished pictures, for rewards that mostly wait: for the answers of a service, say.

        The engine begins with batch after batch, and draws the next pictures, before it waits for the first scores; all
        in one thread and in a fixed order. What waits meanwhile is the reward's own affair: threads of its own, or an
        event loop. Scores must be those of `score` (which is then `self.begin(...).finish()`), and nothing may be drawn
        from the global generators once this has returned.

        Here nothing waits: `score` is called at once.
        """
        found = self.score(pixels_B3HW, examples)
        return Begun(lambda: found)

    def give_up(self) -> None:
        """Nobody waits any more for what was begun: the run has ended, perhaps by an error. More may be begun later."""


def score(reward: Reward, pixels_B3HW: Tensor, examples: Sequence[Example], *, enable_grad: bool) -> Score:
    """Call a reward: the gradient mode is an argument, shapes are checked, non-finite values are masked.

    Raises:
        ScoringError: the reward broke its contract (wrong shape, or a gradient that was promised is missing).
    """
    with torch.set_grad_enabled(enable_grad):
        result = reward.score(pixels_B3HW, examples)
    masked = _masked(reward, result, len(examples))
    if enable_grad and pixels_B3HW.requires_grad and not result.value_B.requires_grad and bool(result.valid_B.any()):
        raise ScoringError(
            f"{type(reward).__name__} is used with a gradient but its value does not depend on the pixels"
        )
    return masked


def begin_score(reward: Reward, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Begun[Score]:
    """As `score`, without gradient and without waiting: `finish` of what is returned gives the score, or raises."""
    batch = len(examples)
    with torch.no_grad():
        begun = reward.begin(pixels_B3HW, examples)

    def finish() -> Score:
        with torch.no_grad():
            return _masked(reward, begun.finish(), batch)

    return Begun(finish)


def _masked(reward: Reward, result: Score, batch: int) -> Score:
    """A score of the right shape, with non-finite values masked."""
    for label, tensor in (("value_B", result.value_B), ("valid_B", result.valid_B)):
        if tuple(tensor.shape) != (batch,):
            found = f"{label} of shape {tuple(tensor.shape)}"
            raise ScoringError(f"{type(reward).__name__}.score returned {found}; expected ({batch},)")
    finite_B = torch.isfinite(result.value_B.detach())
    valid_B = result.valid_B.to(device=finite_B.device, dtype=torch.bool) & finite_B
    return dataclasses.replace(result, valid_B=valid_B)


CHECK_TOLERANCE = 1e-5
"""Largest difference `check_reward` allows between values that should be equal, relative above 1."""


def check_reward(
    reward: Reward, *, image_size: tuple[int, int] = (64, 64), examples: Sequence[Example] | None = None, seed: int = 0
) -> tuple[str, ...]:
    """Check that a reward keeps the contract the engine relies on.

    Scores random pictures on the device of the reward's weights, about ten calls in all (mind a paid judge). Checked:
    shapes, types and devices; finite values, also for pixels slightly outside [0, 1]; that inputs are left alone; that
    a picture's score depends on that picture and its example alone, not on chance, order or batch; and the gradient:
    there for every picture if `differentiable`, never there otherwise or when it is not asked for.

    Args:
        reward: the reward, in evaluation mode.
        image_size: (height, width) in pixels of the pictures to score.
        examples: at least two, which the reward applies to. Default: three with a prompt, a target and random
            pictures as content, style and identity references.
        seed: of the random pictures.

    Returns:
        What was found to hold, one line each.

    Raises:
        ScoringError: the first broken promise, in one sentence.
    """
    if not isinstance(reward, Reward):
        raise ScoringError(f"{type(reward).__name__} is no subclass of rewardgen.reward.Reward")
    name = type(reward).__name__
    if not isinstance(getattr(reward, "differentiable", None), bool):
        raise ScoringError(f"{name} does not say `differentiable = True` or `differentiable = False`")
    rng = torch.Generator().manual_seed(seed)
    examples = _random_examples(rng) if examples is None else list(examples)
    if len(examples) < 2:
        raise ScoringError(f"check_reward needs at least two examples for {name}, got {len(examples)}")
    device = next((tensor.device for tensor in chain(reward.parameters(), reward.buffers())), torch.device("cpu"))
    # Pictures of plain noise are all equally bright: who normalises over the batch would hardly show.
    exponents_B = torch.linspace(0.5, 2, len(examples))
    pixels = (torch.rand(len(examples), 3, *image_size, generator=rng) ** exponents_B[:, None, None, None]).to(device)

    with warnings.catch_warnings():
        warnings.simplefilter("error", RewardWarning)
        first = _score_keeping_inputs(reward, pixels, examples)
        if not bool(first.valid_B.any()):
            raise ScoringError(f"{name} finds no example valid; pass examples= that it applies to")
        _checked_score(reward, 1.1 * pixels - 0.05, examples)
        _check_independence(reward, pixels, examples, first)
        _check_gradient(reward, pixels, examples, first)
        if begins := type(reward).begin is not Reward.begin:
            _check_begun(reward, pixels, examples, first)
    gradient = "finite, and not zero for any valid picture" if reward.differentiable else "none, as it says"
    return (
        f"scores {len(examples)} pictures of {image_size[0]}x{image_size[1]}, {int(first.valid_B.sum())} of them valid",
        "one floating-point value and one bool for each picture, on the pictures' device",
        "values are finite, also for pixels slightly outside [0, 1]",
        "pictures and references are left alone",
        "a picture's score is the same the second time, in another order and alone",
        f"gradient: {gradient}",
        *(["begun with others, a picture's score is the same"] if begins else []),
    )


def _random_examples(rng: torch.Generator) -> list[Example]:
    def picture(height: int, width: int) -> Tensor:
        return torch.rand(3, height, width, generator=rng)

    # Not of the pictures' size, and not of one size: references come as the user's files do.
    return [
        Example(
            id=f"check-{index}",
            prompt=f"a picture of {thing}",
            content_refs=(picture(48, 80),),
            style_refs=tuple(picture(72, 56) for _ in range(1 + index % 2)),
            identity_refs=(picture(64, 64), picture(80, 64)),
            target=picture(64, 64),
        )
        for index, thing in enumerate(("a lighthouse", "two friends", "a bowl of plums"))
    ]


def _checked_score(reward: Reward, pixels: Tensor, examples: Sequence[Example], *, enable_grad: bool = False) -> Score:
    """Call `score` and check all that can be seen in one result."""
    name, batch = type(reward).__name__, len(examples)
    try:
        with torch.set_grad_enabled(enable_grad):
            result = reward.score(pixels, examples)
    except ScoringError:
        raise
    except RewardWarning as warning:
        raise ScoringError(str(warning)) from warning
    except Exception as error:
        raise ScoringError(f"{name}.score raised {type(error).__name__}: {error}") from error
    if not isinstance(result, Score):
        raise ScoringError(f"{name}.score returned {type(result).__name__}; expected a Score")
    for label, tensor in (("value_B", result.value_B), ("valid_B", result.valid_B)):
        if _shape(tensor) != (batch,):
            raise ScoringError(f"{name}.score returned {label} of shape {_shape(tensor)}; expected ({batch},)")
        if tensor.device != pixels.device:
            raise ScoringError(f"{name}.score returned {label} on {tensor.device}; the pictures are on {pixels.device}")
    if not result.value_B.is_floating_point():
        raise ScoringError(f"{name}.score returned value_B of {result.value_B.dtype}; expected a floating-point type")
    if result.valid_B.dtype != torch.bool:
        raise ScoringError(f"{name}.score returned valid_B of {result.valid_B.dtype}; expected torch.bool")
    if not bool(torch.isfinite(result.value_B[result.valid_B]).all()):
        raise ScoringError(f"{name}.score returned a value that is not finite and called it valid")
    if not enable_grad and result.value_B.requires_grad:
        raise ScoringError(f"{name}.score turned gradients on by itself; leave the gradient mode to the caller")
    return result


def _score_keeping_inputs(reward: Reward, pixels: Tensor, examples: Sequence[Example]) -> Score:
    """Score for the first time: many changes in place change nothing more the second time."""
    inputs = {"the pictures": pixels}
    for example in examples:
        for field in dataclasses.fields(example):
            value = getattr(example, field.name)
            for index, tensor in enumerate(value if isinstance(value, tuple) else (value,)):
                if isinstance(tensor, Tensor):
                    inputs[f"{field.name}[{index}] of example '{example.id}'"] = tensor
    before = {label: tensor.clone() for label, tensor in inputs.items()}
    result = _checked_score(reward, pixels, examples)
    for label, tensor in inputs.items():
        if not torch.equal(tensor, before[label]):
            raise ScoringError(f"{type(reward).__name__}.score changed {label} in place; work on a copy")
    return result


def _check_independence(reward: Reward, pixels: Tensor, examples: Sequence[Example], first: Score) -> None:
    """Each score must depend on its own picture and example only."""
    name = type(reward).__name__
    _expect_same(
        first,
        _checked_score(reward, pixels, examples),
        f"{name} gives the same pictures another score the second time; use no chance and no state, and call"
        " .eval() on a network with dropout",
    )
    order = list(reversed(range(len(examples))))
    turned = _checked_score(reward, pixels[order], [examples[i] for i in order])
    _expect_same(
        first,
        Score(value_B=turned.value_B[order], valid_B=turned.valid_B[order]),
        f"{name}'s score depends on the order of the batch; score each picture by its own example",
    )
    alone = [_checked_score(reward, pixels[i : i + 1], [example]) for i, example in enumerate(examples)]
    _expect_same(
        first,
        Score(value_B=torch.cat([s.value_B for s in alone]), valid_B=torch.cat([s.valid_B for s in alone])),
        f"{name}'s score of a picture depends on the other pictures of its batch; normalise nothing over the batch,"
        " and call .eval() on a network with batch normalisation",
    )


def _check_begun(reward: Reward, pixels: Tensor, examples: Sequence[Example], first: Score) -> None:
    """What is begun before another is finished must come to what `score` says."""
    begun = [begin_score(reward, pixels[i : i + 1], [example]) for i, example in enumerate(examples)]
    found = [part.finish() for part in begun]
    _expect_same(
        first,
        Score(value_B=torch.cat([s.value_B for s in found]), valid_B=torch.cat([s.valid_B for s in found])),
        f"{type(reward).__name__}: of several pictures that are begun (`begin`) one gets another score than by `score`",
    )


def _check_gradient(reward: Reward, pixels: Tensor, examples: Sequence[Example], first: Score) -> None:
    name = type(reward).__name__
    pixels = pixels.clone().requires_grad_()
    _checked_score(reward, pixels, examples)
    result = _checked_score(reward, pixels, examples, enable_grad=True)
    _expect_same(first, result, f"{name}'s score changes when a gradient is asked for")
    if not reward.differentiable:
        if result.value_B.requires_grad:
            raise ScoringError(
                f"{name} returns a value with a gradient; say `differentiable = True`, or detach the value"
            )
        return
    promise = f"{name} promises a gradient (`differentiable = True`)"
    if not result.value_B.requires_grad:
        raise ScoringError(f"{promise} but its value does not depend on the pixels")
    (grad,) = torch.autograd.grad(result.value_B[result.valid_B].sum(), pixels, allow_unused=True)
    if grad is None:
        raise ScoringError(f"{promise} but its value does not depend on the pixels")
    if not bool(torch.isfinite(grad).all()):
        raise ScoringError(f"{promise} but the gradient is not finite")
    if bool((grad[result.valid_B].flatten(1) == 0).all(1).any()):
        raise ScoringError(f"{promise} but the gradient is zero; rounding, argmax or numpy on the way stops it")


def _expect_same(expected: Score, got: Score, complaint: str) -> None:
    valid = expected.valid_B
    if not torch.equal(valid, got.valid_B):
        raise ScoringError(f"{complaint} (valid {valid.tolist()}, then {got.valid_B.tolist()})")
    a, b = expected.value_B.detach()[valid].double(), got.value_B.detach()[valid].double()
    if bool(((a - b).abs() > CHECK_TOLERANCE * a.abs().clamp(min=1)).any()):
        raise ScoringError(f"{complaint} ({_shown(a)}, then {_shown(b)})")


def _shape(value: object) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, Tensor) else f"{type(value).__name__} (no tensor)"


def _shown(values: Tensor) -> str:
    return "[" + ", ".join(f"{value:.6g}" for value in values.tolist()) + "]"
