"""The share of matching: seconds fall into the right section, forward and backward, and nothing else changes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rewardgen.errors import ConfigError
from rewardgen.rewards import matching
from rewardgen.rewards.faces import align
from rewardgen.rewards.faces.detector import GivenDetector
from rewardgen.rewards.matching import MatchingReward
from rewardgen.types import Example
from tests.toy_faces import GRID, LinearNetwork, example_of, linear_encoder, person, scene

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import matching_share
from matching_share import ELSE, NETWORKS, OWN, REST, Stopwatch, mark, measured

PEOPLE = [person(seed) for seed in range(6)]


class FakeTime:
    """A clock that only the parts of this test advance."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def passes(self, seconds: float) -> Callable[[], None]:
        def advance() -> None:
            self.now += seconds

        return advance


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(matching_share, "time", fake)
    return fake


def test_sections_are_exclusive(clock: FakeTime) -> None:
    watch = Stopwatch()
    clock.now += 1
    watch.enter("matching")
    clock.now += 10
    watch.enter("warp")
    clock.now += 100
    watch.turn_to("detector")
    clock.now += 1000
    watch.leave()
    clock.now += 20
    watch.leave()
    clock.now += 2
    expected = {ELSE: 3, "matching": 30, "warp": 100, "detector": 1000}
    assert watch.take() == dict.fromkeys((*OWN, *NETWORKS, REST, ELSE), 0.0) | expected
    assert set(watch.take().values()) == {0.0}
    with pytest.raises(ConfigError):
        watch.section("warp", _fails)()
    clock.now += 5
    assert watch.take()[ELSE] == 5


def _fails() -> None:
    raise ConfigError("no")


