"""Terms, masks, global counts and the failure limit."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rewardgen.errors import CheckpointError, ConfigError, ScoringError
from rewardgen.objective import (
    FLOW_MATCHING,
    Objective,
    ObjectiveConfig,
    check_differentiable,
    composition_faults,
    masked_sum,
)
from rewardgen.reward import Reward
from rewardgen.types import Score
from tests.toys import ToyReward


def config(**fields: object) -> ObjectiveConfig:
    reward = {"use": "toy", "weight": 0.5, "start_step": 3}
    return ObjectiveConfig.model_validate({"rewards": {"style": reward}} | fields)


def test_terms_start_when_they_should() -> None:
    objective = Objective(config(flow_matching={"weight": 2.0, "start_step": 1}), {"style": ToyReward()})
    assert [objective.weight(FLOW_MATCHING, step) for step in range(4)] == [0, 2, 2, 2]
    assert [objective.active_rewards(step) for step in (0, 2, 3)] == [(), (), ("style",)]
    assert [objective.needs_rollout(step) for step in (0, 2, 3)] == [False, False, True]
    off = Objective(config(rewards={"style": {"use": "toy", "weight": 0}}), {"style": ToyReward()})
    assert not off.needs_rollout(100)


def test_coefficients_are_the_loss_of_the_papers() -> None:
    """L = w_fm * mean(fm) - w_r * mean(r), from sums and counts."""
    objective = Objective(config(flow_matching={"weight": 2.0}), {"style": ToyReward()})
    fm, rewards = torch.tensor([1.0, 4.0, 1.0]), torch.tensor([0.5, math.nan, 0.25])
    total, count = masked_sum(Score(value_B=rewards, valid_B=torch.tensor([True, False, True])))
    loss = objective.coefficient(FLOW_MATCHING, 5, 3) * fm.sum() + objective.coefficient("style", 5, count) * total
    assert count == 2
    assert float(loss) == pytest.approx(2.0 * 2.0 - 0.5 * 0.375)
    assert objective.coefficient("style", 5, 0) == 0
    assert objective.coefficient("style", 0, 2) == 0


@given(st.lists(st.tuples(st.floats(-10, 10), st.booleans()), min_size=1, max_size=8))
def test_masked_values_never_reach_sum_or_gradient(rows: list[tuple[float, bool]]) -> None:
    valid_B = torch.tensor([valid for _, valid in rows])
    value_B = torch.tensor([value if valid else math.nan for value, valid in rows], requires_grad=True)
    total, count = masked_sum(Score(value_B=value_B, valid_B=valid_B))
    assert count == sum(valid for _, valid in rows)
    assert float(total.detach()) == pytest.approx(sum(value for value, valid in rows if valid), abs=1e-4)
    (grad_B,) = torch.autograd.grad(total, value_B)
    assert torch.equal(grad_B, valid_B.float())


def test_rewards_are_frozen() -> None:
    reward = ToyReward().train()
    Objective(config(), {"style": reward})
    assert not reward.training
    assert not any(parameter.requires_grad for parameter in reward.parameters())


def test_a_reward_without_gradient_is_refused() -> None:
    class Judge(ToyReward):
        differentiable = False

    with pytest.raises(ConfigError, match=r"objective\.rewards\.style: Judge has no gradient"):
        Objective(config(), {"style": Judge()})
    with pytest.raises(ConfigError, match=r"objective\.rewards\.x"):
        check_differentiable("x", Judge)
    check_differentiable("x", ToyReward)


def test_names_must_match() -> None:
    rewards: dict[str, Reward] = {"stile": ToyReward()}
    with pytest.raises(ConfigError, match="stile"):
        Objective(config(), rewards)


@pytest.mark.parametrize(
    "fields",
    [
        {"rewards": {}, "flow_matching": {"weight": 0}},
        {"rewards": {"flow_matching": {"use": "toy"}}},
        {"rewards": {"a": {"use": "toy", "weight": -1}}},
        {"rewards": {"a": {"use": "toy", "weight": math.inf}}},
        {"max_failed_share": 1.5},
    ],
)
def test_impossible_objectives_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ObjectiveConfig.model_validate(fields)


def test_too_many_failures_stop_the_run() -> None:
    objective = Objective(config(failure_window=8), {"style": ToyReward()})
    for _ in range(20):
        objective.observe("style", torch.tensor([True, False]))
    with pytest.raises(ScoringError, match="reward 'style': 6 of its last 9 scores"):
        objective.observe("style", torch.tensor([False, False, False]))


def test_few_scores_are_no_verdict_and_a_term_may_have_its_own_limit() -> None:
    objective = Objective(config(failure_window=8), {"style": ToyReward()})
    objective.observe("style", torch.zeros(7, dtype=torch.bool))
    with pytest.raises(ScoringError, match="8 of its last 8"):
        objective.observe("style", torch.zeros(1, dtype=torch.bool))
    lenient = config(rewards={"style": {"use": "toy", "max_failed_share": 1.0}}, failure_window=2)
    Objective(lenient, {"style": ToyReward()}).observe("style", torch.zeros(9, dtype=torch.bool))


def test_a_step_is_judged_whole_however_many_processes_it_has() -> None:
    """The last process's failures alone are no more than the others'."""
    objective = Objective(config(failure_window=8), {"style": ToyReward()})
    step = torch.ones(64, dtype=torch.bool)
    step[-8:] = False
    for _ in range(5):
        objective.observe("style", step)
    with pytest.raises(ScoringError, match="56 of its last 64 scores"):
        objective.observe("style", ~step)


def test_samples_of_one_example_that_fail_together_count_as_one_example() -> None:
    class Judge(ToyReward):
        differentiable = False

    settings = config(failure_window=4, policy_gradient={"kind": "grpo", "num_generations": 8})
    objective = Objective(settings, {"style": Judge()})
    for example in range(40):  # every third cannot be scored: a window of examples, not of samples
        objective.observe("style", torch.tensor([example % 3 > 0]).repeat(8))
    objective.observe("style", torch.zeros(8, dtype=torch.bool))
    with pytest.raises(ScoringError, match="24 of its last 32"):
        objective.observe("style", torch.zeros(8, dtype=torch.bool))


def test_failures_are_remembered_over_a_resume() -> None:
    first = Objective(config(failure_window=4), {"style": ToyReward()})
    first.observe("style", torch.tensor([True, False, False]))
    second = Objective(config(failure_window=4), {"style": ToyReward()})
    second.load_state(first.state())
    with pytest.raises(ScoringError, match="3 of its last 4"):
        second.observe("style", torch.tensor([False]))
    with pytest.raises(CheckpointError, match="other"):
        second.load_state({"failed": {"other": []}})


def composed(rewards: dict[str, dict[str, object]], **fields: object) -> ObjectiveConfig:
    terms = {name: {"use": "toy"} | term for name, term in rewards.items()}
    return ObjectiveConfig.model_validate({"rewards": terms} | fields)


@pytest.mark.parametrize(
    ("rewards", "fields", "path", "message"),
    [
        ({"a": {"floor": 1.0, "ceiling": 2.0}}, {}, "rewards.a.ceiling", "name the reward twice"),
        (
            {"a": {"floor": 1.0, "weight": 1.0}},
            {},
            "rewards.a.weight",
            "a reward with a floor counts",
        ),
        ({"a": {"ceiling": 1.0, "normalize": "standard"}}, {}, "rewards.a.normalize", "a reward with a ceiling"),
        ({"a": {"floor": 1.0, "schedule": [[0, 1.0]]}}, {}, "rewards.a.schedule", "leave `schedule` out"),
        ({"a": {"multiplier": {"rate": 2.0}}}, {}, "rewards.a.multiplier", "no floor or ceiling"),
        ({"a": {"gate": {"reward": "contnt", "above": 0}}, "content": {}}, {}, "rewards.a.gate.reward", "'content'"),
        ({"a": {"gate": {"reward": "a", "above": 0}}}, {}, "rewards.a.gate.reward", "no other reward"),
        ({"a": {}, "b": {"floor": {"base": 0}, "start_step": 5}}, {}, "rewards.b.start_step", "a would train before"),
        ({"a": {}, "b": {}}, {"combine": "softmin"}, "temperature", "needs one"),
        ({"a": {}, "b": {}}, {"temperature": 1.0}, "temperature", "belongs to"),
        ({"a": {}, "b": {"floor": 1.0}}, {"combine": "softmin", "temperature": 1.0}, "combine", "at least two rewards"),
    ],
)
def test_what_does_not_fit_together_is_named_by_its_key(
    rewards: dict[str, dict[str, object]], fields: dict[str, object], path: str, message: str
) -> None:
    config = composed(rewards, **fields)
    (fault,) = composition_faults(config)
    assert fault[0] == path
    assert message in fault[1]
    with pytest.raises(ConfigError, match=f"objective.{path}: "):
        Objective(config, {name: ToyReward() for name in rewards})


def test_settings_that_are_not_used_are_not_written_and_those_that_are_come_back() -> None:
    plain = composed({"a": {}}).model_dump(mode="json")
    assert set(plain) == {"flow_matching", "rewards", "max_failed_share", "failure_window"}
    assert set(plain["flow_matching"]) == {"weight", "start_step"}
    assert set(plain["rewards"]["a"]) == {"use", "args", "weight", "start_step", "max_failed_share"}
    full = composed(
        {
            "a": {"normalize": "standard", "gate": {"reward": "b", "below": 1.0}, "schedule": [[0, 0.0], [9, 1.0]]},
            "b": {"floor": {"base": -0.02}, "multiplier": {"rate": 5.0}},
            "c": {"ceiling": 0.5},
            "d": {},
        },
        combine="softmin",
        temperature=0.5,
        flow_matching={"schedule": [[0, 1.0], [5, 0.5]]},
    )
    written = json.loads(json.dumps(full.model_dump(mode="json")))
    assert "weight" not in written["rewards"]["b"], "what is written must be accepted again"
    again = ObjectiveConfig.model_validate_json(json.dumps(written), strict=True)
    assert again == full
    assert not list(composition_faults(again))
    off = composed({"a": {}, "b": {"floor": {"base": 0}, "multiplier": {"rate": 5.0}, "weight": 0.0}})
    assert off.model_dump(mode="json")["rewards"]["b"]["weight"] == 0
    assert Objective(off, {"a": ToyReward(), "b": ToyReward()}).active_rewards(3) == ("a",)


def test_who_is_scored_and_with_what_weight() -> None:
    config = composed(
        {
            "a": {"weight": 2.0, "gate": {"reward": "c", "above": 0}, "schedule": [[4, 0.0], [6, 1.0]]},
            "b": {"floor": 0.5, "start_step": 2, "multiplier": {"initial": 3.0}},
            "c": {"weight": 0.0},
        }
    )
    objective = Objective(config, {name: ToyReward() for name in "abc"})
    assert [objective.active_rewards(step) for step in (1, 2, 5)] == [(), ("b",), ("a", "b", "c")]
    assert [objective.weight("a", step) for step in (4, 5, 9)] == [0, 1, 2]
    assert [objective.weight("b", step) for step in (1, 2)] == [0, 3]
    assert list(objective.rules(5)) == ["a", "b"], "what only gates is no term of the loss"
    assert objective.coefficient("b", 2, 6) == -0.5
