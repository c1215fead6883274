"""Gradients of terms: memory of their own, since they are added to in place, and the projection of conflicts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rewardgen.gradients import TermSums, _owned, differentiate, projected, weighted_sum
from rewardgen.learner import Learner, OptimizerConfig
from rewardgen.objective import Objective, ObjectiveConfig
from rewardgen.optimizer import Optimizer
from rewardgen.seeds import derive_seed
from tests.test_learner import EXAMPLES, WINDOW, micro_batches
from tests.toys import ToyPolicy, ToyReward


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
    kept = _owned([first, second, halves])
    assert [kept[0].data_ptr(), kept[1].data_ptr()] == [first.data_ptr(), second.data_ptr()]
    assert kept[2].data_ptr() != halves.data_ptr(), "it overlaps with both"


def surgery(parts: dict[str, Tensor], seed: int) -> Tensor:
    """Algorithm 1 of arXiv 2001.06782 on the vectors themselves, in the same order."""
    total = torch.zeros_like(next(iter(parts.values())))
    for name, own in parts.items():
        mine = own.clone()
        for other in sorted(parts.keys() - {name}, key=lambda o: derive_seed("conflicts", seed, name, o)):
            along = mine @ parts[other]
            if along < 0:
                mine = mine - along / (parts[other] @ parts[other]) * parts[other]
        total += mine
    return total


def test_two_conflicting_terms_are_projected_as_by_hand() -> None:
    gradients = {"a": [torch.tensor([1.0, 0.0])], "b": [torch.tensor([-1.0, 1.0])]}
    found = weighted_sum(gradients, projected(gradients, {"a": 1.0, "b": 1.0}, 0))
    # a without what is against b is (1/2, 1/2); b without what is against a is (0, 1).
    torch.testing.assert_close(found[0], torch.tensor([0.5, 1.5]))


def test_terms_that_agree_are_left_alone() -> None:
    gradients = {"a": [torch.tensor([1.0, 0.0])], "b": [torch.tensor([2.0, 1.0])], "c": [torch.zeros(2)]}
    coefficients = {"a": 0.5, "b": 2.0, "c": 1.0}
    assert projected(gradients, coefficients, 0) == coefficients
    assert projected(gradients, coefficients | {"a": -0.5}, 0) != coefficients | {"a": -0.5}, "weights have a sign"


@given(st.integers(2, 5), st.integers(0, 2**31 - 1))
def test_in_the_space_of_the_terms_it_is_the_same_as_on_the_vectors(terms: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    gradients = {f"t{i}": list(torch.randn(3, 4, generator=rng, dtype=torch.float64)) for i in range(terms)}
    coefficients = {name: float(torch.randn((), generator=rng)) for name in gradients}
    found = weighted_sum(gradients, projected(gradients, coefficients, seed))
    expected = surgery({name: coefficients[name] * torch.cat(grads) for name, grads in gradients.items()}, seed)
    torch.testing.assert_close(torch.cat(found), expected)


def test_a_step_that_projects_moves_as_the_projected_gradient_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flow matching and two rewards of opposite sign: another update from the same gradients."""
    updates: list[Tensor] = []
    update = Optimizer.update

    def spy(self: Optimizer, gradient: list[Tensor], grad_norm: float, *, step: int) -> None:
        updates.append(torch.cat([grad.flatten() for grad in gradient]))
        update(self, gradient, grad_norm, step=step)

    monkeypatch.setattr(Optimizer, "update", spy)
    norms = []
    for conflicts in ("keep", "project"):
        terms = {"up": {"use": "toy"}, "down": {"use": "toy", "weight": 0.7}}
        config = ObjectiveConfig.model_validate({"rewards": terms, "conflicts": conflicts})
        rewards = {"up": ToyReward(), "down": ToyReward(scale=-1.0, fail_ids=["toy-001"])}
        options = {"optimizer": OptimizerConfig(lr=1e-2), "window": WINDOW, "term_grad_norms": False}
        learner = Learner(ToyPolicy(), Objective(config, rewards), **options)  # type: ignore[arg-type]
        report = learner.step(micro_batches(learner, len(EXAMPLES)), step=0)
        norms.append(report.grad_norms)
    kept, projects = updates
    assert report.metrics["cosine/up/down"] < 0
    assert not torch.allclose(kept, projects)
    assert set(norms[1]) == {"flow_matching", "up", "down"}, "terms are not merged into one backward pass"
    assert float(projects.norm()) == pytest.approx(report.grad_norm, rel=1e-5)