@pytest.mark.parametrize("miss", [0.0, 1.0])
def test_every_second_falls_into_its_section(clock: FakeTime, miss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that take a known time, forward and backward, in a reward with two portraits, or with somebody missing."""
    calls = {"network": 0, "sample": 0, "back": 0}

    class SlowNetwork(LinearNetwork):
        def forward(self, crops_F3SS: Tensor) -> Tensor:
            clock.now += 5
            calls["network"] += 1
            return mark(super().forward(crops_F3SS), back)

    class SlowDetector(GivenDetector):
        def detect(self, pixels_B3HW: Tensor, known: Sequence[Tensor | None]) -> Any:
            clock.now += 1000
            return super().detect(pixels_B3HW, known)

    def back() -> None:
        clock.now += 7
        calls["back"] += 1

    def slow_sample(*args: Any, **kwargs: Any) -> Tensor:
        clock.now += 11
        calls["sample"] += 1
        return mark(sample(*args, **kwargs), clock.passes(13))

    def slow_value(*args: Any, **kwargs: Any) -> Tensor:
        clock.now += 17
        return mark(value(*args, **kwargs), clock.passes(19))

    def slow_transform(*args: Any) -> Tensor:
        clock.now += 100_000
        return transform(*args)

    sample, value, transform = F.grid_sample, matching.matching_value, align.similarity_transform
    monkeypatch.setattr(F, "grid_sample", slow_sample)
    monkeypatch.setattr(matching, "matching_value", slow_value)
    monkeypatch.setattr(matching_share.encoder_module, "similarity_transform", slow_transform)
    encoder = linear_encoder(SlowDetector())
    encoder.network = SlowNetwork()
    reward = MatchingReward(encoder, miss=miss)
    places = GRID[:1] if miss else GRID[:2]
    pixels = scene(PEOPLE[: len(places)], places)[None].requires_grad_()
    with measured(reward) as watch:
        found = reward.score(pixels, [example_of(PEOPLE[:2], places)])
        forward = watch.take()
        torch.autograd.grad(found.value_B.sum(), pixels)
        backward = watch.take()
    assert forward[ELSE] == backward[ELSE] == 0
    assert forward["face network"] == 5 * calls["network"] > 0
    assert forward["warp"] == 11 * calls["sample"] > 0
    assert forward["matching"] == 17
    assert forward[REST] == 3 * 1000  # the picture and two portraits
    assert forward["alignment"] >= 3 * 100_000
    assert forward["alignment"] % 100_000 == 0
    chains = 2 if miss else 1
    assert calls["back"] == chains
    assert backward["face network"] == 7 * chains
    assert backward["warp"] == 13 * chains
    assert backward["matching"] == 19


def test_measuring_changes_neither_value_nor_gradient_and_leaves_nothing_behind() -> None:
    reward = MatchingReward(linear_encoder(), miss=0.5)
    pixels = torch.stack([scene(PEOPLE[:3], GRID[:3]), scene(PEOPLE[1:2], GRID[:1])]).requires_grad_()
    examples = [example_of(PEOPLE[:3], GRID[:3], id="a"), example_of(PEOPLE[:2], GRID[:1], id="b")]

    def result() -> tuple[Tensor, Tensor]:
        value_B = reward.score(pixels, examples).value_B
        return value_B.detach(), torch.autograd.grad(value_B.sum(), pixels)[0]

    before = result()
    with measured(reward) as watch:
        between = result()
    seconds = watch.take()
    assert all(seconds[name] > 0 for name in ("alignment", "warp", "matching", "face network"))
    assert all(torch.equal(a, b) for a, b in zip(before, between, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, result(), strict=True))
    assert watch.take()["warp"] == 0
    assert not {"score", "embed", "align", "compare"} & {*vars(reward), *vars(reward.faces)}


def test_nothing_loops_over_pixels() -> None:
    """Lines of Python that run for a reward and its gradient: as many for a picture of sixteen times the pixels."""

    def lines(size: tuple[int, int]) -> int:
        reward, count = MatchingReward(linear_encoder()), 0
        picture = scene(PEOPLE[:3], GRID[:3], size)[None].requires_grad_()
        example: Example = example_of(PEOPLE[:3], GRID[:3])

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal count
            count += event == "line"
            return trace

        former = sys.gettrace()
        sys.settrace(trace)
        try:
            torch.autograd.grad(reward.score(picture, [example]).value_B.sum(), picture)
        finally:
            sys.settrace(former)
        return count

    lines((64, 64))  # what is done but once, imports among them
    assert lines((256, 256)) == lines((64, 64)) > 50


def test_shares_are_of_whole_steps() -> None:
    first = dict.fromkeys((*OWN, *NETWORKS, REST, ELSE), 0.0) | {
        "warp": 1.0,
        "matching": 1.0,
        "detector": 8.0,
        ELSE: 90.0,
    }
    second = first | {"matching": 3.0, ELSE: 88.0}
    found = matching_share.share([first, second], OWN)
    assert found["value"] == pytest.approx(0.03)
    # Student's t with one degree of freedom: 12.706 standard errors of 0.01.
    assert found["high"] == pytest.approx(0.03 + 12.7062 * 0.01, rel=1e-4)
    machine = {"threads": 1, "cpus": 1, "processor": "x", "torch": "2"}
    text = matching_share.render({"steps": [first, second], "batch": 8, "machine": machine})
    assert "**not met**" in text
    assert "| **both networks** | 8000.0 | 8.00 |" in text
    assert "**met**" in matching_share.render({"steps": [first, first], "batch": 8, "machine": machine})


def test_real_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching_share, "WARM_UP", 0)
    small = ["train.batch_size=2", "data.train.args.size=4", "data.held_out.args.size=1", "rollout.num_steps=2"]
    trainer = matching_share.make([*small, "rollout.window.entry_range=[1, 1]"], tmp_path)
    steps = matching_share.measure(trainer, 2)
    for step in steps:
        assert all(step[name] > 0 for name in (*OWN, *NETWORKS, REST, ELSE))
    assert matching_share.share(steps, OWN)["value"] + matching_share.share(steps, NETWORKS)["value"] < 1
