"""The layout reward: closed forms, what it ignores, and its ranking on the tiny world's held-out pairs."""

from dataclasses import replace

import pytest
import torch

from rewardgen.errors import ConfigError
from rewardgen.reward import check_reward
from rewardgen.rewards.structure import StructureReward, explained_share
from rewardgen.types import Example
from rewardgen.world import scenes


def of(reference: torch.Tensor) -> Example:
    return Example(id="x", content_refs=(reference,))


def test_it_keeps_the_contract() -> None:
    check_reward(StructureReward())
    check_reward(StructureReward(size=32), image_size=(48, 80))


def test_an_affine_change_of_colours_costs_nothing() -> None:
    rng = torch.Generator().manual_seed(0)
    pictures = scenes.render(scenes.draw_contents(6, 1), scenes.draw_photo_styles(6, 2)).double()
    mixing = torch.eye(3, dtype=torch.float64) * 0.5 + 0.1 * torch.rand(3, 3, generator=rng, dtype=torch.float64)
    recoloured = torch.einsum("ij,njhw->nihw", mixing, pictures) + 0.05
    inverted = 1 - recoloured
    reward = StructureReward(noise=1e-5)
    for changed in (pictures, recoloured, inverted):
        assert bool((reward.score(changed, [of(p) for p in pictures]).value_B > 0.999).all())


def test_a_flat_picture_explains_nothing_and_a_flat_reference_does_not_apply() -> None:
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    flat = torch.full((3, 64, 64), 0.4)
    nothing = StructureReward().score(flat[None], [of(picture[0])])
    assert nothing.valid_B.tolist() == [True]
    assert float(nothing.value_B[0]) == pytest.approx(0, abs=1e-6)
    for example in (of(flat), Example(id="none")):
        assert StructureReward().score(picture, [example]).valid_B.tolist() == [False]


def test_the_share_is_that_of_least_squares() -> None:
    """One window, noise to 0: R^2 of the regression of the reference's colours on the picture's, by `lstsq`."""
    rng = torch.Generator().manual_seed(3)
    x = torch.rand(1, 3, 16, 16, generator=rng, dtype=torch.float64)
    y = 0.3 * x.flip(1) + 0.2 * torch.rand(1, 3, 16, 16, generator=rng, dtype=torch.float64)

    def r_squared(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
        design = torch.cat([a.flatten(1).T, torch.ones(a[0].numel(), 1, dtype=a.dtype)], 1)
        target = b.flatten(1).T
        rest = target - design @ torch.linalg.lstsq(design, target).solution
        total = float((target - target.mean(0)).square().sum())
        return total - float(rest.square().sum()), total

    shares = []
    for side, step in ((16, 16), (8, 4), (4, 2)):
        parts = [
            r_squared(x[0, :, i : i + side, j : j + side], y[0, :, i : i + side, j : j + side])
            for i in range(0, 16 - side + 1, step)
            for j in range(0, 16 - side + 1, step)
        ]
        shares.append(sum(p for p, _ in parts) / sum(t for _, t in parts))
    assert float(explained_share(x, y, 1e-7)[0]) == pytest.approx(sum(shares) / 3, rel=1e-6)


def test_the_gradient_is_that_of_finite_differences() -> None:
    rng = torch.Generator().manual_seed(4)
    x, y = (torch.rand(1, 3, 16, 16, generator=rng, dtype=torch.float64) for _ in range(2))
    reward = StructureReward(size=16)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(reward.score(x, [of(y[0])]).value_B.sum(), x)
    direction = torch.randn(x.shape, generator=rng, dtype=torch.float64)
    h = 1e-5
    ends = [float(reward.score((x + s * h * direction).detach(), [of(y[0])]).value_B[0]) for s in (1, -1)]
    assert float((grad * direction).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-5)


def test_in_the_tiny_world_it_tells_contents_apart_across_styles() -> None:
    """Held-out pairs: the same content in another style must outrank another content in the reference's own style."""
    number = 60
    content, style = scenes.draw_contents(number, 7, "held_out"), scenes.draw_styles(number, 8, "held_out")
    photo = scenes.render(content, scenes.draw_photo_styles(number, 9))
    truth, examples = scenes.render(content, style, 10), [of(picture) for picture in photo]
    kinds = content.kind_NK.clone()
    kinds[:, 0] = (kinds[:, 0] + 1) % len(scenes.SHAPES)
    near_miss = scenes.render(replace(content, kind_NK=kinds), style, 10)
    reward = StructureReward()
    same, other, nearly = (reward.score(p, examples).value_B for p in (truth, photo.roll(1, 0), near_miss))
    assert float((same[:, None] > other[None]).float().mean()) > 0.98
    assert float((same > nearly).float().mean()) > 0.9


@pytest.mark.parametrize("arguments", [{"size": 20}, {"size": 8}, {"noise": 0.0}])
def test_impossible_arguments_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        StructureReward(**arguments)  # type: ignore[arg-type]
