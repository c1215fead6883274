"""Composed objectives in the learner: the gradient of the formula written out, cuts, bounds, resumption."""

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewardgen.adaptive import Constraint, MultiplierConfig
from rewardgen.distributed import Processes
from rewardgen.flow.window import WindowConfig, run_window
from rewardgen.gradients import TermSums
from rewardgen.learner import Learner, MicroBatch, OptimizerConfig
from rewardgen.objective import Objective, ObjectiveConfig
from rewardgen.optimizer import Optimizer
from rewardgen.policy import Mode
from rewardgen.reward import Reward
from rewardgen.rollout import RolloutWorker
from rewardgen.types import Condition, Example, RolloutRequest, Score, StepReport, VelocityFn
from tests.toys import IMAGE_SIZE, ToyDataset, ToyPolicy, ToyReward

EXAMPLES = ToyDataset(4).examples
WINDOW = WindowConfig(kind="refl", entry_range=(2, 2))


class Channel(Reward):
    """Mean of one colour; with a `best`, minus its squared distance to it."""

    differentiable = True

    def __init__(self, channel: int, best: float | None = None, fail_ids: Sequence[str] = ()) -> None:
        super().__init__()
        self.channel, self.best, self.fail_ids = channel, best, fail_ids

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        value_B = pixels_B3HW[:, self.channel].mean((1, 2))
        value_B = value_B if self.best is None else -((value_B - self.best) ** 2)
        return Score(value_B=value_B, valid_B=torch.tensor([e.id not in self.fail_ids for e in examples]))


def make(
    settings: dict[str, Any], rewards: dict[str, Reward], policy: ToyPolicy | None = None, **options: Any
) -> Learner:
    terms = {name: {"use": "toy", "max_failed_share": 1.0} | term for name, term in settings.pop("rewards").items()}
    config = ObjectiveConfig.model_validate({"flow_matching": {"weight": 0}, "rewards": terms} | settings)
    arguments = {"optimizer": OptimizerConfig(lr=1e-2, weight_decay=0.0), "window": WINDOW} | options
    return Learner(policy or ToyPolicy(dtype="float64"), Objective(config, rewards), **arguments)


def batches(learner: Learner, size: int, examples: Sequence[Example] = EXAMPLES) -> list[MicroBatch]:
    made = []
    for start in range(0, len(examples), size):
        chosen, seed_B = examples[start : start + size], tuple(range(start, start + size))
        request = RolloutRequest(
            step=0, examples=chosen, seed_B=seed_B, image_size=IMAGE_SIZE, num_steps=4, stop_step=2
        )  # fmt: skip
        rollout = RolloutWorker(learner.policy, precision="fp32").rollout(request, learner.publish())
        made.append(MicroBatch(examples=chosen, seed_B=seed_B, image_size=IMAGE_SIZE, rollout=rollout))
    return made


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """The gradients that reach the optimizer, before clipping."""
    seen: list[list[Tensor]] = []
    update = Optimizer.update

    def spy(self: Optimizer, gradient: list[Tensor], grad_norm: float, *, step: int) -> None:
        seen.append([grad.clone() for grad in gradient])
        update(self, gradient, grad_norm, step=step)

    monkeypatch.setattr(Optimizer, "update", spy)
    return seen


GATE = {"reward": "blue", "above": 0.5, "width": 0.2}


def everything(tau: float) -> dict[str, Any]:
    return {
        "rewards": {"style": {"weight": 2.0, "gate": GATE}, "red": {"weight": 0.5}, "blue": {"weight": 0.0}},
        "combine": "softmin",
        "temperature": tau,
    }


def those(*fail_ids: str) -> dict[str, Reward]:
    return {"style": ToyReward(), "red": Channel(0, fail_ids=fail_ids), "blue": Channel(2)}


