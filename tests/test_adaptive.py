"""Multipliers on problems whose constrained optimum is known, bounds of the base, running moments."""

import json
import math

import pytest
import torch
from pydantic import ValidationError

from rewardgen.adaptive import DECAY, Constraint, Learned, MultiplierConfig, OfBase, RunningMoments, ScoreSums
from rewardgen.errors import CheckpointError
from rewardgen.types import Score


def of(*values: float) -> ScoreSums:
    return ScoreSums(count=len(values), total=math.fsum(values), squares=math.fsum(v * v for v in values))


def test_scores_in_half_precision_are_summed_exactly() -> None:
    value_B = (0.8 + 0.02 * torch.randn(4096, generator=torch.Generator().manual_seed(0))).bfloat16()
    sums = ScoreSums.of(Score(value_B=value_B, valid_B=torch.ones(4096, dtype=torch.bool)))
    assert sums.total == float(value_B.double().sum())
    assert sums.squares == float(value_B.double().square().sum())


def ascend(constraint: Constraint, target: float, sign: float, steps: int = 4000, rate: float = 0.02) -> float:
    """Maximise -(x - target)^2 subject to the constraint on r(x) = sign * x, by gradient steps on the Lagrangian."""
    x = 0.0
    for step in range(steps):
        x += rate * (-2 * (x - target) + constraint.sign * sign * constraint.multiplier)
        constraint.update(of(sign * x), step)
    return x


@pytest.mark.parametrize(("ceiling", "bound", "sign"), [(False, -1.0, -1.0), (True, 1.0, 1.0)])
def test_it_converges_to_the_known_constrained_optimum(ceiling: bool, bound: float, sign: float) -> None:
    """max -(x - 2)^2 subject to x <= 1, said as a floor on -x and as a ceiling on x: x = 1, multiplier = 2 (2 - 1)."""
    constraint = Constraint(bound, ceiling=ceiling, config=MultiplierConfig(rate=0.02))
    assert ascend(constraint, 2.0, sign) == pytest.approx(1.0, abs=1e-3)
    assert constraint.multiplier == pytest.approx(2.0, abs=1e-3)
    assert constraint.slack(sign * 1.25) == pytest.approx(-0.25)


def test_a_bound_that_holds_by_itself_costs_nothing_and_an_impossible_one_ends_at_the_maximum() -> None:
    idle = Constraint(0.0, ceiling=False, config=MultiplierConfig(rate=0.02, initial=3.0))
    assert ascend(idle, 2.0, 1.0) == pytest.approx(2.0, abs=1e-3)
    assert idle.multiplier == 0
    stuck = Constraint(5.0, ceiling=False, config=MultiplierConfig(rate=1.0, maximum=4.0))
    for step in range(9):
        stuck.update(of(0.0), step)
    assert stuck.multiplier == 4


@pytest.mark.parametrize(
    ("bound", "level"),
    [({"base": -0.02}, 0.58), ({"base": 0.1}, 0.7), ({"base_percent": -10}, 0.54), ({"base_percent": 10}, 0.66)],
)
def test_the_base_is_measured_first(bound: dict[str, float], level: float) -> None:
    constraint = Constraint(
        OfBase.model_validate(bound | {"steps": 2}), ceiling=False, config=MultiplierConfig(rate=2.0), start=5
    )
    for step, sums in enumerate([of(9.0), of(9.0), of(9.0), of(9.0), of(9.0), of(0.4, 0.6), of(), of(0.7)]):
        assert constraint.level is None
        assert constraint.multiplier == 0
        constraint.update(sums, step)
    assert constraint.level == pytest.approx(level)
    constraint.update(of(level - 0.25), 8)
    assert constraint.multiplier == pytest.approx(0.5)
    assert constraint.weight_at(4) == 0


def test_a_percentage_of_a_negative_base_lowers_it_too() -> None:
    assert OfBase(base_percent=-10).bound(-2.0) == pytest.approx(-2.2)


def test_moments_are_those_of_the_weighted_past() -> None:
    rng = torch.Generator().manual_seed(0)
    steps = [torch.rand(4, generator=rng, dtype=torch.float64) for _ in range(30)]
    moments = RunningMoments()
    assert moments.mean_std() is None
    for values in steps:
        moments.update(of(*values.tolist()))
        moments.update(of())
    weights = torch.tensor([DECAY ** (29 - i) for i in range(30)], dtype=torch.float64).repeat_interleave(4)
    weights, values = weights / weights.sum(), torch.cat(steps)
    mean = float((weights * values).sum())
    std = float((weights * (values - mean) ** 2).sum().sqrt())
    assert moments.mean_std() == pytest.approx((mean, std), rel=1e-9)


def test_equal_scores_have_no_scale() -> None:
    moments = RunningMoments()
    moments.update(of(0.3))
    assert moments.mean_std() is None
    for _ in range(50):
        moments.update(of(0.3, 0.3, 0.3))
    assert moments.mean_std() is None
    moments.update(of(0.3, 0.4))
    assert moments.mean_std() is not None


def make() -> Learned:
    bound = OfBase(base=-0.1, steps=2)
    return Learned(
        {"content": Constraint(bound, ceiling=False, config=MultiplierConfig())}, {"style": RunningMoments()}
    )


def test_the_state_survives_json_and_fits_only_its_own_objective() -> None:
    history = [{"content": of(0.1 * i, 0.2), "style": of(0.3 * i, 0.1)} for i in range(6)]
    whole, first, second = make(), make(), make()
    for step, sums in enumerate(history):
        (first if step < 3 else second).update(sums, step)
        whole.update(sums, step)
        if step == 2:
            second.load_state(json.loads(json.dumps(first.state())))
    assert second.state() == whole.state()
    assert second.metrics(history[-1]) == whole.metrics(history[-1])
    assert set(whole.metrics(history[-1])) == {
        "multiplier/content", "bound/content", "slack/content", "running_mean/style", "running_std/style",
    }  # fmt: skip
    with pytest.raises(CheckpointError, match=r"bounds on \[\], not on \['content'\]"):
        make().load_state({})
    assert Learned({}, {}).state() == {}


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (OfBase, {}),
        (OfBase, {"base": 0.1, "base_percent": 1}),
        (MultiplierConfig, {"initial": 5.0, "maximum": 2.0}),
        (MultiplierConfig, {"rate": 0.0}),
    ],
)
def test_impossible_settings_are_refused(model: type[OfBase | MultiplierConfig], fields: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        model.model_validate(fields)
