"""Gradients are added to in place, so each needs memory of its own, whatever autograd handed out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rewardgen.gradients import TermSums, differentiate


def summed(p: nn.Parameter, q: nn.Parameter, inputs: list[Tensor]) -> list[Tensor]:
    """The gradient of one sum over micro-batches, accumulated as a step does it."""
    sums = TermSums()
    for x in inputs:
        sums.add_gradient("a", differentiate(((x + p + q) ** 3).sum(), [p, q]))
    return sums.gradients["a"]


def test_parameters_that_are_added_to_each_other_do_not_share_their_gradient() -> None:
    """Autograd gives both of them one tensor: every later micro-batch would count twice."""
    inputs = list(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    p, q = (nn.Parameter(torch.full((4,), value)) for value in (0.5, -0.25))
    expected = torch.autograd.grad(torch.stack([((x + p + q) ** 3).sum() for x in inputs]).sum(), [p, q])
    found = summed(p, q, inputs)
    assert found[0].data_ptr() != found[1].data_ptr()
    for mine, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, wanted)


def test_the_gradient_of_a_sum_may_be_added_to() -> None:
    """It is an expanded scalar, of which no part can be written alone."""
    bias = nn.Parameter(torch.zeros(5))
    sums = TermSums()
    for scale in (1.0, 2.0):
        sums.add_gradient("a", differentiate(scale * bias.sum(), [bias]))
    assert sums.gradients["a"][0].tolist() == [3.0] * 5


def test_what_has_memory_of_its_own_is_not_copied() -> None:
    weight = nn.Parameter(torch.randn(2, 8))
    (halves,) = torch.autograd.grad((weight * 2).square().sum(), [weight])
    first, second = halves[0], halves[1]  # views of one storage that do not overlap
    from rewardgen.gradients import _owned

    kept = _owned([first, second, halves])
    assert [kept[0].data_ptr(), kept[1].data_ptr()] == [first.data_ptr(), second.data_ptr()]
    assert kept[2].data_ptr() != halves.data_ptr(), "it overlaps with both"
