"""`async` reward functions among a step's samples: their waits overlap with the drawing, and nothing else shows it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageStat

from rewardgen.errors import ScoringError
from rewardgen.fleet.inline import InlinePool
from rewardgen.reward import Reward, RewardWarning, check_reward
from rewardgen.reward_function import MAX_FAILED_IN_A_ROW, function_reward
from rewardgen.scoring import ScoringWorker
from tests.test_begun import PATIENCE, PICTURES, InLine, mixed, said, trainer_of
from tests.toys import ToyDataset


def brightness(picture: Image.Image) -> float:
    return ImageStat.Stat(picture.convert("L")).mean[0] / 255


def test_all_calls_of_a_step_wait_at_once(tmp_path: Path) -> None:
    """None is answered before the last micro-batch is drawn and asked about."""
    everyone = asyncio.Barrier(PICTURES)

    async def judge(completions: list[Image.Image]) -> list[float]:
        async with asyncio.timeout(PATIENCE):
            await everyone.wait()
        return [brightness(picture) for picture in completions]

    trainer = trainer_of(mixed(function_reward(judge)()), tmp_path, batch_size=1, num_steps=2)
    trainer.run()
    assert [report["valid_counts"]["judge"] for report in said(trainer)] == [PICTURES, PICTURES]


def fickle() -> tuple[Reward, list[list[str]]]:
    """A judge that raises about one example, has no opinion of another, and answers in an order of its own.

    Returns:
        The reward, and the ids of each call as they are answered.
    """
    answered: list[list[str]] = []

    async def judge(completions: list[Image.Image], ids: list[str]) -> list[float | None]:
        for _ in range(10 - len(answered) % 10):
            await asyncio.sleep(0)
        answered.append(ids)
        if "toy-001" in ids:
            raise ValueError("the judge is away")
        return [None if id == "toy-003" else brightness(picture) for id, picture in zip(ids, completions, strict=True)]

    return function_reward(judge)(), answered


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.filterwarnings("ignore::rewardgen.reward.RewardWarning")
def test_a_run_is_that_of_a_function_that_is_waited_for_in_line(tmp_path: Path, staleness: int) -> None:
    (judge, answered), (other, in_turn) = fickle(), fickle()
    begun = trainer_of(mixed(judge), tmp_path / "begun", staleness=staleness)
    begun.run()
    in_line = trainer_of(mixed(InLine(other)), tmp_path / "in_line", staleness=staleness)
    in_line.run()
    assert sorted(answered) == sorted(in_turn)
    assert said(begun) == said(in_line)
    assert any(report["valid_counts"]["judge"] < PICTURES for report in said(begun))
    tensors, state = begun.learner.state()
    found = in_line.learner.state()
    assert found[1] == state
    assert all(torch.equal(found[0][name], tensor) for name, tensor in tensors.items())


BATCHES = 40
"""Of two pictures each: more than may fail in a row."""


def begin_all(judge: Callable[..., Any]) -> list[Any]:
    pixels, examples = torch.rand(2, 3, 8, 8), ToyDataset(2).examples
    reward = function_reward(judge)()
    return [reward.begin(pixels, examples) for _ in range(BATCHES)]


def test_failures_are_masked_and_counted_in_the_order_of_the_batches() -> None:
    calls, answered = [], asyncio.Event()

    async def judge(completions: list[Any]) -> list[float]:
        calls.append(len(calls))
        if calls[-1] == BATCHES // 2:  # the only answer, and the first to be there
            answered.set()
            return [1.0] * len(completions)
        async with asyncio.timeout(PATIENCE):
            await answered.wait()
        raise ValueError("away")

    assert MAX_FAILED_IN_A_ROW < 2 * (BATCHES - 1)
    with pytest.warns(RewardWarning, match="'judge' raised ValueError: away") as told:
        scores = [begun.finish() for begun in begin_all(judge)]
    assert len(told) == 1
    valid = [score.valid_B.tolist() for score in scores]
    assert valid == [[place == BATCHES // 2] * 2 for place in range(BATCHES)]
    assert all(bool(score.value_B[~score.valid_B].isnan().all()) for score in scores)


@pytest.mark.filterwarnings("ignore::rewardgen.reward.RewardWarning")
def test_a_function_that_does_nothing_but_fail_stops_the_run_when_it_is_waited_for() -> None:
    async def judge(completions: list[Any]) -> list[float]:
        raise ValueError("away")

    begun = begin_all(judge)
    last = MAX_FAILED_IN_A_ROW // 2 - 1
    assert not any(bool(one.finish().valid_B.any()) for one in begun[:last])
    with pytest.raises(ScoringError, match=f"none of the last {MAX_FAILED_IN_A_ROW} pictures"):
        begun[last].finish()


class Stuck:
    """A function whose calls wait until they are cancelled, the first `number` of them."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.begun, self.ended = threading.Semaphore(0), threading.Semaphore(0)
        self.calls = 0

    def reward(self) -> Reward:
        async def judge(completions: list[Any]) -> list[float]:
            self.calls += 1
            if self.calls <= self.number:
                self.begun.release()
                try:
                    await asyncio.Event().wait()
                finally:
                    self.ended.release()
            return [1.0] * len(completions)

        return function_reward(judge)()


def wait_for(semaphore: threading.Semaphore, number: int) -> bool:
    return all(semaphore.acquire(timeout=PATIENCE) for _ in range(number))


def test_closing_cancels_what_nobody_waits_for() -> None:
    stuck = Stuck(2)
    reward = stuck.reward()
    pool = InlinePool(ScoringWorker({"judge": reward}))
    pixels, examples = torch.rand(2, 3, 8, 8), ToyDataset(2).examples
    for _ in range(2):
        reward.begin(pixels, examples)
    assert wait_for(stuck.begun, 2)
    pool.close()
    assert wait_for(stuck.ended, 2)
    assert reward.score(pixels, examples).valid_B.all(), "it can be asked again"


def test_an_interrupt_while_waiting_ends_the_other_calls_too(monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = Stuck(2)
    reward = stuck.reward()
    pixels, examples = torch.rand(2, 3, 8, 8), ToyDataset(2).examples
    begun = [reward.begin(pixels, examples) for _ in range(2)]
    assert wait_for(stuck.begun, 2)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Future, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            begun[0].finish()
    assert wait_for(stuck.ended, 2)


@pytest.mark.parametrize("waits", [True, False])
def test_who_begins_gives_the_same_and_is_checked_for_it(waits: bool) -> None:
    async def waiting(completions: Sequence[Image.Image]) -> list[float]:
        await asyncio.sleep(0)
        return [brightness(picture) for picture in completions]

    def at_once(completions: Sequence[Image.Image]) -> list[float]:
        return [brightness(picture) for picture in completions]

    reward = function_reward(waiting if waits else at_once)()
    pixels, examples = torch.rand(4, 3, 8, 8), ToyDataset(4).examples
    halves = [reward.begin(pixels[i : i + 2], examples[i : i + 2]) for i in (0, 2)]
    second, first = halves[1].finish(), halves[0].finish()
    assert torch.equal(torch.cat([first.value_B, second.value_B]), reward.score(pixels, examples).value_B)
    assert "begun with others" in check_reward(reward)[-1]
