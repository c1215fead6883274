"""Plain functions as rewards: what they are called with, what they may return, and what happens when they fail."""

from __future__ import annotations

import asyncio
import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rewardgen import plugins
from rewardgen.errors import ConfigError, ScoringError
from rewardgen.objective import check_differentiable
from rewardgen.reward import RewardWarning, check_reward, score
from rewardgen.reward_function import MAX_FAILED_IN_A_ROW, FunctionReward, function_reward, to_pil
from rewardgen.types import Example, Score


def picture(seed: int, height: int = 6, width: int = 9) -> Tensor:
    """Random 8-bit values, so that PIL images keep them exactly."""
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed)) / 255


EXAMPLES = [
    Example(
        id="a",
        prompt="a hat",
        content_refs=(picture(1), picture(2, 4, 5)),
        style_refs=(picture(3),),
        target=picture(4),
        extras={"text": "HAT", "count": 1},
    ),
    Example(id="b", prompt="two hats", extras={"text": "HATS"}),
    Example(id="c", extras={"text": "", "count": 3}),
]
PIXELS = torch.stack([picture(10), picture(11), picture(12)])


def scored(function: Callable[..., Any], examples: list[Example] = EXAMPLES, /, **args: Any) -> Score:
    reward = function_reward(function)(**args)
    return score(reward, PIXELS[: len(examples)], examples, enable_grad=False)


def values(result: Score) -> list[float | None]:
    pairs = zip(result.value_B.tolist(), result.valid_B.tolist(), strict=True)
    return [value if valid else None for value, valid in pairs]


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).astype(np.float32) / 255).permute(2, 0, 1)


class TestWhatItIsCalledWith:
    def test_a_function_with_kwargs_gets_everything_by_keyword(self) -> None:
        seen: dict[str, Any] = {}

        def everything(**given: Any) -> list[float]:
            seen.update(given)
            return [0.0] * 3

        scored(everything)
        assert set(seen) == {
            *("prompts", "completions", "ids", "content_refs", "style_refs", "identity_refs", "target"),
            *("text", "count"),
        }
        assert seen["prompts"] == ["a hat", "two hats", ""]
        assert seen["ids"] == ["a", "b", "c"]
        assert seen["text"] == ["HAT", "HATS", ""]
        assert seen["count"] == [1, None, 3]
        assert [len(refs) for refs in seen["content_refs"]] == [2, 0, 0]
        assert seen["identity_refs"] == [[], [], []]
        assert seen["target"][1:] == [None, None]

    def test_pictures_are_rgb_pil_images_with_the_values_they_had(self) -> None:
        seen: dict[str, Any] = {}

        def look(completions: list[Image.Image], content_refs: Any, target: Any) -> list[float]:
            seen.update(completions=completions, content_refs=content_refs, target=target)
            return [0.0] * 3

        scored(look)
        assert all(image.mode == "RGB" and image.size == (9, 6) for image in seen["completions"])
        assert torch.equal(torch.stack([as_tensor(image) for image in seen["completions"]]), PIXELS)
        assert torch.equal(as_tensor(seen["content_refs"][0][1]), EXAMPLES[0].content_refs[1])
        assert EXAMPLES[0].target is not None
        assert torch.equal(as_tensor(seen["target"][0]), EXAMPLES[0].target)

    def test_pil_values_are_clamped_and_rounded_to_the_nearest(self) -> None:
        levels = torch.tensor([-0.2, 0.0, 0.499, 0.501, 254.4, 254.6, 255.0, 300.0]) / 255
        levels[0] = -0.2
        image = to_pil(levels.expand(3, 1, 8).requires_grad_())
        assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 0, 1, 254, 255, 255, 255]

    def test_tensors_for_who_names_them(self) -> None:
        seen: dict[str, Any] = {}

        def look(pixels_B3HW: Tensor, style_refs: Any, target: Any, **rest: Any) -> list[float]:
            assert not pixels_B3HW.requires_grad
            assert not torch.is_grad_enabled()
            seen.update(pixels=pixels_B3HW, style=style_refs, target=target)
            return pixels_B3HW.mean((1, 2, 3)).tolist()

        pixels = (PIXELS * 1.2 - 0.1).requires_grad_()
        result = function_reward(look)().score(pixels, EXAMPLES)  # gradients are on here
        assert torch.equal(seen["pixels"], pixels.detach().clamp(0, 1))
        assert seen["style"][0][0] is EXAMPLES[0].style_refs[0]
        assert seen["target"][0] is EXAMPLES[0].target
        torch.testing.assert_close(result.value_B, pixels.detach().clamp(0, 1).mean((1, 2, 3)))
        assert not result.value_B.requires_grad

    def test_a_function_without_kwargs_gets_what_it_names(self) -> None:
        def count_letters(completions: list[Any], text: list[str], *, scale: float = 1.0) -> list[float]:
            return [scale * len(word) for word in text]

        assert values(scored(count_letters)) == [3, 4, 0]
        assert values(scored(count_letters, scale=0.5)) == [1.5, 2, 0]

    def test_a_column_wins_over_a_default_and_an_argument_over_a_column(self) -> None:
        def named(completions: list[Any], text: Any = "default") -> list[float]:
            return [float(len(text))] * len(completions)

        assert values(scored(named)) == [3, 3, 3]  # the list of three words
        assert values(scored(named, [Example(id="x")])) == [len("default")]
        assert values(scored(named, text="given")) == [5, 5, 5]

    def test_examples_without_a_required_column_are_masked_and_not_shown(self) -> None:
        def counts(completions: list[Any], count: list[int], ids: list[str]) -> list[float]:
            assert ids == ["a", "c"]
            assert len(completions) == 2
            return [float(number) for number in count]

        assert values(scored(counts)) == [1, None, 3]

    def test_a_column_that_no_example_has_is_named_once(self) -> None:
        def misspelt(completions: list[Any], txet: list[str]) -> list[float]:
            raise AssertionError("it must not be called")

        reward = function_reward(misspelt)()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            for _ in range(2):
                assert values(score(reward, PIXELS, EXAMPLES, enable_grad=False)) == [None] * 3
        assert [str(warning.message) for warning in warned] == [
            "reward function 'misspelt' needs the column 'txet', which no example has. Did you mean 'text'?"
        ]

    def test_a_column_of_a_taken_name_is_refused(self) -> None:
        examples = [replace(EXAMPLES[0], extras={"target": "x"})]
        with pytest.raises(ScoringError, match="'with_target' is given 'target' by the engine; rename that column"):
            scored(with_target, examples)

        def without(completions: list[Any]) -> list[float]:
            return [1.0]

        assert values(scored(without, examples)) == [1]

    def test_pictures_keep_their_device_and_nothing_is_differentiable(self) -> None:
        result = scored(lambda completions: [1.0, None, 2])
        assert result.value_B.dtype == torch.float32
        assert values(result) == [1, None, 2]
        assert not function_reward(with_target).differentiable


