"""Sums over an optimizer step, term by term: of values, of valid examples, of gradients.

    L = sum_k c_k S_k    and so    grad L = sum_k c_k grad S_k

The coefficients c_k hold one over the number of valid examples, which is known only after the last micro-batch.
Keeping a gradient for each term makes the division exact, and gives each term's gradient norm for nothing.
With several processes the sums go over the examples of all of them.

Shape suffix: P trained parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from rewardgen.adaptive import ScoreSums
from rewardgen.distributed import Processes
from rewardgen.seeds import derive_seed
from rewardgen.sharding import is_shard, part
from rewardgen.transfer import numbers, score_on_host
from rewardgen.types import Score

Gradient: TypeAlias = list[Tensor]
"""One tensor for each trained parameter, in their order; of a sharded one, this process's part."""

Complete: TypeAlias = Callable[[Tensor], Tensor]
"""Sums over processes what was found on parts, a vector of one number for each parameter (`sharding.summing`)."""


def differentiate(
    output: Tensor, parameters: Sequence[nn.Parameter], grad_output: Tensor | None = None, *, keep_graph: bool = False
) -> Gradient:
    """Gradient of `output` (or of its product with `grad_output`); zeros for parameters that it does not depend on."""
    found: tuple[Tensor | None, ...] = torch.autograd.grad(
        output, list(parameters), grad_outputs=grad_output, retain_graph=keep_graph, allow_unused=True
    )
    return _owned([torch.zeros_like(p) if grad is None else grad for p, grad in zip(parameters, found, strict=True)])


def _owned(gradient: Gradient) -> Gradient:
    """The same with memory of its own for each: gradients are added to in place.

    Autograd hands on one tensor for two parameters that are added to each other, and an expanded one for what was
    summed.
    """
    taken: dict[int, list[tuple[int, int]]] = {}
    owned = []
    for grad in gradient:
        local = part(grad)
        sizes = list(zip(local.shape, local.stride(), strict=True))
        start = int(local.storage_offset())
        end = start + 1 + sum((size - 1) * stride for size, stride in sizes)
        others = taken.setdefault(local.untyped_storage()._cdata, [])
        expanded = any(size > 1 and not stride for size, stride in sizes)
        if expanded or any(start < their_end and their_start < end for their_start, their_end in others):
            grad = grad.clone(memory_format=torch.contiguous_format)
        else:
            others.append((start, end))
        owned.append(grad)
    return owned


class TermSums:
    """Accumulates terms over the micro-batches of one optimizer step."""

    def __init__(self) -> None:
        self._values: dict[str, float] = {}
        self._pending: list[tuple[str, Tensor]] = []
        self.counts: dict[str, int] = {}
        self.gradients: dict[str, Gradient] = {}
        self.valid: dict[str, list[bool]] = {}
        self.scores: dict[str, ScoreSums] = {}

    @property
    def values(self) -> dict[str, float]:
        """Sums so far by term. Waits for the device, once for all that was added since it was last asked."""
        found = numbers([value for _, value in self._pending])
        for (name, _), value in zip(self._pending, found, strict=True):
            self._values[name] = self._values.get(name, 0.0) + value
        self._pending.clear()
        return self._values

    def add(self, name: str, value: Tensor, count: int) -> None:
        """Add a sum over `count` valid examples to a term. It stays where it is."""
        self._pending.append((name, value.detach()))
        self.counts[name] = self.counts.get(name, 0) + count

    def add_score(self, name: str, score: Score) -> None:
        """Note a reward's own values, what it reports beside them, and which were valid, in order of the examples.

        Waits for the device of a score that is not on the CPU.
        """
        score = score_on_host(score)
        self.valid.setdefault(name, []).extend(score.valid_B.tolist())
        self.scores[name] = self.scores.get(name, ScoreSums()) + ScoreSums.of(score)

    def valid_counts(self) -> dict[str, int]:
        """Examples with a target, under the name of that term, and valid scores of each reward."""
        return {name: count for name, count in self.counts.items() if name not in self.scores} | {
            name: of.count for name, of in self.scores.items()
        }

    def add_gradient(self, name: str, gradient: Gradient) -> None:
        """Add a gradient to a term's sum. The tensors are kept, not copied."""
        if name in self.gradients:
            for total, grad in zip(self.gradients[name], gradient, strict=True):
                total.add_(grad)
        else:
            self.gradients[name] = gradient

    def sum_over(
        self,
        processes: Processes,
        parameters: Sequence[nn.Parameter],
        counted_by: Mapping[str, Sequence[str]],
        topic: str,
    ) -> dict[str, list[bool]]:
        """Make every sum one over the examples of all processes, the same in all of them.

        Args:
            processes: all of them; each must call this, also one that has no valid example.
            parameters: the trained parameters. What is sharded was summed in the backward pass.
            counted_by: every key that a sum may have, in the order they get, and the terms whose counts say whether
                its gradient counts.
            topic: what the processes meet for.

        Returns:
            Which scores of each reward were valid, in the order of the examples of all processes.
        """
        mine = {"values": self.values, "counts": self.counts, "valid": self.valid, "gradients": list(self.gradients)}
        mine |= {"scores": {name: of.to_json() for name, of in self.scores.items()}}
        said = processes.exchange(topic, mine)
        terms = [name for name in counted_by if any(name in other["counts"] for other in said)]
        self._values = {name: sum(other["values"].get(name, 0.0) for other in said) for name in terms}
        self.counts = {name: sum(other["counts"].get(name, 0) for other in said) for name in terms}
        own, self.gradients = self.gradients, {}
        for name, counting in counted_by.items():
            there = any(name in other["gradients"] for other in said)
            if there and any(self.counts.get(term) for term in counting):
                gradient = own[name] if name in own else [torch.zeros_like(part(p)) for p in parameters]
                pairs = zip(parameters, gradient, strict=True)
                processes.sum_([grad for parameter, grad in pairs if not is_shard(parameter)])
                self.gradients[name] = gradient
        scored = [name for name in counted_by if any(name in other["valid"] for other in said)]
        self.scores = {name: _added(other["scores"].get(name) for other in said) for name in scored}
        return {name: [flag for other in said for flag in other["valid"].get(name, [])] for name in scored}


