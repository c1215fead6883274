"""How the scores of a sample become its share of the loss: pure functions on detached values.

    L = w_fm * mean(L_fm) - sum_j w_j * mean_B( t_j(r_1 .. r_k) )

Each *term* t_j bears the name of a reward and is a function of the sample's scores r, with a partial derivative for
each of them:

    plain, normalised, bounded    t_j = z_j = (r_j - shift_j) / scale_j
    gated                         t_j = g_j z_j,    g_j = [r_i > c]  or  sigmoid((r_i - c) / width)
    soft minimum                  sum_j t_j = -tau A log(sum_j a_j exp(-z_j / tau) / A),  a_j = w_j g_j,  A = sum_j a_j

The soft minimum is the weighted sum for a large temperature tau and A times the smallest z_j for a small one. A
reward's score enters a term by its value alone, so that the gradient of a term with respect to the pixels is the sum
of the rewards' own, each row times the sample's partial derivative (`pixel_gradient`).

Shape suffixes: B batch, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Self

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from rewardgen.settings import Settings
from rewardgen.transfer import to_device
from rewardgen.types import Score


class GateConfig(Settings):
    """When a term counts for a sample: where another reward's score is on one side of a threshold."""

    reward: str
    """The other reward, by its name in the objective. It may have weight 0: then it only gates."""
    above: float | None = None
    """The term counts where the other score is above this. Give one of `above` and `below`."""
    below: float | None = None
    """The term counts where the other score is below this."""
    width: float | None = Field(default=None, gt=0)
    """Smooth gate: sigmoid of the distance to the threshold over this width, in the units of the other score; the
    gradient also moves that score across the threshold. Without it the gate is open or shut, and has no gradient."""

    @model_validator(mode="after")
    def _has_one_side(self) -> Self:
        if (self.above is None) == (self.below is None):
            raise ValueError("a gate needs one of `above` and `below`")
        return self


