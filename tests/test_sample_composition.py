"""Gates, floors, normalisation, schedules and soft minima on rewards that score samples."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rewardgen.errors import ConfigError
from rewardgen.learner import Learner, OptimizerConfig
from rewardgen.objective import Objective, ObjectiveConfig
from rewardgen.optimizer import Optimizer
from rewardgen.reward import Reward
from rewardgen.types import Example, Score
from tests.test_policy_gradient import GRPO, ROLLOUT, micro_batches
from tests.toys import ToyJudge, ToyPolicy, ToyReward

PLAIN = GRPO | {"scale_rewards": "none"}


class Channel(Reward):
    """Mean of one colour, times the part of another that is above a threshold; no gradient."""

    differentiable = False

    def __init__(self, channel: int, where: int | None = None, above: float = 0.0, width: float = 1.0) -> None:
        super().__init__()
        self.channel, self.where, self.above, self.width = channel, where, above, width

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        mean_B3 = pixels_B3HW.detach().mean((2, 3))
        value_B = mean_B3[:, self.channel]
        if self.where is not None:
            value_B = value_B * torch.sigmoid((mean_B3[:, self.where] - self.above) / self.width)
        return Score(value_B=value_B, valid_B=torch.ones(len(examples), dtype=torch.bool))


def objective_of(
    terms: dict[str, dict[str, Any]], rewards: dict[str, Reward], settings: dict[str, Any] = PLAIN, **more: Any
) -> Objective:
    named = {name: {"use": "toy", "max_failed_share": 1.0} | term for name, term in terms.items()}
    fields = {"flow_matching": {"weight": 0}, "rewards": named, "policy_gradient": settings} | more
    return Objective(ObjectiveConfig.model_validate(fields), rewards)


def learner_of(*args: Any, **more: Any) -> Learner:
    objective = objective_of(*args, **more)
    return Learner(ToyPolicy(), objective, optimizer=OptimizerConfig(lr=1e-2), window=ROLLOUT.window)


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


def equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert any(grad.abs().max() > 0 for grad in wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-4)


def test_a_sample_is_worth_what_the_formula_says() -> None:
    terms: dict[str, dict[str, Any]] = {
        "a": {"weight": 2.0, "gate": {"reward": "c", "above": 0.5}},
        "b": {"schedule": [[0, 0.0], [10, 1.0]]},
        "c": {"weight": 0.0},
        "d": {"floor": 0.25, "multiplier": {"initial": 3.0}},
        "e": {"ceiling": 0.5, "multiplier": {"initial": 4.0}},
    }
    objective = objective_of(terms, {name: Channel(0) for name in terms})
    assert objective.active_samples(5) == ("a", "b", "c", "d", "e")
    assert objective.active_rewards(5) == ()
    assert objective.active_samples(0) == ("a", "c", "d", "e"), "b's weight is 0 there"
    rows = {"a": [1.0, 2.0], "b": [0.5, 1.5], "c": [0.4, 0.6], "d": [0.5, 0.75], "e": [1.0, 0.0]}
    scores = {n: Score(value_B=torch.tensor(row), valid_B=torch.tensor([True, True])) for n, row in rows.items()}
    found = objective.sample_values(scores, (0, 0), 5)
    assert found.valid_B.all()
    expected = [
        2 * gate * a + 0.5 * b + 3 * (d - 0.25) + 4 * (0.5 - e)
        for gate, a, b, d, e in ((0, 1.0, 0.5, 0.5, 1.0), (1, 2.0, 1.5, 0.75, 0.0))
    ]
    assert found.value_B.tolist() == pytest.approx(expected)


def test_a_smooth_gate_is_as_if_the_judge_had_multiplied(applied: list[list[Tensor]]) -> None:
    gate = {"reward": "blue", "above": 0.4, "width": 0.05}
    composed = learner_of({"red": {"gate": gate}, "blue": {"weight": 0}}, {"red": Channel(0), "blue": Channel(2)})
    report = composed.step(micro_batches(composed), step=0)
    written = learner_of({"red": {}}, {"red": Channel(0, where=2, above=0.4, width=0.05)})
    written.step(micro_batches(written), step=0)
    equal(*applied)
    assert set(report.reward_means) == {"red", "blue"}
    assert set(report.terms) == {"policy_gradient"}


def test_a_large_temperature_is_the_weighted_sum(applied: list[list[Tensor]]) -> None:
    rewards: dict[str, Reward] = {"red": Channel(0), "blue": Channel(2)}
    terms: dict[str, dict[str, Any]] = {"red": {"weight": 2.0}, "blue": {"weight": 0.5}}
    soft = learner_of(terms, rewards, combine="softmin", temperature=100.0)
    soft.step(micro_batches(soft), step=0)
    plain = learner_of(terms, rewards)
    plain.step(micro_batches(plain), step=0)
    ours, theirs = (torch.cat([grad.flatten() for grad in gradient]) for gradient in applied)
    assert float((ours - theirs).norm()) < 0.02 * float(theirs.norm())


def test_a_multiplier_counts_as_a_weight_and_learns_once_in_a_step(applied: list[list[Tensor]]) -> None:
    rewards: dict[str, Reward] = {"judge": ToyJudge(), "red": Channel(0)}
    bounded = {"judge": {}, "red": {"floor": 0.9, "multiplier": {"rate": 2.0, "initial": 0.7}}}
    for size in (4, 1):
        learner = learner_of(bounded, rewards, PLAIN | {"num_iterations": 2})
        report = learner.step(micro_batches(learner, size), step=0)
        slack = report.reward_means["red"] - 0.9
        assert slack < 0
        assert report.metrics["slack/red"] == pytest.approx(slack)
        assert report.metrics["multiplier/red"] == 0.7, "as it was in this step"
        assert learner.objective.weight("red", 1) == pytest.approx(0.7 - 2.0 * slack)
    plain = learner_of({"judge": {}, "red": {"weight": 0.7}}, rewards)
    plain.step(micro_batches(plain), step=0)
    equal(applied[0], applied[4])
    equal(applied[2], applied[4])


def test_while_something_is_measured_nothing_is_learned() -> None:
    base = learner_of(
        {"judge": {}, "red": {"floor": {"base": 0.1, "steps": 2}, "multiplier": {"initial": 1.0}}},
        {"judge": ToyJudge(), "red": Channel(0)},
    )
    normal = learner_of({"judge": {"normalize": "standard"}}, {"judge": ToyJudge()})
    for learner, measuring in ((base, 2), (normal, 1)):
        reports = [learner.step(micro_batches(learner, step=step), step=step) for step in range(measuring + 1)]
        assert [report.skipped for report in reports] == [True] * measuring + [False]
        assert all(report.valid_counts["judge"] == 12 for report in reports), "but all are scored"
    means = base.objective.state()["constraints"]["red"]["measured"]
    assert base.step(micro_batches(base, step=3), step=3).metrics["bound/red"] == pytest.approx(sum(means) / 2 + 0.1)
    assert math.isfinite(normal.objective.metrics({}, 2)["running_std/judge"])


def test_what_cannot_be_composed_is_refused_by_its_key() -> None:
    both: dict[str, Reward] = {"judge": ToyJudge(), "style": ToyReward()}
    gated = {"gate": {"reward": "style", "above": 0.0}}
    for terms, more, message in (
        ({"judge": gated, "style": {}}, {}, r"rewards\.judge\.gate\.reward: .*same `learn_from`"),
        ({"judge": {}, "style": {"gate": {"reward": "judge", "above": 0.0}}}, {}, r"rewards\.style\.gate\.reward"),
        ({"judge": {}, "style": {}}, {"combine": "softmin", "temperature": 1.0}, r"combine: .*the same pictures"),
        ({"judge": {"floor": 0.5}, "style": {}}, {"settings": GRPO}, r"judge\.floor: it would be cancelled"),
        ({"judge": {"schedule": [[0, 0.5]]}, "style": {}}, {"settings": GRPO}, r"judge\.schedule: .*scale_rewards"),
    ):
        with pytest.raises(ConfigError, match=message):
            objective_of(terms, both, **more)  # type: ignore[arg-type]
    sampled = {"judge": {"floor": 0.5}, "style": {"learn_from": "samples"}}
    assert list(objective_of(sampled, both, GRPO).sampled) == ["judge", "style"]
    alike = {"judge": gated, "style": {"learn_from": "samples"}}
    assert objective_of(alike, both, combine="softmin", temperature=1.0).active_samples(0) == ("judge", "style")
