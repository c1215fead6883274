"""Group-relative advantages against their formula, and what is masked."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewardgen.flow.advantage import EPS, group_advantages
from rewardgen.types import Score


def score(values: list[float], valid: list[bool] | None = None) -> Score:
    return Score(value_B=torch.tensor(values), valid_B=torch.tensor([True] * len(values) if valid is None else valid))


ROWS = st.lists(
    st.tuples(st.integers(-8, 8), st.booleans(), st.integers(0, 3)), min_size=1, max_size=16
)  # eighths: sums of them are exact, so that equal means equal


@given(ROWS, st.sampled_from(["group", "batch", "none"]), st.sampled_from([0.5, 5.0]))
def test_the_formula_group_by_group(rows: list[tuple[int, bool, int]], scale: str, clip: float) -> None:
    values = [value / 8 if valid else math.nan for value, valid, _ in rows]
    groups = [group for _, _, group in rows]
    found = group_advantages(
        score(values, [valid for _, valid, _ in rows]),
        groups,
        scale=scale,  # type: ignore[arg-type]
        clip=clip,
    )
    everyone = [value for value, (_, valid, _) in zip(values, rows, strict=True) if valid]
    for index, (_, valid, group) in enumerate(rows):
        others = [v for v, (_, ok, g) in zip(values, rows, strict=True) if ok and g == group]
        takes_part = valid and len(set(others)) > 1
        assert bool(found.taking_part_N[index]) == takes_part
        expected = 0.0
        if takes_part:
            divisor = {"none": 1.0, "group": 0.0, "batch": 0.0}[scale]
            if scale != "none":
                divisor = statistics.stdev(others if scale == "group" else everyone) + EPS
            expected = max(-clip, min(clip, (values[index] - statistics.fmean(others)) / divisor))
        assert float(found.value_N[index]) == pytest.approx(expected, abs=1e-9)


def test_a_group_without_a_difference_takes_no_part() -> None:
    equal, single, failed = score([0.3, 0.3, 0.3 + 1e-8]), score([0.1, 0.9, 0.5], [False, True, False]), [False] * 3
    for scores in (equal, single, score([math.nan] * 3, failed)):
        found = group_advantages(scores, (4, 4, 4), scale="group", clip=5.0)
        assert found.value_N.tolist() == [0.0] * 3
        assert not found.taking_part_N.any()


def test_advantages_of_a_group_sum_to_zero_and_are_standardised() -> None:
    found = group_advantages(score([1.0, 2.0, 4.0, 9.0]), (0, 0, 0, 0), scale="group", clip=5.0).value_N
    assert float(found.sum()) == pytest.approx(0, abs=1e-12)
    assert float(found.std()) == pytest.approx(1, abs=1e-3)
    alone = group_advantages(score([1.0, 2.0]), (0, 0), scale="batch", clip=9.0, population_V=torch.tensor([0.0, 8.0]))
    assert alone.value_N.tolist() == pytest.approx([-0.5 / (32**0.5 + EPS), 0.5 / (32**0.5 + EPS)])


@given(st.permutations(range(6)))
def test_the_order_of_samples_does_not_matter(order: list[int]) -> None:
    values, valid, groups = [1.0, 5.0, 2.0, 2.5, 9.0, 3.0], [True, True, False, True, True, True], [0, 0, 0, 1, 1, 1]
    straight = group_advantages(score(values, valid), groups, scale="batch", clip=5.0)
    shuffled = group_advantages(
        score([values[i] for i in order], [valid[i] for i in order]),
        [groups[i] for i in order],
        scale="batch",
        clip=5.0,
    )
    assert shuffled.value_N.tolist() == pytest.approx(straight.value_N[order].tolist())
