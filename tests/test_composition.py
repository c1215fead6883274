"""Terms from scores: closed forms, and partial derivatives against autograd of the formula written out."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from rewardgen.composition import (
    GateConfig,
    Rule,
    Schedule,
    Term,
    compose,
    composed_value,
    factor_at,
    pixel_gradient,
)
from rewardgen.types import Score

NAN = math.nan


def scores(**rows: list[float]) -> dict[str, Score]:
    """Float64 scores; a NaN is a failed one."""
    tensors = {name: torch.tensor(row, dtype=torch.float64) for name, row in rows.items()}
    return {name: Score(value_B=value_B, valid_B=~value_B.isnan()) for name, value_B in tensors.items()}


def total_of(terms: dict[str, Term], rules: dict[str, Rule]) -> Tensor:
    """What a sample adds to the objective: weights outside, unless a term is joined."""
    return torch.stack([(1.0 if rules[n].joined else rules[n].weight) * t.value_B for n, t in terms.items()]).sum(0)


def gradient_of(terms: dict[str, Term], rules: dict[str, Rule], reward: str) -> Tensor:
    parts = [
        (1.0 if rules[n].joined else rules[n].weight) * t.partials[reward]
        for n, t in terms.items()
        if reward in t.partials
    ]
    return torch.stack(parts).sum(0)


def test_a_plain_term_is_its_score_bit_for_bit() -> None:
    value_B = torch.tensor([0.1, NAN, -0.7, 3e-30])
    term = compose({"a": Score(value_B=value_B, valid_B=~value_B.isnan())}, {"a": Rule(weight=0.3)})["a"]
    assert torch.equal(term.value_B, torch.tensor([0.1, 0.0, -0.7, 3e-30]))
    assert term.counted_B.tolist() == [True, False, True, True]
    assert list(term.partials) == ["a"]
    assert torch.equal(term.partials["a"], torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert not term.value_B.requires_grad


def test_a_hard_gate_counts_closed_samples_as_nothing_and_unknown_ones_not_at_all() -> None:
    given_scores = scores(style=[1.0, 2.0, 3.0, 4.0], content=[0.9, 0.1, NAN, 0.5])
    above = {"style": Rule(gate=GateConfig(reward="content", above=0.5))}
    term = compose(given_scores, above)["style"]
    assert term.value_B.tolist() == [1, 0, 0, 0]
    assert term.counted_B.tolist() == [True, True, False, True]
    assert term.open_B.tolist() == [1, 0, 0, 0]
    assert term.partials["style"].tolist() == [1, 0, 0, 0]
    assert "content" not in term.partials
    below = compose(given_scores, {"style": Rule(gate=GateConfig(reward="content", below=0.5))})["style"]
    assert below.value_B.tolist() == [0, 2, 0, 0]


def written_out(style_B: Tensor, content_B: Tensor, judge_B: Tensor, *, tau: float | None, known_KB: Tensor) -> Tensor:
    """2 z_style gated by content, content bounded by 0.4 (multiplier 1.5), judge: summed, or style and judge joined."""
    z_style = (style_B - 0.3) / 0.2
    gate = torch.sigmoid((content_B - 0.4) / 0.1)
    bounded = 1.5 * (content_B - 0.4) * known_KB[1]
    a_style, a_judge = 2.0 * gate * (known_KB[0] & known_KB[1]), 0.7 * known_KB[2]
    if tau is None:
        return bounded + a_style * z_style + a_judge * judge_B
    whole = a_style + a_judge
    inside = a_style * torch.exp(-z_style / tau) + a_judge * torch.exp(-judge_B / tau)
    nobody = whole == 0
    return bounded - tau * whole * torch.log(inside.masked_fill(nobody, 1.0) / whole.masked_fill(nobody, 1.0))


@pytest.mark.parametrize("tau", [None, 0.3, 2.0])
def test_values_and_partials_are_those_of_the_formula_written_out(tau: float | None) -> None:
    rng = torch.Generator().manual_seed(0)
    values_KB = torch.rand(3, 9, generator=rng, dtype=torch.float64)
    known_KB = torch.rand(3, 9, generator=rng) > 0.25
    known_KB[:, 0], known_KB[:, 1] = True, False
    names = ("style", "content", "judge")
    made = {n: Score(value_B=v.where(k, NAN), valid_B=k) for n, v, k in zip(names, values_KB, known_KB, strict=True)}
    joined = tau is not None
    rules = {
        "style": Rule(
            weight=2.0, shift=0.3, scale=0.2, gate=GateConfig(reward="content", above=0.4, width=0.1), joined=joined
        ),
        "content": Rule(weight=1.5, shift=0.4),
        "judge": Rule(weight=0.7, joined=joined),
    }
    terms = compose(made, rules, tau)
    leaves = [row.clone().requires_grad_() for row in values_KB]
    expected_B = written_out(*leaves, tau=tau, known_KB=known_KB)
    torch.testing.assert_close(total_of(terms, rules), expected_B.detach())
    wanted = torch.autograd.grad(expected_B.sum(), leaves)
    for name, known_B, grad_B in zip(names, known_KB, wanted, strict=True):
        torch.testing.assert_close(gradient_of(terms, rules, name), grad_B)
        assert bool((gradient_of(terms, rules, name)[~known_B] == 0).all())


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=3))
def test_the_soft_minimum_lies_between_the_minimum_and_the_weighted_sum(row: list[float]) -> None:
    weights = (0.5, 1.0, 2.0)
    made = scores(**{name: [value] for name, value in zip("abc", row, strict=True)})
    rules = {name: Rule(weight=weight, joined=True) for name, weight in zip("abc", weights, strict=True)}
    mean = sum(w * v for w, v in zip(weights, row, strict=True))

    def at(tau: float) -> float:
        return float(total_of(compose(made, rules, tau), rules))

    assert at(1e6) == pytest.approx(mean, abs=1e-4)
    assert at(1e-3) == pytest.approx(sum(weights) * min(row), abs=0.01)
    assert sum(weights) * min(row) - 1e-9 <= at(0.5) <= mean + 1e-9


def test_within_a_soft_minimum_a_shut_gate_leaves_a_term_out() -> None:
    rules = {
        "a": Rule(weight=1.0, joined=True, gate=GateConfig(reward="c", above=0.0)),
        "b": Rule(weight=2.0, joined=True),
    }
    shut = compose(scores(a=[-50.0, -50.0], b=[1.0, NAN], c=[-1.0, -1.0]), rules, 0.1)
    assert shut["a"].value_B.tolist() == [0, 0]
    assert shut["b"].value_B.tolist() == pytest.approx([2, 0])
    assert shut["b"].counted_B.tolist() == [True, True], "where all gates are shut the sample counts as 0"
    assert shut["b"].partials["b"].tolist() == pytest.approx([2, 0])
    assert shut["a"].partials["a"].tolist() == [0, 0]
    with pytest.raises(ValueError, match="temperature"):
        compose(scores(a=[1.0], b=[1.0], c=[1.0]), rules)


def test_pixel_rows_are_scaled_by_the_partials() -> None:
    made = scores(a=[1.0, 2.0], b=[0.0, 3.0])
    term = compose(made, {"a": Rule(gate=GateConfig(reward="b", above=1.0, width=1.0))})["a"]
    grads = {name: torch.randn(2, 3, 4, 4, dtype=torch.float64) for name in "ab"}
    gradient = pixel_gradient(term, grads)
    expected = sum(term.partials[name][:, None, None, None] * grads[name] for name in "ab")
    assert gradient is not None
    torch.testing.assert_close(gradient, expected)
    assert pixel_gradient(term, {}) is None
    only = pixel_gradient(compose(made, {"a": Rule()})["a"], grads)
    assert only is not None
    assert torch.equal(only, grads["a"])


def test_one_number_for_a_sample() -> None:
    rules = {"a": Rule(weight=2.0), "b": Rule(weight=0.5, shift=1.0), "c": Rule(weight=0.0)}
    terms = compose(scores(a=[1.0, 2.0, NAN], b=[3.0, 1.0, 1.0], c=[NAN, NAN, NAN]), rules)
    found = composed_value(terms, {name: rule.weight for name, rule in rules.items()}, (0, 0, 0))
    assert found.value_B[:2].tolist() == [3.0, 4.0]
    assert found.valid_B.tolist() == [True, True, False]


def test_a_reward_that_does_not_apply_to_a_group_has_no_say_in_it() -> None:
    rules = {"style": Rule(weight=2.0), "faces": Rule(weight=10.0)}
    given_scores = scores(style=[1.0, 2.0, 3.0, 4.0], faces=[0.5, NAN, NAN, NAN])
    found = composed_value(compose(given_scores, rules), {"style": 2.0, "faces": 10.0}, (0, 0, 7, 7))
    # Group 7 has no faces: its style counts alone. In group 0 the second picture's faces failed: no fair comparison.
    assert found.valid_B.tolist() == [True, False, True, True]
    assert found.value_B[[0, 2, 3]].tolist() == pytest.approx([7.0, 6.0, 8.0])
    nobody = composed_value(compose(scores(faces=[NAN, NAN]), {"faces": Rule()}), {"faces": 1.0}, (0, 0))
    assert not nobody.valid_B.any()
    assert not composed_value({}, {}, (0, 0)).valid_B.any()


def test_a_soft_minimum_over_fewer_scores_is_not_compared_with_one_over_more() -> None:
    rules = {"a": Rule(joined=True), "b": Rule(joined=True)}
    terms = compose(scores(a=[1.0, 2.0, 3.0, 4.0], b=[3.0, NAN, NAN, NAN]), rules, 1e-3)
    found = composed_value(terms, {"a": 1.0, "b": 1.0}, (0, 0, 7, 7))
    assert found.valid_B.tolist() == [True, False, True, True]
    assert found.value_B[[0, 2, 3]].tolist() == pytest.approx([2.0, 3.0, 4.0], abs=1e-2)


def test_schedules_are_straight_lines_between_their_points() -> None:
    points = ((10, 0.0), (20, 1.0), (40, 0.5))
    assert [factor_at(points, step) for step in (0, 10, 15, 20, 30, 40, 99)] == [0, 0, 0.5, 1, 0.75, 0.5, 0.5]
    assert factor_at((), 7) == 1
    for wrong in ([(3, 1.0), (3, 2.0)], [(0, -1.0)]):
        with pytest.raises(ValidationError):
            TypeAdapter(Schedule).validate_python(wrong)


@pytest.mark.parametrize("sides", [{}, {"above": 0.1, "below": 0.2}, {"above": 0.1, "width": 0.0}])
def test_a_gate_has_one_side_and_a_positive_width(sides: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        GateConfig.model_validate({"reward": "x"} | sides)
