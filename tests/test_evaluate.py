"""Evaluation and comparison: paired by noise, masked where invalid, equal to the textbook's statistics."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.console import Console
from torch import Tensor, nn

from rewardgen.errors import ConfigError, ScoringError, UserError
from rewardgen.evaluation.compare import (
    Interval,
    compare,
    gap_closed,
    render_markdown,
    render_table,
)
from rewardgen.evaluation.evaluate import Evaluation, EvaluationConfig, evaluate
from rewardgen.evaluation.score import reference_scores, score_pictures, target_scores
from rewardgen.reward import Reward
from rewardgen.types import Example, Score
from tests.toys import IMAGE_SIZE, ToyDataset, ToyPolicy, ToyReward


class Brightness(Reward):
    """Mean of the pixels, and what it was asked."""

    differentiable: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []
        self.seen: list[Tensor] = []

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        assert not torch.is_grad_enabled()
        self.batches.append(len(examples))
        self.seen.append(pixels_B3HW)
        return Score(value_B=pixels_B3HW.mean((1, 2, 3)), valid_B=torch.ones(len(examples), dtype=torch.bool))


class BrokenPolicy(ToyPolicy):
    """Draws NaN for one prompt, and has a part that must be off while it is judged."""

    def __init__(self, broken: str = "", **options: Any) -> None:
        super().__init__(**options)
        self.broken = broken
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.Dropout(0.5).eval()

    def encode(self, examples: Sequence[Example]) -> Any:
        self.modes = (self.training, self.dropout.training)
        condition = super().encode(examples)
        for place, example in enumerate(examples):
            if example.prompt == self.broken:
                condition.vector_BD[place] = torch.nan
        return condition


def draw(policy: ToyPolicy, examples: Sequence[Example], **options: Any) -> Evaluation:
    chosen: dict[str, Any] = {"metrics": {"style": ToyReward(), "brightness": Brightness()}}
    chosen |= {"image_size": IMAGE_SIZE, "num_steps": 4, "batch_size": 3, "seed": 0} | options
    return evaluate(policy, examples, chosen.pop("metrics"), **chosen)


def assert_same(a: Evaluation, b: Evaluation, tolerance: float = 1e-5) -> None:
    assert a.example_ids == b.example_ids
    assert a.scores.keys() == b.scores.keys()
    for name, score in a.scores.items():
        assert torch.equal(score.valid_B, b.scores[name].valid_B)
        torch.testing.assert_close(
            score.value_B, b.scores[name].value_B, rtol=tolerance, atol=tolerance, equal_nan=True
        )


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_the_batch_size_changes_nothing(batch_size: int) -> None:
    examples, policy = ToyDataset(10).examples, ToyPolicy()
    reference = draw(policy, examples, batch_size=3, keep_pixels=10)
    other = draw(policy, examples, batch_size=batch_size, keep_pixels=10)
    assert_same(reference, other)
    assert reference.example_ids == tuple(example.id for example in examples)
    assert reference.pixels_K3HW is not None
    assert other.pixels_K3HW is not None
    torch.testing.assert_close(reference.pixels_K3HW, other.pixels_K3HW, rtol=0, atol=1e-5)


def test_an_examples_picture_depends_on_its_id_and_the_seed_alone() -> None:
    examples, policy = ToyDataset(6).examples, ToyPolicy()
    order = [4, 0, 5, 2]
    whole, part = draw(policy, examples, keep_pixels=6), draw(policy, [examples[i] for i in order], keep_pixels=4)
    assert whole.pixels_K3HW is not None
    assert part.pixels_K3HW is not None
    torch.testing.assert_close(part.pixels_K3HW, whole.pixels_K3HW[order], rtol=0, atol=1e-6)
    renamed = [dataclasses.replace(example, id=f"other-{example.id}") for example in examples]
    for changed in (draw(policy, renamed, keep_pixels=6), draw(policy, examples, seed=1, keep_pixels=6)):
        assert changed.pixels_K3HW is not None
        assert not torch.allclose(changed.pixels_K3HW, whole.pixels_K3HW, atol=1e-3)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert_same(draw(policy, examples), whole, tolerance=0)
    assert torch.equal(torch.get_rng_state(), before), "no global randomness is used"


def test_metrics_see_clamped_pictures_without_gradient_and_only_some_are_kept() -> None:
    examples, metric = ToyDataset(7).examples, Brightness()
    result = draw(ToyPolicy(), examples, metrics={"brightness": metric}, batch_size=3, keep_pixels=4)
    assert metric.batches == [3, 3, 1]
    seen = torch.cat(metric.seen)
    assert seen.min() == 0
    assert seen.max() == 1
    assert result.pixels_K3HW is not None
    assert torch.equal(result.pixels_K3HW, seen[:4])
    assert torch.equal(result.scores["brightness"].value_B, seen.mean((1, 2, 3)).double())
    assert draw(ToyPolicy(), examples).pixels_K3HW is None


def test_what_failed_is_masked_counted_and_in_no_average() -> None:
    examples = ToyDataset(7).examples
    examples[3] = dataclasses.replace(examples[3], style_refs=())
    metrics = {"style": ToyReward(fail_ids=("toy-001",)), "none": ToyReward(fail_ids=[e.id for e in examples])}
    result = draw(ToyPolicy(), examples, metrics=metrics)
    valid = [place not in (1, 3) for place in range(7)]
    assert result.scores["style"].valid_B.tolist() == valid
    assert result.scores["style"].value_B.isnan().tolist() == [not ok for ok in valid]
    assert result.valid_counts() == {"style": 5, "none": 0}
    assert result.means().keys() == {"style"}
    clean = draw(ToyPolicy(), [example for example, ok in zip(examples, valid, strict=True) if ok])
    assert result.means()["style"] == pytest.approx(clean.means()["style"], abs=1e-6)


def test_a_broken_picture_spoils_neither_its_score_nor_its_neighbours() -> None:
    """`Brightness` would happily score what NaN was replaced by."""
    examples = ToyDataset(5).examples
    broken, whole = draw(BrokenPolicy("thing 2"), examples), draw(BrokenPolicy(), examples)
    for name in ("style", "brightness"):
        assert broken.scores[name].valid_B.tolist() == [True, True, False, True, True]
        others = broken.scores[name].valid_B
        torch.testing.assert_close(broken.scores[name].value_B[others], whole.scores[name].value_B[others])


def test_the_policy_is_judged_in_evaluation_mode_and_left_as_it_was() -> None:
    policy = BrokenPolicy().train()
    policy.frozen.eval()
    draw(policy, ToyDataset(2).examples)
    assert policy.modes == (False, False)
    assert (policy.training, policy.dropout.training, policy.frozen.training) == (True, True, False)
    with pytest.raises(ScoringError):
        draw(policy, ToyDataset(2).examples, metrics={"wrong": WrongShape()})
    assert policy.training


class WrongShape(Brightness):
    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        return Score(value_B=torch.zeros(1, 1), valid_B=torch.ones(len(examples), dtype=torch.bool))


def test_precision_reaches_the_policy() -> None:
    examples = ToyDataset(3).examples
    full, half = draw(ToyPolicy(), examples), draw(ToyPolicy(), examples, precision="bf16")
    difference = (full.scores["style"].value_B - half.scores["style"].value_B).abs()
    assert 0 < float(difference.max()) < 0.05


def test_examples_must_be_there_and_unique() -> None:
    examples = ToyDataset(2).examples
    with pytest.raises(ConfigError, match="no examples"):
        draw(ToyPolicy(), [])
    with pytest.raises(ConfigError, match="'toy-000' occurs more than once"):
        draw(ToyPolicy(), [*examples, examples[0]])


def test_json_keeps_every_bit_of_a_score() -> None:
    result = draw(ToyPolicy(), ToyDataset(5).examples, metrics={"style": ToyReward(fail_ids=("toy-001",))})
    text = json.dumps(result.to_json(), allow_nan=False)
    assert_same(Evaluation.from_json(json.loads(text)), result, tolerance=0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "KeyError: 'example_ids'"),
        ({"example_ids": ["a"], "scores": {"style": [1, 2]}}, "metric 'style' has 2 values for 1 examples"),
        ({"example_ids": ["a"], "scores": {"style": ["x"]}}, "could not convert"),
        ({"example_ids": ["a"], "scores": []}, "AttributeError"),
    ],
)
def test_what_is_no_evaluation_is_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Evaluation.from_json(data)


def evaluation_of(values: Sequence[float | None], name: str = "style") -> Evaluation:
    ids = [f"e{place}" for place in range(len(values))]
    return Evaluation.from_json({"example_ids": ids, "scores": {name: list(values)}})


numbers = st.floats(-10, 10).map(lambda value: round(value, 3))


@settings(max_examples=50, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.none() | numbers, st.none() | numbers), min_size=1, max_size=12),
    confidence=st.sampled_from([0.5, 0.95, 0.99]),
)
def test_the_interval_is_that_of_the_paired_t_test(
    pairs: list[tuple[float | None, float | None]], confidence: float
) -> None:
    base, trained = evaluation_of([a for a, _ in pairs]), evaluation_of([b for _, b in pairs])
    (row,) = compare(base, trained, confidence=confidence).rows
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    assert row.valid == len(both)
    assert row.base_valid == sum(a is not None for a, _ in pairs)
    assert row.trained_valid == sum(b is not None for _, b in pairs)
    if not both:
        assert (row.base, row.trained, row.change) == (None, None, None)
        return
    assert row.change is not None
    assert row.base is not None
    assert row.trained is not None
    assert row.base == pytest.approx(sum(a for a, _ in both) / len(both))
    assert row.trained == pytest.approx(sum(b for _, b in both) / len(both))
    assert row.change.value == pytest.approx(row.trained - row.base, abs=1e-9)
    if len(both) == 1:
        assert row.change.low is row.change.high is None
    elif len({round(b - a, 9) for a, b in both}) > 1:
        test = scipy.stats.ttest_rel([b for _, b in both], [a for a, _ in both])
        limits = test.confidence_interval(confidence)
        assert row.change.low == pytest.approx(limits.low, rel=1e-6, abs=1e-9)
        assert row.change.high == pytest.approx(limits.high, rel=1e-6, abs=1e-9)
    else:
        assert row.change.low == pytest.approx(row.change.high), "no spread, no width"


def normal(n: int, mean: float, spread: float, seed: int) -> Tensor:
    return mean + spread * torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_bootstrap_agrees_with_t_where_both_hold() -> None:
    base = normal(200, 0.5, 0.2, seed=0)
    before, after = evaluation_of(base.tolist()), evaluation_of((base + normal(200, 0.1, 0.05, seed=1)).tolist())
    change_t = compare(before, after).rows[0].change
    change_b = compare(before, after, method="bootstrap").rows[0].change
    assert change_t is not None
    assert change_b is not None
    assert change_b.value == change_t.value
    assert change_b.low == pytest.approx(change_t.low, abs=1e-3)
    assert change_b.high == pytest.approx(change_t.high, abs=1e-3)
    assert compare(before, after, method="bootstrap").rows[0].change == change_b, "repeats"


def test_the_bootstrap_covers_as_often_as_it_says() -> None:
    """95 % intervals of a mean that is 0 by construction: of 200, some 190 cover it (at 30 examples a little fewer)."""
    covered = 0
    for trial in range(200):
        change = normal(30, 0.0, 1.0, seed=trial).tolist()
        zero = evaluation_of([0.0] * 30)
        interval = compare(zero, evaluation_of(change), method="bootstrap", resamples=400).rows[0].change
        assert interval is not None
        assert interval.low is not None
        assert interval.high is not None
        covered += interval.low <= 0 <= interval.high
    assert 178 <= covered <= 198


@settings(max_examples=30, deadline=None)
@given(share=st.floats(-0.5, 1.5), n=st.integers(2, 30), seed=st.integers(0, 100))
def test_a_known_share_of_the_gap_is_found(share: float, n: int, seed: int) -> None:
    base = normal(n, 0.4, 0.1, seed)
    ceiling = base + normal(n, 0.3, 0.05, seed + 1).clamp(min=0.1)
    found = gap_closed(base, base + share * (ceiling - base), ceiling, resamples=50)
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    assert found.value == pytest.approx(share, abs=1e-9)
    assert found.low == pytest.approx(share, abs=1e-9), "the same share everywhere leaves no doubt"
    assert found.high == pytest.approx(share, abs=1e-9)


def test_the_gaps_interval_is_near_the_delta_methods() -> None:
    gap, noise = normal(400, 0.3, 0.05, 0), normal(400, 0.0, 0.1, 1)
    zero = torch.zeros(400, dtype=torch.float64)
    found = gap_closed(zero, 0.5 * gap + noise, gap)
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    half = 1.96 * float((0.5 * gap + noise - found.value * gap).std()) / 400**0.5 / float(gap.mean())
    assert found.value - found.low == pytest.approx(half, rel=0.1)
    assert found.high - found.value == pytest.approx(half, rel=0.1)


def test_where_there_is_no_gap_none_is_claimed() -> None:
    one = torch.ones(6, dtype=torch.float64)
    assert gap_closed(one[:0], one[:0], one[:0]) is None
    assert gap_closed(one, 2 * one, one) is None
    assert gap_closed(one, 2 * one, 0.5 * one) is None
    assert gap_closed(one[:1], 1.5 * one[:1], 2 * one[:1]) == Interval(value=0.5)
    doubtful = torch.tensor([1.0, -1, 1, -1, 1, -0.5], dtype=torch.float64)
    unsure = gap_closed(0 * one, one, doubtful)
    assert unsure is not None
    assert unsure.low is unsure.high is None


def test_the_gap_is_taken_over_examples_that_all_three_have() -> None:
    base, trained = evaluation_of([0.0, 0.0, None, 0.0]), evaluation_of([0.5, None, 0.5, 3.0])
    row = compare(base, trained, ceiling=evaluation_of([1.0, 1.0, 1.0, None])).rows[0]
    assert (row.valid, row.ceiling, row.gap_closed) == (2, 1.0, Interval(value=0.5))
    assert row.change is not None
    assert row.change.value == 1.75, "the change does not need the true picture"


def test_only_like_is_compared_with_like() -> None:
    two = evaluation_of([1.0, 2.0])
    with pytest.raises(UserError, match="different examples"):
        compare(two, evaluation_of([1.0]))
    with pytest.raises(UserError, match="different metrics: style and csd"):
        compare(two, evaluation_of([1.0, 2.0], name="csd"))
    with pytest.raises(UserError, match="different examples"):
        compare(two, two, ceiling=evaluation_of([1.0]))


def test_the_true_pictures_score_as_they_do() -> None:
    examples = ToyDataset(6).examples
    examples[1] = dataclasses.replace(examples[1], target=None)
    examples[4] = dataclasses.replace(examples[4], target=torch.full((3, 5, 9), 0.25))
    found = target_scores(examples, {"brightness": Brightness(), "style": ToyReward()}, batch_size=2)
    for place, example in enumerate(examples):
        value, valid = found.scores["brightness"].value_B[place], bool(found.scores["brightness"].valid_B[place])
        assert valid == (example.target is not None)
        assert example.target is None or float(value) == pytest.approx(float(example.target.mean()), abs=1e-6)
    assert found.valid_counts() == {"brightness": 5, "style": 5}
    assert found.example_ids == tuple(example.id for example in examples)


def test_reference_rows_are_what_their_names_say() -> None:
    examples = ToyDataset(4).examples
    examples[0] = dataclasses.replace(examples[0], content_refs=(torch.full((3, 20, 12), 0.5),))
    examples[2] = dataclasses.replace(examples[2], target=None, content_refs=())
    metric = Brightness()
    rows = reference_scores(examples, {"brightness": metric}, image_size=IMAGE_SIZE)
    copied, others = rows["content copied"].scores["brightness"], rows["another's target"].scores["brightness"]
    assert copied.valid_B.tolist() == [True, True, False, True]
    assert float(copied.value_B[0]) == pytest.approx(0.5, abs=1e-6)
    assert float(copied.value_B[3]) == pytest.approx(float(examples[3].content_refs[0].mean()), abs=1e-6)
    assert others.valid_B.tolist() == [True, True, False, True]
    for place, other in ((0, 1), (1, 3), (3, 0)):
        target = examples[other].target
        assert target is not None
        assert float(others.value_B[place]) == pytest.approx(float(target.mean()), abs=1e-6)
    assert all(seen.shape[2:] == IMAGE_SIZE for seen in metric.seen)


def test_no_pictures_at_all_is_no_fault() -> None:
    examples = ToyDataset(2).examples
    found = score_pictures(examples, [None, None], {"brightness": Brightness()})
    assert found.means() == {}
    assert compare(found, found, ceiling=found).rows[0].change is None


def test_tables_hold_the_numbers() -> None:
    names = {"a|b": [0.0, 0.0, 0.0], "none": [None, None, None]}
    base = Evaluation.from_json({"example_ids": ["x", "y", "z"], "scores": names})
    after = Evaluation.from_json({"example_ids": ["x", "y", "z"], "scores": names | {"a|b": [0.25, 0.25, 0.25]}})
    truth = Evaluation.from_json({"example_ids": ["x", "y", "z"], "scores": names | {"a|b": [1.0, 1.0, 1.0]}})
    comparison = compare(base, after, ceiling=truth)
    text = render_markdown(comparison)
    assert text.splitlines()[0] == "3 held-out examples, paired; change with its 95 % interval (Student's t)"
    table = text.splitlines()[2:]
    assert table[0] == "| metric | base | trained | change | valid | target | gap closed |"
    assert table[2] == ("| a\\|b | 0.0000 | 0.2500 | +0.2500 (+0.2500 to +0.2500) | 3/3 | 1.0000 | 25% (25% to 25%) |")
    assert table[3] == "| none | - | - | - | 0/3 | - | - |"
    out = io.StringIO()
    Console(file=out, width=120).print(render_table(comparison))
    assert "+0.2500 (+0.2500 to +0.2500)" in out.getvalue()
    narrow = io.StringIO()
    Console(file=narrow, width=72).print(render_table(comparison))
    assert "…" not in narrow.getvalue(), "intervals wrap, nothing is cut"
    assert max(len(line) for line in narrow.getvalue().splitlines()) <= 72
    assert "target" not in render_markdown(compare(base, after))
    plain = json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    assert plain["rows"][0]["change"] == {"value": 0.25, "low": 0.25, "high": 0.25}
    assert (plain["num_examples"], plain["method"]) == (3, "t")


def test_a_table_of_80_columns_shows_every_name_and_number_whole() -> None:
    names = ["style", "palette_texture", "sixteen_letters_", "a_name_that_is_too_long_for_one_line_of_the_table"]
    base, after, truth = (
        Evaluation.from_json({"example_ids": [str(i) for i in range(64)], "scores": dict.fromkeys(names, values)})
        for values in ([i / 64 for i in range(64)], [-i / 64 for i in range(64)], [9.0] * 64)
    )
    comparison = compare(base, after, ceiling=truth)
    out = io.StringIO()
    Console(file=out, width=80).print(render_table(comparison))
    lines = out.getvalue().splitlines()
    assert max(len(line) for line in lines) <= 80
    assert "…" not in out.getvalue()
    assert all(any(line.startswith(f" {name} ") for line in lines) for name in names[:3])
    assert names[3] in "".join(line[1:23].strip() for line in lines)
    change = comparison.rows[0].change
    assert change is not None
    assert change.low is not None
    assert all(f"{number:+.4f}" in out.getvalue() for number in (change.value, change.low))


def test_the_configuration_has_the_defaults_of_its_docstrings() -> None:
    config = EvaluationConfig()
    assert (config.every, config.num_steps, config.witnesses) == (0, None, {})
    for key, value in (("batch_size", 0), ("num_examples", 0), ("every", -1), ("witness", {})):
        with pytest.raises(ValidationError):
            EvaluationConfig.model_validate({key: value})
