"""The one way the engine calls a reward, and `check_reward` on rewards that each break one promise."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rewardgen.errors import ScoringError
from rewardgen.reward import Reward, RewardWarning, check_reward, score
from rewardgen.types import Example, Score

EXAMPLES = [Example(id="a"), Example(id="b")]


def all_valid(value_B: Tensor) -> Score:
    return Score(value_B=value_B, valid_B=torch.ones(len(value_B), dtype=torch.bool))


class Sound(Reward):
    """Mean of the pixels, and the base of every reward below."""

    differentiable = True

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        return all_valid(self.value(pixels_B3HW))

    def value(self, pixels: Tensor) -> Tensor:
        return pixels.mean((1, 2, 3))


class SoundWithoutGradient(Sound):
    differentiable = False

    def value(self, pixels):
        return pixels.detach().mean((1, 2, 3))


class OnlyWithStyle(Sound):
    def score(self, pixels_B3HW, examples):
        valid = torch.tensor([bool(example.style_refs) for example in examples])
        return replace(super().score(pixels_B3HW, examples), valid_B=valid)


class Undeclared(Reward):
    def score(self, pixels_B3HW, examples):
        return all_valid(pixels_B3HW.mean((1, 2, 3)))


class Raises(Sound):
    def value(self, pixels):
        raise KeyError("no_such_column")


class Masks(Sound):
    """Masks what it failed to score, and says so."""

    def score(self, pixels_B3HW, examples):
        warnings.warn("the judge did not answer", RewardWarning, stacklevel=1)
        return replace(super().score(pixels_B3HW, examples), valid_B=torch.zeros(len(examples), dtype=torch.bool))


class NoScore(Sound):
    def score(self, pixels_B3HW, examples):
        return self.value(pixels_B3HW)


class ValuePerPixel(Sound):
    def value(self, pixels):
        return pixels.mean(1)


class OneValueForAll(Sound):
    def value(self, pixels):
        return pixels.mean()[None]


class ValidPerColumn(Sound):
    def score(self, pixels_B3HW, examples):
        return replace(super().score(pixels_B3HW, examples), valid_B=torch.ones(len(examples), 1, dtype=torch.bool))


class WholeNumbers(Sound):
    def value(self, pixels):
        return (255 * pixels.mean((1, 2, 3))).long()


class ValidAsFloat(Sound):
    def score(self, pixels_B3HW, examples):
        return replace(super().score(pixels_B3HW, examples), valid_B=torch.ones(len(examples)))


class OtherDevice(Sound):
    def value(self, pixels):
        return super().value(pixels).to("meta")


class NotFinite(Sound):
    def value(self, pixels):
        return super().value(pixels) / 0


class NotFiniteOutsideTheRange(Sound):
    def value(self, pixels):
        return pixels.sqrt().mean((1, 2, 3))


class NeverValid(Sound):
    def score(self, pixels_B3HW, examples):
        return replace(super().score(pixels_B3HW, examples), valid_B=torch.zeros(len(examples), dtype=torch.bool))


class ChangesPictures(SoundWithoutGradient):
    def value(self, pixels):
        return super().value(pixels.clamp_(0.2, 0.8))


class ChangesReferences(Sound):
    def score(self, pixels_B3HW, examples):
        for example in examples:
            example.style_refs[0].clamp_(0.2, 0.8)
        return super().score(pixels_B3HW, examples)


class Chance(Sound):
    def value(self, pixels):
        return super().value(pixels) + 1e-3 * torch.rand(len(pixels))


class Dropout(Sound):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def value(self, pixels):
        return super().value(self.dropout(pixels))


class RunningMean(Sound):
    seen = 0

    def value(self, pixels):
        self.seen += 1
        return super().value(pixels) / self.seen


class ByPlaceInBatch(Sound):
    def value(self, pixels):
        return super().value(pixels) + 0.01 * torch.arange(len(pixels))


class ExamplesMixedUp(Sound):
    """Judges every picture by the first example."""

    def score(self, pixels_B3HW, examples):
        reference = examples[0].style_refs[0].mean()
        return all_valid(super().value(pixels_B3HW) * reference)


class BatchNormalised(Sound):
    def value(self, pixels):
        return super().value(pixels) - super().value(pixels).mean()


class BatchCentred(Sound):
    """Compares with the batch's mean brightness, which is that of every picture where all are of plain noise."""

    def value(self, pixels):
        return -(pixels.mean(1) - pixels.mean()).square().mean((1, 2))