def _added(parts: Iterable[Mapping[str, Any] | None]) -> ScoreSums:
    return sum((ScoreSums.from_json(said) for said in parts if said is not None), ScoreSums())


def weighted_sum(gradients: Mapping[str, Gradient], coefficients: Mapping[str, float]) -> Gradient:
    """`sum_k c_k grad S_k`. There must be at least one term."""
    (first, gradient), *others = gradients.items()
    total = [coefficients[first] * grad for grad in gradient]
    for name, gradient in others:
        for partial, grad in zip(total, gradient, strict=True):
            partial.add_(grad, alpha=coefficients[name])
    return total


def projected(
    gradients: Mapping[str, Gradient],
    coefficients: Mapping[str, float],
    seed: int,
    complete: Complete | None = None,
) -> dict[str, float]:
    """Coefficients with which terms no longer pull against each other: PCGrad (arXiv 2001.06782, algorithm 1).

    Of each term's part `g_i = c_i grad S_i`, for every other `g_j` in turn, the component against `g_j` is taken off
    where there is one. All of that happens in the space that the parts span, so that their products are all it needs:
    no gradient is copied, and the result is again a weighted sum. Waits for the device once.

    Args:
        gradients: of each term's sum.
        coefficients: what each counts with.
        seed: of the order in which a term meets the others, which the algorithm draws.
        complete: see `Complete`; None where every process has the whole.
    """
    names = list(gradients)
    pairs = [(a, b) for index, a in enumerate(names) for b in names[index:]]
    products = numbers([_dot(gradients[a], gradients[b], complete) for a, b in pairs])
    gram = {(a, b): coefficients[a] * coefficients[b] * dot for (a, b), dot in zip(pairs, products, strict=True)}
    gram |= {(b, a): product for (a, b), product in gram.items()}
    total = dict.fromkeys(names, 0.0)
    for name in names:
        shares = dict.fromkeys(names, 0.0) | {name: 1.0}  # of every g_j in this term's projected gradient
        others = (other for other in names if other != name)
        for other in sorted(others, key=lambda other: derive_seed("conflicts", seed, name, other)):
            along = sum(share * gram[mixed, other] for mixed, share in shares.items())
            if along < 0 < gram[other, other]:
                shares[other] -= along / gram[other, other]
        total = {mixed: total[mixed] + share for mixed, share in shares.items()}
    return {name: coefficients[name] * total[name] for name in names}


class Geometry(NamedTuple):
    """Lengths and angles of a gradient and its parts.

    `norm` is the gradient's Euclidean norm, 0 for none. `norms` are those of each term's part of it, `|c_k grad S_k|`.
    `cosines` are between the parts, as `cosine/a/b`: below 0 the terms pull against each other. Pairs with a part of
    norm 0 are left out.
    """

    norm: float
    norms: dict[str, float]
    cosines: dict[str, float]


def geometry(
    gradient: Gradient | None,
    gradients: Mapping[str, Gradient],
    coefficients: Mapping[str, float],
    complete: Complete | None = None,
) -> Geometry:
    """Measure a gradient and its parts, over all processes that hold some of them. Waits for the device once.

    Args:
        gradient: `weighted_sum(gradients, coefficients)`; None where there are no parts.
        gradients: of each term's sum.
        coefficients: what each counts with.
        complete: see `Complete`; None where every process has the whole.
    """
    if gradient is None:
        return Geometry(0.0, {}, {})
    pairs = list(combinations(gradients, 2))
    lengths = [_length(grads, complete) for grads in (gradient, *gradients.values())]
    dots = [_dot(gradients[a], gradients[b], complete) for a, b in pairs]
    norm, *found = numbers([*lengths, *dots])
    norms = {name: abs(coefficients[name]) * length for name, length in zip(gradients, found, strict=False)}
    cosines = {
        f"cosine/{a}/{b}": coefficients[a] * coefficients[b] * dot / (norms[a] * norms[b])
        for (a, b), dot in zip(pairs, found[len(gradients) :], strict=True)
        if norms[a] and norms[b]
    }
    return Geometry(norm, norms, cosines)


def _length(gradient: Sequence[Tensor], complete: Complete | None) -> Tensor:
    """Euclidean norm over all tensors together, float64."""
    lengths_P = torch.stack([torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in gradient])
    return lengths_P.norm() if complete is None else complete(lengths_P.square()).sum().sqrt()


def _dot(a: Sequence[Tensor], b: Sequence[Tensor], complete: Complete | None) -> Tensor:
    dots_P = torch.stack([(x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)])
    return (dots_P if complete is None else complete(dots_P)).sum()