def test_the_gradient_of_gates_and_soft_minimum_is_that_of_the_formula(applied: list[list[Tensor]]) -> None:
    tau = 0.4
    learner = make(everything(tau), those())
    (batch,) = batches(learner, 4)
    policy = ToyPolicy(dtype="float64")
    assert batch.rollout is not None
    velocity = policy.velocity_fn(policy.encode(EXAMPLES), mode="sample", image_size=IMAGE_SIZE)
    pixels = policy.decode(run_window(velocity, batch.rollout.trajectory, WINDOW, enable_grad=True), IMAGE_SIZE)
    style_B, red_B, blue_B = (reward.score(pixels, EXAMPLES).value_B for reward in those().values())
    a_B = 2.0 * torch.sigmoid((blue_B - 0.5) / 0.2)
    inside_B = (a_B * torch.exp(-style_B / tau) + 0.5 * torch.exp(-red_B / tau)) / (a_B + 0.5)
    loss = (tau * (a_B + 0.5) * torch.log(inside_B)).mean()
    expected = torch.autograd.grad(loss, list(policy.trainable().values()))
    report = learner.step([batch], step=0)
    assert report.loss == pytest.approx(float(loss.detach()))
    assert report.loss == pytest.approx(sum(report.terms.values()))
    assert set(report.terms) == set(report.grad_norms) == {"style", "red"}
    assert set(report.reward_means) == {"style", "red", "blue"}
    assert "cosine/style/red" in report.metrics
    assert report.reward_means["red"] == pytest.approx(float(red_B.mean().detach()))
    for found, wanted in zip(applied[0], expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("combine", ["sum", "softmin"])
def test_accumulation_changes_nothing_nor_does_one_backward_pass_for_all(
    combine: str, applied: list[list[Tensor]]
) -> None:
    reports = []
    for size, separate in ((4, True), (2, True), (1, True), (4, False)):
        settings = everything(0.3)
        if combine == "sum":
            settings = {"rewards": settings["rewards"]}
            settings["rewards"]["red"]["normalize"] = "standard"
            settings["rewards"]["green"] = {"floor": 0.6, "multiplier": {"initial": 0.7}}
        rewards = those("toy-002") | ({"green": Channel(1)} if combine == "sum" else {})
        learner = make(settings, rewards, term_grad_norms=separate)
        reports.append([learner.step(batches(learner, size), step=step) for step in range(3)])
    for later in range(3):
        for others in (3, 6, 9):
            for whole, parts in zip(applied[later], applied[later + others], strict=True):
                torch.testing.assert_close(whole, parts)
    whole_run, two_by_two = reports[0], reports[1]
    for a, b in zip(whole_run, two_by_two, strict=True):
        assert a.valid_counts == b.valid_counts
        assert a.valid_counts["red"] == 3
        for field in ("terms", "reward_means", "grad_norms", "metrics"):
            assert getattr(a, field) == pytest.approx(getattr(b, field))


def test_a_normalised_reward_waits_for_its_scale_and_is_then_divided_by_it(applied: list[list[Tensor]]) -> None:
    """The first step only measures; the second's gradient is the plain one over the first's standard deviation."""
    normalised = make({"rewards": {"red": {"weight": 0.3, "normalize": "standard"}}}, {"red": Channel(0)})
    first = normalised.step(batches(normalised, 2), step=0)
    assert first.skipped
    assert not first.terms["red"]
    plain = make({"rewards": {"red": {"weight": 0.3}}}, {"red": Channel(0)})
    second, same = (learner.step(batches(learner, 2), step=1) for learner in (normalised, plain))
    mean, std = second.metrics["running_mean/red"], second.metrics["running_std/red"]
    assert first.reward_means["red"] == pytest.approx(mean)
    for found, wanted in zip(applied[0], applied[1], strict=True):
        torch.testing.assert_close(found, wanted / std)
    assert second.terms["red"] == pytest.approx(-0.3 * (second.reward_means["red"] - mean) / std, abs=1e-9)
    assert second.reward_means == same.reward_means, "reports show scores as they are"


class Colour(ToyPolicy):
    """Draws one colour, its only parameter, whatever it is asked for."""

    def __init__(self) -> None:
        super().__init__(dtype="float64")
        self.colour = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def velocity_fn(self, condition: Condition, *, mode: Mode, image_size: tuple[int, int]) -> VelocityFn:
        colour = torch.cat([self.colour, self.colour.new_zeros(3)])
        return lambda latents_BLC, t_B: (latents_BLC.double() - colour) / t_B.double()[:, None, None]

    def decode(self, latents_BLC: Tensor, image_size: tuple[int, int]) -> Tensor:
        return latents_BLC.mean(1)[:, :3, None, None].expand(-1, 3, *image_size)

    def trainable(self) -> dict[str, nn.Parameter]:
        return {"colour": self.colour}


def train(
    settings: dict[str, Any], rewards: dict[str, Reward], steps: int, lr: float
) -> tuple[Colour, list[StepReport]]:
    policy = Colour()
    optimizer = OptimizerConfig(lr=lr, weight_decay=0.0, warmup_steps=0, decay_steps=2 * steps, betas=(0.5, 0.95))
    learner = make(settings, rewards, policy, optimizer=optimizer)
    return policy, [learner.step(batches(learner, 2, EXAMPLES[:2]), step=step) for step in range(steps)]


def test_the_learner_ends_at_the_known_optimum_under_a_floor() -> None:
    """Raise -(red - 2)^2 - (green - 2)^2 with -red >= -1: red = 1, green = 2, multiplier = 2 (2 - 1)."""
    settings = {
        "rewards": {"near": {}, "also": {}, "held": {"ceiling": 1.0, "multiplier": {"rate": 0.2}}},
    }
    rewards: dict[str, Reward] = {"near": Channel(0, 2.0), "also": Channel(1, 2.0), "held": Channel(0)}
    policy, reports = train(settings, rewards, 200, 0.04)
    assert policy.colour.tolist()[:2] == pytest.approx([1.0, 2.0], abs=0.02)
    assert reports[-1].metrics["multiplier/held"] == pytest.approx(2.0, abs=0.1)
    assert reports[-1].metrics["slack/held"] == pytest.approx(0.0, abs=0.02)
    assert max(report.metrics["multiplier/held"] for report in reports) > 2.0


def test_a_floor_relative_to_the_base_is_measured_before_anything_trains() -> None:
    settings = {
        "rewards": {
            "near": {},
            "kept": {"floor": {"base": -0.5, "steps": 3}, "multiplier": {"rate": 0.1}},
        },
    }
    rewards: dict[str, Reward] = {"near": Channel(0, -2.0), "kept": Channel(0)}
    policy, reports = train(settings, rewards, 120, 0.04)
    assert [report.skipped for report in reports[:4]] == [True, True, True, False]
    assert [report.reward_means["kept"] for report in reports[:3]] == [0, 0, 0]
    assert "bound/kept" not in reports[2].metrics
    assert reports[3].metrics["bound/kept"] == -0.5
    assert float(policy.colour[0].detach()) == pytest.approx(-0.5, abs=0.02)


def test_a_resumed_run_equals_the_uninterrupted_one() -> None:
    def fresh() -> Learner:
        settings: dict[str, Any] = everything(0.3)
        settings["rewards"]["red"]["normalize"] = "standard"
        settings["rewards"]["green"] = {"floor": {"base_percent": 3, "steps": 2}, "multiplier": {"rate": 5.0}}
        settings["rewards"]["style"]["schedule"] = [[2, 0.1], [6, 1.0]]
        return make(settings, those("toy-001") | {"green": Channel(1)}, ema_decay=0.9)

    whole, first, second = fresh(), fresh(), fresh()
    reports = [whole.step(batches(whole, 2), step=step) for step in range(6)]
    for step in range(3):
        first.step(batches(first, 2), step=step)
    tensors, state = first.state()
    second.load_state({name: value.clone() for name, value in tensors.items()}, json.loads(json.dumps(state)))
    resumed = [second.step(batches(second, 2), step=step) for step in range(3, 6)]
    assert [report.metrics for report in resumed] == [report.metrics for report in reports[3:]]
    assert second.state()[1] == whole.state()[1]
    assert all(torch.equal(value, second.state()[0][name]) for name, value in whole.state()[0].items())
    last = resumed[-1].metrics
    assert last["weight/style"] == pytest.approx(2.0 * (0.1 + 0.9 * 3 / 4))
    assert last["multiplier/green"] > 0
    assert math.isfinite(resumed[-1].loss)


def test_scores_are_summed_over_processes_and_each_learns_the_same() -> None:
    """Two processes with unequal shares of one step: sums, and so multipliers, are those of a single process."""
    rows = torch.tensor([0.1, 0.5, math.nan, 0.9, 0.4], dtype=torch.float64)

    def sums_of(part: slice) -> TermSums:
        sums = TermSums()
        sums.add_score("red", Score(value_B=rows[part], valid_B=~rows[part].isnan()))
        sums.add("red", rows[part].nansum(), int((~rows[part].isnan()).sum()))
        return sums

    class Meeting(Processes):
        """Remembers what was brought; gives everybody's, once all have brought theirs."""

        def __init__(self) -> None:
            super().__init__()
            self.brought: list[Any] = []

        def exchange(self, topic: str, value: Any = None) -> list[Any]:
            self.brought.append(json.loads(json.dumps(value)))
            return self.brought

    counted_by = {"red": ["red"]}
    whole, shares = sums_of(slice(None)), [sums_of(slice(2)), sums_of(slice(2, None))]
    whole.sum_over(Processes(), [], counted_by, "all")
    meeting = Meeting()
    shares[0].sum_over(meeting, [], counted_by, "the first alone")
    valid = shares[1].sum_over(meeting, [], counted_by, "both")
    assert valid == {"red": [True, True, False, True, True]}
    assert shares[1].scores["red"] == whole.scores["red"]
    assert shares[1].valid_counts() == whole.valid_counts() == {"red": 4}
    constraints = [Constraint(0.6, ceiling=False, config=MultiplierConfig()) for _ in range(2)]
    for constraint, sums in zip(constraints, (whole, shares[1]), strict=True):
        constraint.update(sums.scores["red"], 0)
    assert constraints[0].multiplier == constraints[1].multiplier == pytest.approx(0.6 - 1.9 / 4)
