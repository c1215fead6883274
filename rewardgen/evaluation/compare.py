"""Paired comparison of two policies on the same examples and noise, and how near the better comes to the truth.

Shape suffixes: N examples, R bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from textwrap import wrap
from typing import Any, Literal, TypeAlias

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from rewardgen.errors import UserError
from rewardgen.evaluation.evaluate import Evaluation

Method: TypeAlias = Literal["t", "bootstrap"]

NAME_WIDTH = 22
"""Longer names of metrics are folded on a terminal: with this width a table fits into 80 columns, whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """An estimate and its confidence limits, None where the data do not give any."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricComparison:
    """One metric, before and after training.

    Args:
        name: of the metric.
        base: mean before, over the examples valid in both; None if there are none.
        trained: mean after, over the same.
        change: mean difference and its paired interval.
        valid: examples valid in both.
        base_valid: examples valid before.
        trained_valid: examples valid after.
        ceiling: mean of the true pictures over those of the same examples that have one.
        gap_closed: (trained - base) / (ceiling - base), see `gap_closed`.
        counts: what the metric counted beside its values (`Score.counts`), such as a judge's answers by the way they
            came: under `base`, `trained` and `ceiling`, of all examples. Empty where it counts nothing.
    """

    name: str
    base: float | None
    trained: float | None
    change: Interval | None
    valid: int
    base_valid: int
    trained_valid: int
    ceiling: float | None = None
    gap_closed: Interval | None = None
    counts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """All metrics of two evaluations of the same examples."""

    rows: tuple[MetricComparison, ...]
    num_examples: int
    confidence: float
    method: Method

    def to_json(self) -> dict[str, Any]:
        """Everything, by the fields' names."""
        return asdict(self)


