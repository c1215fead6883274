"""Sums over an optimizer step, term by term: of values, of valid examples, of gradients.

    L = sum_k c_k S_k    and so    grad L = sum_k c_k grad S_k

The coefficients c_k hold one over the number of valid examples, which is known only after the last micro-batch.
Keeping a gradient for each term makes the division exact, and gives each term's gradient norm for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TypeAlias

import torch
from torch import Tensor, nn

Gradient: TypeAlias = list[Tensor]
"""One tensor for each trained parameter, in their order."""


def differentiate(
    output: Tensor, parameters: Sequence[nn.Parameter], grad_output: Tensor | None = None, *, keep_graph: bool = False
) -> Gradient:
    """Gradient of `output` (or of its product with `grad_output`); zeros for parameters that it does not depend on."""
    found: tuple[Tensor | None, ...] = torch.autograd.grad(
        output, list(parameters), grad_outputs=grad_output, retain_graph=keep_graph, allow_unused=True
    )
    return [torch.zeros_like(p) if grad is None else grad for p, grad in zip(parameters, found, strict=True)]


class TermSums:
    """Accumulates terms over the micro-batches of one optimizer step."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.gradients: dict[str, Gradient] = {}

    def add(self, name: str, value: Tensor, count: int) -> None:
        """Add a sum over `count` valid examples to a term."""
        self.values[name] = self.values.get(name, 0.0) + float(value.detach())
        self.counts[name] = self.counts.get(name, 0) + count

    def add_gradient(self, name: str, gradient: Gradient) -> None:
        """Add a gradient to a term's sum. The tensors are kept, not copied."""
        if name in self.gradients:
            for total, grad in zip(self.gradients[name], gradient, strict=True):
                total.add_(grad)
        else:
            self.gradients[name] = gradient


def weighted_sum(gradients: Mapping[str, Gradient], coefficients: Mapping[str, float]) -> Gradient:
    """`sum_k c_k grad S_k`. There must be at least one term."""
    (first, gradient), *others = gradients.items()
    total = [coefficients[first] * grad for grad in gradient]
    for name, gradient in others:
        for partial, grad in zip(total, gradient, strict=True):
            partial.add_(grad, alpha=coefficients[name])
    return total


def global_norm(gradient: Sequence[Tensor]) -> float:
    """Euclidean norm over all tensors together."""
    return float(torch.stack([torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in gradient]).norm())


def norms(gradients: Mapping[str, Gradient], coefficients: Mapping[str, float]) -> dict[str, float]:
    """Norm of each term's part of the loss gradient, `|c_k grad S_k|`."""
    return {name: abs(coefficients[name]) * global_norm(gradient) for name, gradient in gradients.items()}


def cosines(gradients: Mapping[str, Gradient], coefficients: Mapping[str, float]) -> dict[str, float]:
    """Cosine between the parts of the loss gradient, as `cosine/a/b`: below 0 the terms pull against each other.

    Pairs with a part of norm 0 are left out.
    """
    result: dict[str, float] = {}
    lengths = norms(gradients, coefficients)
    for (a, gradient_a), (b, gradient_b) in combinations(gradients.items(), 2):
        if lengths[a] and lengths[b]:
            dot = sum(float((x.double() * y.double()).sum()) for x, y in zip(gradient_a, gradient_b, strict=True))
            result[f"cosine/{a}/{b}"] = coefficients[a] * coefficients[b] * dot / (lengths[a] * lengths[b])
    return result
