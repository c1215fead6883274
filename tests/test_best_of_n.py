"""Best of N against brute force: every picture drawn and scored by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rewardgen.curation.best_of_n import Choice, best_of_n, save_choices
from rewardgen.data.jsonl import JsonlDataset
from rewardgen.errors import ConfigError, UserError
from rewardgen.flow.sampling import sample
from rewardgen.policy import noise_like_request
from rewardgen.reward import Reward
from rewardgen.seeds import derive_seed
from rewardgen.types import Example, Score
from tests.toys import IMAGE_SIZE, ToyDataset, ToyPolicy, ToyReward

N, STEPS, SEED = 5, 3, 11


def choose(examples: Sequence[Example], reward: Reward, *, n: int = N, batch_size: int = 4) -> list[Choice]:
    return best_of_n(
        ToyPolicy(),
        reward,
        examples,
        n=n,
        seed=SEED,
        image_size=IMAGE_SIZE,
        num_steps=STEPS,
        batch_size=batch_size,
    )


def brute_force(example: Example, reward: Reward, n: int = N) -> list[tuple[float, Tensor]]:
    """(score, picture) of each draw, one at a time."""
    policy, drawn = ToyPolicy(), []
    for draw in range(n):
        seed = derive_seed(derive_seed(SEED, "best_of_n", draw), "evaluation", example.id)
        with torch.no_grad():
            clean = sample(
                policy.velocity_fn(policy.encode([example]), mode="sample", image_size=IMAGE_SIZE),
                noise_like_request(policy, [seed], IMAGE_SIZE),
                policy.sigmas(STEPS, IMAGE_SIZE),
                start=0,
                stop=STEPS,
                enable_grad=False,
            )
            picture = policy.decode(clean, IMAGE_SIZE).clamp(0, 1)
            drawn.append((float(reward.score(picture, [example]).value_B), picture[0]))
    return drawn


class Scripted(Reward):
    """Scores by example and draw, as written down; None has failed. Draws come one list after another."""

    differentiable = False

    def __init__(self, script: dict[str, list[float | None]]) -> None:
        super().__init__()
        self.script = {name: list(values) for name, values in script.items()}
        self.seen: dict[str, list[Tensor]] = {name: [] for name in script}

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        values = []
        for picture, example in zip(pixels_B3HW, examples, strict=True):
            self.seen[example.id].append(picture.clone())
            values.append(self.script[example.id].pop(0))
        return Score(
            # A failed score is higher than any other: only the mask may keep it from winning.
            value_B=torch.tensor([9.0 if value is None else value for value in values]),
            valid_B=torch.tensor([value is not None for value in values]),
        )


def test_it_keeps_what_brute_force_finds_best() -> None:
    examples, reward = ToyDataset(7).examples, ToyReward()
    choices = choose(examples, reward)
    places = set()
    for choice, example in zip(choices, examples, strict=True):
        drawn = brute_force(example, reward)
        score, picture = max(drawn, key=lambda pair: pair[0])
        places.add([value for value, _ in drawn].index(score))
        assert choice.score == pytest.approx(score, abs=1e-6)
        assert choice.example.target is not None
        assert float((choice.example.target - picture).abs().max()) <= 0.5 / 255 + 1e-6
        assert dataclasses.replace(choice.example, target=example.target) == example
    assert len(places) > 1, "the same draw always won: the test cannot tell the best from the first"


def test_more_draws_never_lower_the_score_and_the_company_does_not_matter() -> None:
    examples, reward = ToyDataset(6).examples, ToyReward()
    scores = [[choice.score for choice in choose(examples, reward, n=n)] for n in (1, 2, 4)]
    for fewer, more in pairwise(scores):
        assert all(a is not None and b is not None and b >= a for a, b in zip(fewer, more, strict=True))
    assert scores[0] != scores[2]
    alone = [choose([example], reward, n=4, batch_size=1)[0].score for example in reversed(examples)]
    assert scores[2] == pytest.approx(alone[::-1], abs=1e-6)


def test_failed_scores_never_win_and_of_equal_ones_the_first_does() -> None:
    script: dict[str, list[float | None]] = {
        "toy-000": [None, 0.1, None, 0.3, 0.2],
        "toy-001": [None] * N,
        "toy-002": [0.5, 0.5, 0.4, 0.5, None],
        "toy-003": [float("nan"), float("inf"), -3.0, None, -4.0],
    }
    examples, reward = ToyDataset(4).examples, Scripted(script)
    choices = choose(examples, reward)
    assert [choice.score for choice in choices] == [pytest.approx(0.3), None, 0.5, -3.0]
    assert choices[1].example is examples[1]
    for choice, winner in zip(choices, (3, None, 0, 2), strict=True):
        if winner is not None:
            assert choice.example.target is not None
            expected = reward.seen[choice.example.id][winner].mul(255).round().div(255)
            assert torch.equal(choice.example.target, expected.float())


def test_a_picture_that_is_not_finite_never_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ToyPolicy.decode
    calls = []

    def broken(self: ToyPolicy, latents_BLC: Tensor, image_size: tuple[int, int]) -> Tensor:
        calls.append(1)
        return plain(self, latents_BLC, image_size) * (torch.nan if len(calls) == 1 else 1.0)

    monkeypatch.setattr(ToyPolicy, "decode", broken)
    (choice,) = choose(ToyDataset(1).examples, Scripted({"toy-000": [0.9, 0.1]}), n=2)
    assert choice.score == pytest.approx(0.1)
    assert choice.example.target is not None
    assert bool(torch.isfinite(choice.example.target).all())


def test_correspondences_leave_with_the_target_they_belong_to() -> None:
    example = dataclasses.replace(ToyDataset(1).examples[0], correspondences=(torch.tensor([[0, 0]]),))
    assert choose([example], ToyReward())[0].example.correspondences == ()
    unjudged = choose([example], ToyReward(fail_ids=[example.id]))[0]
    assert unjudged.score is None
    assert len(unjudged.example.correspondences) == 1


def test_the_files_give_the_examples_back(tmp_path: Path) -> None:
    def grid(picture: Tensor) -> Tensor:
        return picture.mul(255).round().div(255)

    examples = [
        dataclasses.replace(
            example,
            content_refs=tuple(map(grid, example.content_refs)),
            style_refs=tuple(map(grid, example.style_refs * (1 + place))),
            identity_refs=tuple(map(grid, example.content_refs[:place])),
            target=None if place == 2 else grid(ToyDataset(1).examples[0].content_refs[0]),
            extras={"source": f"é {place}", "truth": torch.ones(2)},
        )
        for place, example in enumerate(ToyDataset(3).examples)
    ]
    choices = choose(examples, ToyReward(fail_ids=["toy-001", "toy-002"]))
    loaded = JsonlDataset(str(save_choices(choices, tmp_path / "data")))
    assert [choice.score is None for choice in choices] == [False, True, True]
    for choice, example in zip(choices, [loaded[index] for index in range(len(loaded))], strict=True):
        wanted = choice.example
        assert (example.id, example.prompt) == (wanted.id, wanted.prompt)
        assert example.extras == {"source": wanted.extras["source"], "best_of_n_score": choice.score}
        for kind in ("content_refs", "style_refs", "identity_refs"):
            pairs = list(zip(getattr(example, kind), getattr(wanted, kind), strict=True))
            assert all(torch.equal(a, b) for a, b in pairs)
        assert (example.target is None) == (wanted.target is None)
        if example.target is not None and wanted.target is not None:
            assert torch.equal(example.target, wanted.target.float())


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    examples = ToyDataset(2).examples
    with pytest.raises(ConfigError, match="at least 1 is needed"):
        choose(examples, ToyReward(), n=0)
    with pytest.raises(ConfigError, match="unique ids"):
        choose([examples[0], examples[0]], ToyReward())
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        save_choices([], tmp_path / "file" / "data")