def compare(
    base: Evaluation,
    trained: Evaluation,
    *,
    ceiling: Evaluation | None = None,
    method: Method = "t",
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Compare example by example; a score that is not valid on either side leaves the pair out, and is counted.

    Args:
        base: evaluation before training.
        trained: evaluation after it, of the same examples and metrics.
        ceiling: scores of the true pictures (`score.target_scores`).
        method: interval of the change: Student's t on the differences, or the percentile bootstrap over examples.
        confidence: of the intervals, in (0, 1).
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        UserError: the evaluations are of different examples or metrics.
    """
    for other in (trained, ceiling) if ceiling else (trained,):
        if other.example_ids != base.example_ids:
            raise UserError("the evaluations are of different examples, or in another order: they cannot be paired")
        if set(other.scores) != set(base.scores):
            here, there = ", ".join(sorted(base.scores)), ", ".join(sorted(other.scores))
            raise UserError(f"the evaluations have different metrics: {here} and {there}")
    rows = []
    for name, before in base.scores.items():
        after, truth = trained.scores[name], ceiling.scores[name] if ceiling else None
        sides = {"base": before, "trained": after, "ceiling": truth}
        both_N = before.valid_B & after.valid_B
        all_N = both_N & truth.valid_B if truth else torch.zeros_like(both_N)
        change = after.value_B[both_N] - before.value_B[both_N]
        interval = student(change, confidence) if method == "t" else bootstrap(change, confidence, resamples, seed)
        gap = None
        if truth:
            three = (before.value_B[all_N], after.value_B[all_N], truth.value_B[all_N])
            gap = gap_closed(*three, confidence=confidence, resamples=resamples, seed=seed)
        rows.append(
            MetricComparison(
                name=name,
                base=_mean(before.value_B[both_N]),
                trained=_mean(after.value_B[both_N]),
                change=interval,
                valid=int(both_N.sum()),
                base_valid=int(before.valid_B.sum()),
                trained_valid=int(after.valid_B.sum()),
                ceiling=_mean(truth.value_B[all_N]) if truth else None,
                gap_closed=gap,
                counts={key: dict(of.counts) for key, of in sides.items() if of is not None and of.counts},
            )
        )
    return Comparison(rows=tuple(rows), num_examples=len(base.example_ids), confidence=confidence, method=method)


def gap_closed(
    base_N: Tensor,
    trained_N: Tensor,
    ceiling_N: Tensor,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval | None:
    """How much of the way to the true pictures was gone: `(mean trained - mean base) / (mean ceiling - mean base)`.

    The interval is the percentile bootstrap over examples. None where the ceiling is not above the base (there is no
    gap), or no examples are given; no limits where the gap itself is not safely above zero, or for a single example.

    Args:
        base_N: valid values before training.
        trained_N: after it, of the same examples.
        ceiling_N: of their true pictures.
        confidence: of the interval, in (0, 1).
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    if not len(base_N) or float((ceiling_N - base_N).mean()) <= 0:
        return None
    gain_N, gap_N = trained_N - base_N, ceiling_N - base_N
    value = float(gain_N.mean() / gap_N.mean())
    if len(base_N) == 1:
        return Interval(value=value)
    index_RN = _resample(len(base_N), resamples, seed)
    gap_R = gap_N[index_RN].mean(1)
    # A ratio whose denominator may well be zero has no finite interval (Fieller).
    if float((gap_R <= 0).double().mean()) > (1 - confidence) / 2:
        return Interval(value=value)
    # The few resamples without a gap say nothing of how much of it was closed.
    ratio_R = (gain_N[index_RN].mean(1) / gap_R)[gap_R > 0]
    return _percentiles(value, ratio_R, confidence)


def render_table(comparison: Comparison) -> Table:
    """The comparison for a terminal, where the intervals wrap at spaces; everything else stays in one piece."""
    header, *rows = _cells(comparison)
    table = Table(title=_title(comparison), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, cells in enumerate(zip(header, *rows, strict=True)):
        wraps = cells[0] in ("change", "gap closed")
        longest_word = max(len(word) for cell in cells for word in cell.split()) if wraps else None
        justify: Literal["left", "right"] = "right" if number else "left"
        table.add_column(cells[0], justify=justify, no_wrap=not wraps, min_width=longest_word)
    for name, *numbers in rows:
        table.add_row("\n".join(wrap(name, NAME_WIDTH)), *numbers)
    return table


def render_markdown(comparison: Comparison) -> str:
    """The comparison as a Markdown table under one line of explanation."""
    header, *rows = _cells(comparison)
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in escaped]
    lines.insert(1, "|" + "|".join([" --- "] + [" ---: "] * (len(header) - 1)) + "|")
    return f"{_title(comparison)}\n\n" + "\n".join(lines) + "\n"


def _title(comparison: Comparison) -> str:
    kind = "Student's t" if comparison.method == "t" else "bootstrap"
    share = f"{100 * comparison.confidence:g} %"
    return f"{comparison.num_examples} held-out examples, paired; change with its {share} interval ({kind})"


def _cells(comparison: Comparison) -> list[list[str]]:
    """The table's text, header first; the last two columns only where there is a ceiling."""
    with_ceiling = any(row.ceiling is not None for row in comparison.rows)
    header = ["metric", "base", "trained", "change", "valid"] + ["target", "gap closed"] * with_ceiling
    body = []
    for row in comparison.rows:
        cells = [row.name, _number(row.base), _number(row.trained), _interval(row.change, "{:+.4f}".format)]
        cells.append(f"{row.valid}/{comparison.num_examples}")
        if with_ceiling:
            cells += [_number(row.ceiling), _interval(row.gap_closed, "{:.0%}".format)]
        body.append(cells)
    return [header, *body]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _interval(interval: Interval | None, form: Callable[[float], str]) -> str:
    if interval is None:
        return "-"
    if interval.low is None or interval.high is None:
        return form(interval.value)
    return f"{form(interval.value)} ({form(interval.low)} to {form(interval.high)})"


def _mean(values: Tensor) -> float | None:
    return float(values.mean()) if len(values) else None


def student(change_N: Tensor, confidence: float) -> Interval | None:
    """Mean and Student's t interval of paired differences."""
    from scipy.stats import t

    if not len(change_N):
        return None
    mean, n = float(change_N.mean()), len(change_N)
    if n == 1:
        return Interval(value=mean)
    half = float(t.ppf((1 + confidence) / 2, n - 1)) * float(change_N.std()) / n**0.5
    return Interval(value=mean, low=mean - half, high=mean + half)


def bootstrap(change_N: Tensor, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval | None:
    """Mean and percentile bootstrap interval of paired differences."""
    if not len(change_N):
        return None
    mean = float(change_N.mean())
    if len(change_N) == 1:
        return Interval(value=mean)
    return _percentiles(mean, change_N[_resample(len(change_N), resamples, seed)].mean(1), confidence)


def _resample(n: int, resamples: int, seed: int) -> Tensor:
    return torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))


def _percentiles(value: float, values_R: Tensor, confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = torch.quantile(values_R, torch.tensor([tail, 1 - tail], dtype=values_R.dtype)).tolist()
    return Interval(value=value, low=low, high=high)