class ByBatchSize(Sound):
    def value(self, pixels):
        return pixels.sum((1, 2, 3)) / pixels.numel()


class ValidInCompanyOnly(Sound):
    def score(self, pixels_B3HW, examples):
        valid = torch.full((len(examples),), len(examples) > 1)
        return replace(super().score(pixels_B3HW, examples), valid_B=valid)


class Detached(Sound):
    def value(self, pixels):
        return super().value(pixels.detach())


class DependsOnWeightsOnly(Sound):
    """Its value carries a gradient, but to a parameter."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def value(self, pixels):
        return self.scale * super().value(pixels.detach())


class Rounded(Sound):
    def value(self, pixels):
        return super().value((pixels * 255).round() / 255)


class DeadForOnePicture(Sound):
    def value(self, pixels):
        value = super().value(pixels)
        return torch.where(value > value.detach().median(), value, value.detach())


class SteepGradient(Sound):
    def value(self, pixels):
        return (pixels - pixels.detach()).clamp(min=0).sqrt().mean((1, 2, 3)) + super().value(pixels)


class OtherValueWithGradient(Sound):
    def value(self, pixels):
        return super().value(pixels) * (2 if torch.is_grad_enabled() else 1)


class TurnsGradientsOn(Sound):
    def value(self, pixels):
        with torch.enable_grad():
            return super().value(pixels)


class UndeclaredGradient(Sound):
    differentiable = False


FAULTS: dict[type[Reward], str] = {
    Undeclared: "does not say `differentiable",
    Raises: "raised KeyError: 'no_such_column'",
    NoScore: "returned Tensor; expected a Score",
    ValuePerPixel: r"value_B of shape \(3, 64, 64\); expected \(3,\)",
    OneValueForAll: r"value_B of shape \(1,\); expected \(3,\)",
    ValidPerColumn: r"valid_B of shape \(3, 1\); expected \(3,\)",
    WholeNumbers: "value_B of torch.int64; expected a floating-point type",
    ValidAsFloat: "valid_B of torch.float32; expected torch.bool",
    OtherDevice: "value_B on meta; the pictures are on cpu",
    NotFinite: "a value that is not finite",
    NotFiniteOutsideTheRange: "a value that is not finite",
    NeverValid: "finds no example valid",
    ChangesPictures: "changed the pictures in place",
    ChangesReferences: r"changed style_refs\[0\] of example 'check-0' in place",
    Chance: "another score the second time",
    Dropout: "another score the second time",
    RunningMean: "another score the second time",
    ByPlaceInBatch: "depends on the order of the batch",
    ExamplesMixedUp: "depends on the order of the batch",
    BatchNormalised: "depends on the other pictures of its batch",
    BatchCentred: "depends on the other pictures of its batch",
    ByBatchSize: "depends on the other pictures of its batch",
    ValidInCompanyOnly: "depends on the other pictures of its batch",
    Detached: "does not depend on the pixels",
    DependsOnWeightsOnly: "does not depend on the pixels",
    Rounded: "the gradient is zero",
    DeadForOnePicture: "the gradient is zero",
    SteepGradient: "the gradient is not finite",
    OtherValueWithGradient: "changes when a gradient is asked for",
    TurnsGradientsOn: "turned gradients on by itself",
    UndeclaredGradient: "say `differentiable = True`, or detach",
}


class TestCheckReward:
    @pytest.mark.parametrize("make", [Sound, SoundWithoutGradient, OnlyWithStyle, lambda: Dropout().eval()])
    def test_sound_rewards_pass(self, make):
        held = check_reward(make())
        assert held[0] == "scores 3 pictures of 64x64, 3 of them valid"
        assert held[-1].startswith("gradient: finite" if make().differentiable else "gradient: none")

    def test_failures_that_a_run_would_count_are_faults_here(self):
        with pytest.warns(RewardWarning, match="did not answer"):
            assert not score(Masks(), torch.rand(2, 3, 4, 4), EXAMPLES, enable_grad=False).valid_B.any()
        with pytest.raises(ScoringError, match="the judge did not answer"):
            check_reward(Masks())

    @pytest.mark.parametrize("fault", FAULTS, ids=lambda cls: cls.__name__)
    def test_each_fault_is_caught_and_named(self, fault):
        with pytest.raises(ScoringError, match=FAULTS[fault]) as caught:
            check_reward(fault())
        assert str(caught.value).startswith(fault.__name__)
        assert "\n" not in str(caught.value)

    def test_examples_of_ones_own(self):
        styled = [replace(example, style_refs=(torch.rand(3, 8, 8),)) for example in EXAMPLES]
        check_reward(OnlyWithStyle(), examples=styled, image_size=(8, 24))
        with pytest.raises(ScoringError, match="finds no example valid"):
            check_reward(OnlyWithStyle(), examples=EXAMPLES)
        with pytest.raises(ScoringError, match="at least two examples"):
            check_reward(Sound(), examples=EXAMPLES[:1])

    def test_something_else_than_a_reward(self):
        with pytest.raises(ScoringError, match="function is no subclass"):
            check_reward(lambda pixels, examples: None)

    @pytest.mark.parametrize("seed", range(5))
    def test_partly_valid_batches_pass_whatever_the_seed(self, seed):
        styled = [Example(id="a", style_refs=(torch.rand(3, 8, 8),)), *EXAMPLES]
        check_reward(OnlyWithStyle(), examples=styled, seed=seed)

    def test_global_random_state_is_left_alone(self):
        before = torch.get_rng_state()
        check_reward(Sound())
        assert torch.equal(torch.get_rng_state(), before)


class Returns(Reward):
    differentiable = True

    def __init__(self, make: Callable[[Tensor], Score]) -> None:
        super().__init__()
        self.make = make

    def score(self, pixels_B3HW, examples):
        return self.make(pixels_B3HW)


class TestScore:
    def test_gradient_mode_is_an_argument(self):
        pixels = torch.rand(2, 3, 4, 4, requires_grad=True)
        assert score(Sound(), pixels, EXAMPLES, enable_grad=True).value_B.requires_grad
        assert not score(Sound(), pixels, EXAMPLES, enable_grad=False).value_B.requires_grad
        with torch.no_grad():
            assert score(Sound(), pixels, EXAMPLES, enable_grad=True).value_B.requires_grad

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_a_value_that_is_not_finite_is_masked(self, bad):
        reward = Returns(lambda _pixels: all_valid(torch.tensor([bad, 0.5])))
        assert score(reward, torch.rand(2, 3, 4, 4), EXAMPLES, enable_grad=False).valid_B.tolist() == [False, True]

    def test_finite_values_called_invalid_stay_masked(self):
        reward = Returns(lambda _pixels: Score(value_B=torch.zeros(2), valid_B=torch.tensor([True, False])))
        assert score(reward, torch.rand(2, 3, 4, 4), EXAMPLES, enable_grad=False).valid_B.tolist() == [True, False]

    @pytest.mark.parametrize(
        ("value", "valid", "message"),
        [
            (torch.zeros(1), torch.ones(2, dtype=torch.bool), r"value_B of shape \(1,\); expected \(2,\)"),
            (torch.zeros(2), torch.ones(2, 1, dtype=torch.bool), r"valid_B of shape \(2, 1\); expected \(2,\)"),
        ],
    )
    def test_wrong_shapes(self, value, valid, message):
        reward = Returns(lambda _pixels: Score(value_B=value, valid_B=valid))
        with pytest.raises(ScoringError, match=message):
            score(reward, torch.rand(2, 3, 4, 4), EXAMPLES, enable_grad=False)

    def test_a_promised_gradient_that_is_missing(self):
        pixels = torch.rand(2, 3, 4, 4, requires_grad=True)
        with pytest.raises(ScoringError, match="does not depend on the pixels"):
            score(Detached(), pixels, EXAMPLES, enable_grad=True)

    def test_a_batch_without_a_valid_score_needs_no_gradient(self):
        reward = Returns(lambda _pixels: Score(value_B=torch.zeros(2), valid_B=torch.zeros(2, dtype=torch.bool)))
        pixels = torch.rand(2, 3, 4, 4, requires_grad=True)
        assert not score(reward, pixels, EXAMPLES, enable_grad=True).valid_B.any()