def _increasing(points: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
    if any(later <= earlier for (earlier, _), (later, _) in pairwise(points)):
        raise ValueError("the steps of a schedule must increase")
    if any(step < 0 or factor < 0 for step, factor in points):
        raise ValueError("steps and factors of a schedule cannot be negative")
    return points


Schedule = Annotated[tuple[tuple[int, float], ...], AfterValidator(_increasing)]
"""(step, factor) pairs; straight lines between them, constant before the first and after the last."""


def factor_at(schedule: Sequence[tuple[int, float]], step: int) -> float:
    """The factor of a schedule at a step; 1 for an empty one."""
    if not schedule:
        return 1.0
    if step <= schedule[0][0]:
        return schedule[0][1]
    for (start, low), (end, high) in pairwise(schedule):
        if step <= end:
            return low + (high - low) * (step - start) / (end - start)
    return schedule[-1][1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """How a term is made of the scores in one step; every number is frozen while the step lasts.

    Args:
        weight: w_j. Within a soft minimum it is a part of the term, outside the caller applies it.
        shift: c in z = (r - c) / scale.
        scale: negative for a ceiling.
        gate: on which other score it depends whether the term counts.
        joined: takes part in the soft minimum.
    """

    weight: float = 1.0
    shift: float = 0.0
    scale: float = 1.0
    gate: GateConfig | None = None
    joined: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Term:
    """What a term is for each sample of a batch, detached.

    Args:
        value_B: t_j; 0 where it is not counted.
        counted_B: samples that the term's mean goes over. A shut gate counts as 0, a failed score does not count.
        partials: dt_j / dr_k of each sample, for each reward k that the term depends on; 0 where it is not counted.
        open_B: g_j, how far the gate is open; 0 where it is not counted.
        known_B: samples with a valid score of the term's own reward and of its gate's. A joined term counts for more:
            the soft minimum goes over those that are known.
    """

    value_B: Tensor
    counted_B: Tensor
    partials: Mapping[str, Tensor]
    open_B: Tensor
    known_B: Tensor


def compose(
    scores: Mapping[str, Score], rules: Mapping[str, Rule], temperature: float | None = None
) -> dict[str, Term]:
    """Make the terms of a batch.

    Args:
        scores: of every reward that a rule names, its own or in its gate. May carry gradients, which stay behind.
        rules: one for each term, by the name of its reward.
        temperature: tau of the soft minimum over the joined terms, in the units of z.

    Returns:
        The terms in the order of the rules. Of joined terms each gets the soft minimum's value in proportion to
        dF/dz_j, so that they sum to it, and the part of its gradient that runs through z_j and g_j.

    Raises:
        ValueError: joined terms without a temperature.
    """
    with torch.enable_grad():
        leaves = {name: _leaf(score) for name, score in scores.items()}
        zs, gates, counted = {}, {}, {}
        for name, rule in rules.items():
            zs[name] = (leaves[name] - rule.shift) / rule.scale
            gates[name], counted[name] = torch.ones_like(zs[name]), scores[name].valid_B
            if rule.gate is not None:
                gates[name] = _gate(rule.gate, leaves[rule.gate.reward])
                counted[name] = counted[name] & scores[rule.gate.reward].valid_B
        # t_j, and a function of the scores whose gradient is the term's.
        values = {name: (gates[name] * zs[name],) * 2 for name in rules if not rules[name].joined}
        known = dict(counted)
        joined = [name for name, rule in rules.items() if rule.joined]
        if joined:
            if temperature is None:
                raise ValueError("joined terms need a temperature")
            parts = {name: (zs[name], rules[name].weight * gates[name] * counted[name]) for name in joined}
            values |= _soft_minimum(parts, temperature)
            anyone_B = torch.stack([counted[name] for name in joined]).any(0)
            counted |= dict.fromkeys(joined, anyone_B)
    return {
        name: Term(
            value_B=values[name][0].detach().where(counted[name], 0.0),
            counted_B=counted[name],
            partials=_partials(values[name][1], counted[name], leaves),
            open_B=gates[name].detach().where(counted[name], 0.0),
            known_B=known[name],
        )
        for name in rules
    }


def pixel_gradient(term: Term, score_grads: Mapping[str, Tensor]) -> Tensor | None:
    """Gradient [B, 3, H, W] of `sum_B t_j` with respect to the pixels, from those of `sum_B r_k`; None for none.

    Rewards without an entry in `score_grads` (no gradient, or no valid score) are left out.
    """
    rows = [
        to_device(partial_B, score_grads[name].device)[:, None, None, None] * score_grads[name]
        for name, partial_B in term.partials.items()
        if name in score_grads
    ]
    return torch.stack(rows).sum(0) if len(rows) > 1 else next(iter(rows), None)


def composed_value(terms: Mapping[str, Term], weights: Mapping[str, float], group_B: Sequence[int]) -> Score:
    """What the objective is for each sample, in float64 on the CPU; only differences within a group carry meaning.

    For learners that need a number for a sample and no gradient of it. Terms of weight 0 are left out. A term that is
    known for no sample of a group does not apply to its example and has no say in the group. A sample that lacks a
    term which others of its group have is not on their scale: it is masked.

    Args:
        terms: from `compose`.
        weights: what each counts with: the rule's weight, 1 for a joined one.
        group_B: the group of each sample.
    """
    groups_B = torch.tensor(list(group_B))
    total_B = torch.zeros(len(group_B), dtype=torch.float64)
    valid_B, any_B = torch.ones(len(group_B), dtype=torch.bool), torch.zeros(len(group_B), dtype=torch.bool)
    for name, term in terms.items():
        if weights[name]:
            known_B = term.known_B.cpu()
            total_B += (weights[name] * term.value_B.cpu().double()).where(known_B, 0.0)
            valid_B &= known_B | ~torch.isin(groups_B, groups_B[known_B])
            any_B |= known_B
    return Score(value_B=total_B, valid_B=valid_B & any_B)


def _leaf(score: Score) -> Tensor:
    """The valid values as the start of a graph of their own; what is not valid may be NaN and becomes 0."""
    return score.value_B.detach().where(score.valid_B, 0.0).requires_grad_()


def _gate(gate: GateConfig, other_B: Tensor) -> Tensor:
    """How far the gate is open, in [0, 1]."""
    past_B = other_B - gate.above if gate.above is not None else (gate.below or 0.0) - other_B
    return (past_B > 0).to(past_B) if gate.width is None else torch.sigmoid(past_B / gate.width)


def _soft_minimum(joined: Mapping[str, tuple[Tensor, Tensor]], tau: float) -> dict[str, tuple[Tensor, Tensor]]:
    """F = -tau A log(P / A), P = sum_j a_j exp(-z_j / tau), from (z_j, a_j): shares of F, and terms of its gradient.

    Written out instead of left to autograd, which makes NaN of log(0) at a shut gate:

        dF/dz_j = A p_j,  p_j = a_j exp(-z_j / tau) / P        dF/da_j = -tau (log(P / A) + A exp(-z_j / tau) / P - 1)
    """
    z_KB = torch.stack([z_B.detach() for z_B, _ in joined.values()])
    a_KB = torch.stack([a_B.detach() for _, a_B in joined.values()]).to(z_KB)
    shut_KB = a_KB == 0
    lowest_B = z_KB.masked_fill(shut_KB, torch.inf).amin(0)
    exp_KB = torch.exp((lowest_B - z_KB) / tau).masked_fill(shut_KB, 0.0)
    a_B, p_B = a_KB.sum(0), (a_KB * exp_KB).sum(0)
    nobody_B = shut_KB.all(0)
    log_B, ratio_B = (p_B / a_B).log(), a_B / p_B
    total_B = a_B * (lowest_B - tau * log_B)
    share_KB = (a_KB * exp_KB / p_B).masked_fill(nobody_B, 0.0)
    by_z_KB = (a_B * share_KB).masked_fill(nobody_B, 0.0)
    by_a_KB = (lowest_B - tau * (log_B + ratio_B * exp_KB - 1)).masked_fill(shut_KB, 0.0)
    value_KB = (share_KB * total_B).masked_fill(nobody_B, 0.0)
    pairs = zip(joined.items(), value_KB, by_z_KB, by_a_KB, strict=True)
    return {name: (value_B, by_z_B * z_B + by_a_B * a_B) for (name, (z_B, a_B)), value_B, by_z_B, by_a_B in pairs}


def _partials(value_B: Tensor, counted_B: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """d value / d score of each sample, for the scores it depends on. Samples do not mix, so one sum serves all."""
    total = value_B.where(counted_B, 0.0).sum()
    found: Iterable[Tensor | None] = torch.autograd.grad(
        total, list(leaves.values()), allow_unused=True, retain_graph=True
    )
    return {name: grad_B for name, grad_B in zip(leaves, found, strict=True) if grad_B is not None}
