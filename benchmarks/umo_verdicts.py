"""What the scores of `umo_table.py` show: its tables, and an answer to each question, whatever it is.

Shape suffixes: S seeds, N pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from cells import line
from torch import Tensor

from rewardgen.evaluation.compare import bootstrap, gap_closed

SUPERVISED, SIR, MIMR = "supervised", "SIR", "MIMR"
OURS = "MIMR, our options"
METRICS = {
    "id_sim": "ID-Sim",
    "id_conf": "ID-Conf",
    "coverage": "coverage of ID-Conf, %",
    "missing_faces": "missing faces",
    "extra_faces": "extra faces",
    "likeness": "likeness witness",
    "apart": "apart witness",
    "layout": "layout witness",
}
DIGITS = {
    "id_sim": 1,
    "id_conf": 1,
    "coverage": 1,
    "missing_faces": 2,
    "extra_faces": 2,
    "likeness": 3,
    "apart": 3,
    "layout": 3,
}
FEWER_IS_BETTER = {"missing_faces", "extra_faces"}
MOST_LOST = 0.02
"""Of the layout witness."""
ALL = "all"
"""Stands for the pictures of all numbers of people together."""

Column = Sequence[float | None]
Scores = Mapping[str, Mapping[str, Column]]
"""By number of people (as text) and metric: each picture's value, None where the metric does not apply."""
Answer = Literal["yes", "no", "not certain"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A mean paired difference with its 95 % interval, and that of each seed alone."""

    value: float
    low: float
    high: float
    seeds: tuple[float, ...]
    valid: int

    def rises(self) -> Answer:
        """Certain where the interval is above 0 and no seed says otherwise."""
        if self.value <= 0:
            return "no"
        return "yes" if self.low > 0 and min(self.seeds) > 0 else "not certain"


def change(ours: Sequence[Column], theirs: Sequence[Column]) -> Change | None:
    """Picture by picture and seed by seed; the percentile bootstrap is over pictures.

    A picture's difference is its mean over the seeds in which both values are valid. None with fewer than two such
    pictures.

    Args:
        ours: a column for each seed.
        theirs: as many, or one that stands for all of them.
    """
    if len(theirs) == 1:
        theirs = list(theirs) * len(ours)
    difference_SN = _tensor(ours) - _tensor(theirs)
    mean_N = difference_SN.nanmean(0)
    paired_N = mean_N[~mean_N.isnan()]
    interval = bootstrap(paired_N)
    if interval is None or interval.low is None or interval.high is None:
        return None
    seeds = tuple(difference_SN.nanmean(1).tolist())
    return Change(value=interval.value, low=interval.low, high=interval.high, seeds=seeds, valid=len(paired_N))


def kept(ours: Sequence[Column], base: Column) -> Change | None:
    """The relative change of a mean that is not 0; see `change`."""
    mean_N, base_N = _tensor(ours).nanmean(0), _tensor([base])[0]
    both_N = ~(mean_N.isnan() | base_N.isnan())
    # The share of a gap that reaches as far again from 0 as the base has come is the relative change.
    share = gap_closed(base_N[both_N], mean_N[both_N], 2 * base_N[both_N])
    absolute = change(ours, [base])
    if share is None or share.low is None or share.high is None or absolute is None:
        return None
    seeds = tuple(seed / float(base_N[both_N].mean()) for seed in absolute.seeds)
    return Change(value=share.value, low=share.low, high=share.high, seeds=seeds, valid=absolute.valid)


def keeps(relative: Change) -> Answer:
    """Whether no more than `MOST_LOST` is lost: certain where the interval says so."""
    if relative.value < -MOST_LOST:
        return "no"
    return "yes" if relative.low >= -MOST_LOST else "not certain"


def mean(columns: Sequence[Column]) -> float | None:
    """Over all valid values."""
    values = [value for column in columns for value in column if value is not None]
    return sum(values) / len(values) if values else None


def _tensor(columns: Sequence[Column]) -> Tensor:
    return torch.tensor([[torch.nan if v is None else v for v in column] for column in columns], dtype=torch.float64)


def render(arms: Mapping[str, Sequence[Scores]], base: Scores, truth: Scores, *, steps: int) -> str:
    """Tables and verdicts in Markdown.

    Args:
        arms: each arm's scores, seed by seed.
        base: of the policy that all arms start from.
        truth: of the true pictures.
        steps: of training.
    """
    note = (
        f"{len(base[next(iter(base))]['id_sim'])} held-out pictures of each number of people, {steps} steps. Means of"
        " the valid pictures; in brackets the paired change from the base over the pictures valid in both, with its"
        " 95 % bootstrap interval over pictures. Bold: over the seeds, a picture's change being its mean over them."
        " Faces are counts for each picture. ID-Sim and ID-Conf are of the face network that the rewards use too. The"
        " witnesses take part in no objective and share nothing with it: likeness is how much of what tells a person"
        " from the average one is read at their place, less what strangers agree with by chance (0 = nothing of these"
        " people), apart the same when what is read there of the picture's other people is taken off, layout the share"
        " of places on which picture and prompt agree."
    )
    parts = [note, *(_table(number, arms, base, truth) for number in base), "## What it says", *verdicts(arms, base)]
    return "\n\n".join(parts) + "\n"


def _table(number: str, arms: Mapping[str, Sequence[Scores]], base: Scores, truth: Scores) -> str:
    """Everything at one number of people."""

    def changes(runs: Sequence[Scores]) -> list[str]:
        texts = []
        for metric, digits in DIGITS.items():
            ours = [run[number][metric] for run in runs]
            text = _number(mean(ours), digits)
            found = change(ours, [base[number][metric]])
            texts.append(text if found is None else f"{text} ({_interval(found, digits)})")
        return texts

    rows = [
        [name, *(_number(mean([scores[number][metric]]), digits) for metric, digits in DIGITS.items())]
        for name, scores in (("truth", truth), ("base", base))
    ]
    rows += [[f"**{arm}**", *changes(runs)] for arm, runs in arms.items()]
    rows += [[f"{arm}, seed {seed}", *changes([run])] for arm, runs in arms.items() for seed, run in enumerate(runs)]
    return f"## {number} people\n\n" + _markdown(["", *METRICS.values()], rows)


def with_all(scores: Scores) -> Scores:
    """With the pictures of all numbers of people as one more entry."""
    together = {metric: [value for number in scores for value in scores[number][metric]] for metric in METRICS}
    return {**scores, ALL: together}


def verdicts(arms: Mapping[str, Sequence[Scores]], base: Scores) -> list[str]:
    """An answer to each question, in Markdown."""
    arms, base = {arm: [with_all(run) for run in runs] for arm, runs in arms.items()}, with_all(base)

    def against(ours: str, theirs: str, metric: str) -> dict[str, tuple[str, str]]:
        found = {n: change([r[n][metric] for r in arms[ours]], [r[n][metric] for r in arms[theirs]]) for n in base}
        better = {n: _turned(one) if metric in FEWER_IS_BETTER else one for n, one in found.items()}
        return {n: (_rises(better[n]), "-" if one is None else _whole(one, DIGITS[metric])) for n, one in found.items()}

    def layout(arm: str) -> dict[str, tuple[str, str]]:
        found = {n: kept([run[n]["layout"] for run in arms[arm]], base[n]["layout"]) for n in base}
        return {
            n: ("nothing to compare", "-") if one is None else (keeps(one), _whole(one, 1, percent=True))
            for n, one in found.items()
        }

    rewarded = [arm for arm in arms if arm != SUPERVISED]
    confusion = {
        f"{METRICS[metric]}, {arm}": against(arm, SIR, metric)
        for metric in ("id_conf", "apart")
        for arm in (MIMR, OURS)
    }
    gains = {label: against(OURS, MIMR, metric) for metric, label in METRICS.items()}
    return [
        _answered("Are people confused less with MIMR than with SIR?", confusion),
        _answered(
            "Does ID-Sim rise with every reward over supervised training?",
            {arm: against(arm, SUPERVISED, "id_sim") for arm in rewarded},
        ),
        _answered(
            "Does the likeness witness rise with every reward over supervised training?",
            {arm: against(arm, SUPERVISED, "likeness") for arm in rewarded},
        ),
        _answered("Does the layout witness keep 98 % of the base's?", {arm: layout(arm) for arm in arms}),
        _answered("Are our options better than the official form?", gains) + "\n\n" + _where(arms, base),
    ]


def _where(arms: Mapping[str, Sequence[Scores]], base: Scores) -> str:
    """At which number of people our options gain the most over the official form."""
    texts = []
    for metric in ("id_sim", "likeness", "apart"):
        found = {n: change([r[n][metric] for r in arms[OURS]], [r[n][metric] for r in arms[MIMR]]) for n in base}
        gains = {n: one.value for n, one in found.items() if one is not None and n != ALL}
        most = max(gains, key=lambda n: gains[n]) if gains else None
        texts.append(f"{METRICS[metric]} " + (_at(most) if most and gains[most] > 0 else "nowhere"))
    return f"They gain the most in {', in '.join(texts)}."


def _answered(question: str, rows: Mapping[str, Mapping[str, tuple[str, str]]]) -> str:
    """The question, its answer in a line, and what it rests on."""
    numbers = list(next(iter(rows.values())))
    otherwise = [
        f"{row} {_at(number)} ({answers[number][0]})"
        for row, answers in rows.items()
        for number in numbers
        if answers[number][0] != "yes"
    ]
    summary = f"Not, or not for certain: {'; '.join(otherwise)}." if otherwise else "Yes, throughout."
    cells = [[row, *(f"{answer}: {text}" for answer, text in answers.values())] for row, answers in rows.items()]
    return f"**{question}** {summary}\n\n" + _markdown(
        ["", *(n if n == ALL else f"{n} people" for n in numbers)], cells
    )


def _at(number: str) -> str:
    return "over all" if number == ALL else f"at {number} people"


def _rises(found: Change | None) -> str:
    return "nothing to compare" if found is None else found.rises()


def _turned(found: Change | None) -> Change | None:
    """The same change, for a metric of which less is better."""
    if found is None:
        return None
    seeds = tuple(-seed for seed in found.seeds)
    return Change(value=-found.value, low=-found.high, high=-found.low, seeds=seeds, valid=found.valid)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _interval(found: Change, digits: int, *, percent: bool = False) -> str:
    value, low, high = (f"{x * (100 if percent else 1):+.{digits}f}" for x in (found.value, found.low, found.high))
    return f"{value}{' %' if percent else ''} [{low}, {high}]"


def _whole(found: Change, digits: int, *, percent: bool = False) -> str:
    """With each seed's own."""
    seeds = ", ".join(f"{seed * (100 if percent else 1):+.{digits}f}" for seed in found.seeds)
    return f"{_interval(found, digits, percent=percent)} (seeds {seeds})"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])