def with_target(completions: list[Any], target: list[Any]) -> list[float]:
    return [1.0] * len(completions)


class TestWhatItReturns:
    @pytest.mark.parametrize(
        "returned",
        [
            [1, None, 2.5],
            (1.0, None, 2.5),
            [np.float32(1), None, torch.tensor(2.5)],
            np.array([1, None, 2.5], dtype=object),
        ],
    )
    def test_numbers_of_any_make(self, returned: Any) -> None:
        assert values(scored(lambda completions: returned)) == [1, None, 2.5]

    def test_arrays_tensors_and_truth_values(self) -> None:
        assert values(scored(lambda completions: torch.tensor([1.0, 2.0, 3.0]))) == [1, 2, 3]
        assert values(scored(lambda completions: [True, np.bool_(False), np.int64(2)])) == [1, 0, 2]

    @pytest.mark.parametrize(
        ("returned", "message"),
        [
            (None, "returned NoneType; expected a list of numbers or None"),
            (0.5, "returned float; expected a list"),
            ("abc", "returned str; expected a list"),
            ({"a": 1}, "returned dict; expected a list"),
            ((x for x in (1, 2, 3)), "returned generator; expected a list"),
            (np.float64(1), "returned float64; expected a list"),
            ([1.0, 2.0], "returned 2 scores for 3 pictures"),
            ([], "returned 0 scores for 3 pictures"),
            (torch.zeros(3, 1), r"returned \[0.0\] for picture 0; expected a number"),
            ([1.0, "2", 3.0], "returned '2' for picture 1; expected a number or None"),
            ([1.0, 2.0, 3j], "for picture 2; expected a number"),
            ([1.0, float("nan"), 3.0], "returned nan for picture 1; return None where there is no score"),
            ([float("-inf"), 2.0, 3.0], "returned -inf for picture 0"),
            ([1e39, 2.0, 3.0], r"returned 1e\+39 for picture 0"),
            ([torch.zeros(2), 2.0, 3.0], "for picture 0; expected a number"),
        ],
    )
    def test_anything_else_names_the_function(self, returned: Any, message: str) -> None:
        def judge(completions: list[Any]) -> Any:
            return returned

        with pytest.raises(ScoringError, match=message) as caught:
            scored(judge)
        assert str(caught.value).startswith("reward function 'judge' returned ")


class TestFailures:
    def test_an_exception_masks_the_batch_and_is_told_once(self) -> None:
        def moody(completions: list[Any], text: list[str]) -> list[float]:
            if "HAT" in text:
                raise ValueError("no hats")
            if "" in text:
                return [1.0] * len(text)
            raise KeyError("other")

        reward = function_reward(moody)()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            for examples in (EXAMPLES[:1], EXAMPLES[:1], EXAMPLES[1:2], EXAMPLES[:2]):
                result = score(reward, PIXELS[: len(examples)], examples, enable_grad=False)
                assert values(result) == [None] * len(examples)
            assert values(score(reward, PIXELS[:1], EXAMPLES[2:], enable_grad=False)) == [1]
        first, second = (str(warning.message) for warning in warned)
        line = inspect.getsourcelines(moody)[1] + 2
        assert first == (
            f"reward function 'moody' raised ValueError: no hats ({__file__}, line {line});"
            " scores of such batches are masked and counted"
        )
        assert "raised KeyError: 'other'" in second

    @pytest.mark.filterwarnings("ignore::rewardgen.reward.RewardWarning")
    def test_a_function_that_only_fails_stops_the_run(self) -> None:
        def broken(completions: list[Any]) -> list[float]:
            raise ConnectionError("nobody there")

        reward = function_reward(broken)()
        for _ in range(-(-MAX_FAILED_IN_A_ROW // 3) - 1):
            score(reward, PIXELS, EXAMPLES, enable_grad=False)
        with pytest.raises(ScoringError, match=r"nobody there.*scored none of the last 66 pictures") as caught:
            score(reward, PIXELS, EXAMPLES, enable_grad=False)
        assert isinstance(caught.value.__cause__, ConnectionError)

    @pytest.mark.filterwarnings("ignore::rewardgen.reward.RewardWarning")
    def test_one_answer_in_between_starts_the_count_again(self) -> None:
        calls = 0

        def flaky(completions: list[Any]) -> list[None]:
            nonlocal calls
            calls += 1
            if calls % 20:
                raise TimeoutError
            return [None] * len(completions)

        reward = function_reward(flaky)()
        for _ in range(100):
            assert values(score(reward, PIXELS, EXAMPLES, enable_grad=False)) == [None] * 3

    def test_an_interrupt_is_no_failure(self) -> None:
        def stopped(completions: list[Any]) -> list[float]:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            scored(stopped)


class TestAsync:
    def test_with_and_without_a_running_loop_and_always_in_the_same_one(self) -> None:
        loops = set()

        async def judge(completions: list[Any]) -> list[float]:
            assert not torch.is_grad_enabled()
            await asyncio.sleep(0)
            loops.add(asyncio.get_running_loop())
            return [float(place) for place, _ in enumerate(completions)]

        reward = function_reward(judge)()

        async def inside() -> Score:
            return score(reward, PIXELS, EXAMPLES, enable_grad=False)

        assert values(score(reward, PIXELS, EXAMPLES, enable_grad=False)) == [0, 1, 2]
        assert values(asyncio.run(inside())) == [0, 1, 2]
        assert values(asyncio.run(inside())) == [0, 1, 2]
        assert len(loops) == 1  # a client that the function keeps stays usable
        assert torch.is_grad_enabled()

    def test_questions_of_one_call_run_at_the_same_time(self) -> None:
        async def judge(completions: list[Any]) -> list[float]:
            everyone = asyncio.Barrier(len(completions))

            async def ask() -> float:
                await everyone.wait()  # hangs unless all are asked together
                return 1.0

            async with asyncio.timeout(20):
                return await asyncio.gather(*(ask() for _ in completions))

        assert values(scored(judge)) == [1, 1, 1]

    def test_failures_and_wrong_answers_as_of_any_function(self) -> None:
        async def broken(completions: list[Any]) -> list[float]:
            await asyncio.sleep(0)
            raise ValueError("late")

        async def short(completions: list[Any]) -> list[float]:
            return [1.0]

        with pytest.warns(RewardWarning, match=r"'broken' raised ValueError: late \(.*test_reward_function.py, line"):
            assert values(scored(broken)) == [None] * 3
        with pytest.raises(ScoringError, match="'short' returned 1 scores for 3 pictures"):
            scored(short)


class TestClass:
    def test_it_is_named_as_the_function_and_made_once(self) -> None:
        cls = function_reward(with_target)
        assert issubclass(cls, FunctionReward)
        assert cls.__name__ == "with_target"
        assert function_reward(with_target) is cls

    def test_without_gradient_it_is_refused_in_an_objective(self) -> None:
        with pytest.raises(ConfigError, match=r"objective\.rewards\.x: with_target has no gradient"):
            check_differentiable("x", function_reward(with_target))

    def test_arguments_are_checked_against_the_function(self) -> None:
        def judge(completions: list[Any], text: Any, model: str, scale: float = 1.0, **columns: Any) -> list[float]:
            return []

        cls = function_reward(judge)
        assert plugins.check_args(cls, {"scale": 2, "model": "m"}, "args") == {"scale": 2.0, "model": "m"}
        for given, message in {
            "scael": r"args\.scael: unknown argument. Did you mean 'scale'\?",
            "zzz": r"args\.zzz: unknown argument. It takes: text, model, scale\.",
            "completions": r"args\.completions: is filled in at every call and cannot be given here",
            "content_refs": r"args\.content_refs: is filled in at every call",
            "columns": r"args\.columns: unknown argument",
        }.items():
            with pytest.raises(ConfigError, match=message):
                plugins.check_args(cls, {given: 1}, "args")
        with pytest.raises(ConfigError, match=r"args\.scale: input should be a valid number, got 'big'"):
            plugins.check_args(cls, {"scale": "big"}, "args")
        with pytest.raises(TypeError, match="scael"):
            cls(scael=1)

    def test_a_decorated_function_shows_its_own_parameters(self) -> None:
        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(function)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                return function(*args, **kwargs)

            return wrapper

        @decorate
        def judge(completions: list[Any], level: float = 1.0) -> list[float]:
            return [level] * len(completions)

        assert values(scored(judge, level=3)) == [3, 3, 3]
        with pytest.raises(ConfigError, match=r"args\.level: input should be a valid number"):
            plugins.check_args(function_reward(judge), {"level": "x"}, "args")

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (lambda prompts: [], "takes neither 'completions' .* nor 'pixels_B3HW'"),
            (lambda completions, /: [], "takes 'completions' by position"),
        ],
    )
    def test_functions_that_cannot_be_called_so(self, function: Callable[..., Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            function_reward(function)


class TestCheckReward:
    def test_a_sound_function_passes(self) -> None:
        def contrast(completions: list[Image.Image], scale: float = 1.0) -> list[float | None]:
            return [scale * float(np.asarray(image).std()) for image in completions]

        held = check_reward(function_reward(contrast)(scale=2.0))
        assert held[-2:] == ("gradient: none, as it says", "begun with others, a picture's score is the same")

    def test_what_would_be_masked_in_a_run_is_a_fault_here(self) -> None:
        def broken(completions: list[Any]) -> list[float]:
            raise ValueError("no model")

        def needs(completions: list[Any], caption: list[str]) -> list[float]:
            return [1.0] * len(completions)

        def nan(completions: list[Any]) -> list[float]:
            return [float("nan")] * len(completions)

        with pytest.raises(ScoringError, match="reward function 'broken' raised ValueError: no model"):
            check_reward(function_reward(broken)())
        with pytest.raises(ScoringError, match="needs the column 'caption', which no example has"):
            check_reward(function_reward(needs)())
        with pytest.raises(ScoringError, match="'nan' returned nan for picture 0"):
            check_reward(function_reward(nan)())
        check_reward(function_reward(needs)(caption="bound"))

    def test_a_function_that_compares_the_batch_is_caught(self) -> None:
        def rank(completions: list[Image.Image]) -> list[float]:
            means = [float(np.asarray(image).mean()) for image in completions]
            return [float(sorted(means).index(mean)) for mean in means]

        with pytest.raises(ScoringError, match="depends on the other pictures of its batch"):
            check_reward(function_reward(rank)())

    def test_warnings_of_others_are_left_alone(self) -> None:
        def loud(completions: list[Any]) -> list[float]:
            warnings.warn("old", DeprecationWarning, stacklevel=1)
            return [1.0] * len(completions)

        with pytest.warns(DeprecationWarning, match="old"):
            check_reward(function_reward(loud)())
