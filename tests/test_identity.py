"""The single identity reward."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from rewardgen.errors import ConfigError
from rewardgen.plugins import check_args, factory, resolve
from rewardgen.reward import check_reward
from rewardgen.rewards.faces.detector import FACE_LANDMARKS, IDENTITY_LANDMARKS, GivenDetector
from rewardgen.rewards.faces.encoder import FaceEncoder
from rewardgen.rewards.faces.iresnet import save_iresnet
from rewardgen.rewards.faces.metrics import id_sim
from rewardgen.rewards.identity import IdentityReward
from tests.toy_faces import (
    CROP,
    GRID,
    TwoPlaces,
    example_of,
    landmarks_at,
    linear_encoder,
    person,
    scene,
    tiny_iresnet,
)

PEOPLE = [person(seed) for seed in range(6)]


@pytest.fixture
def reward() -> IdentityReward:
    return IdentityReward(linear_encoder())


def unit(reward: IdentityReward, *people: Tensor) -> Tensor:
    return torch.nn.functional.normalize(reward.faces.network(2 * torch.stack(people) - 1), dim=-1)


def test_the_person_themself_scores_1_and_a_stranger_about_0(reward):
    score = reward.score(
        torch.stack([scene([p], GRID[3:4]) for p in PEOPLE[:2]]),
        [example_of(PEOPLE[:1], GRID[3:4], id=name) for name in "ab"],
    )
    assert float(score.value_B[0]) == pytest.approx(1, abs=1e-6)
    assert abs(float(score.value_B[1])) < 0.5
    expected = unit(reward, *PEOPLE[:2])
    assert float(score.value_B[1]) == pytest.approx(float(expected[0] @ expected[1]), abs=1e-6)


def test_with_more_people_it_is_the_mean_over_references_of_the_most_alike_face(reward):
    drawn = [PEOPLE[0], PEOPLE[4], PEOPLE[5]]
    score = reward.score(scene(drawn, GRID[:3])[None], [example_of(PEOPLE[:2], GRID[:3])])
    similarity_MN = unit(reward, *PEOPLE[:2]) @ unit(reward, *drawn).T
    assert float(score.value_B) == pytest.approx(float(similarity_MN.max(1).values.mean()), abs=1e-6)
    assert float(score.value_B) == pytest.approx(float(id_sim(similarity_MN).mean()) / 100, abs=1e-6)


def test_one_face_may_serve_two_references_which_is_what_matching_is_for(reward):
    example = example_of([PEOPLE[0], PEOPLE[0]], GRID[:1])
    assert float(reward.score(scene(PEOPLE[:1], GRID[:1])[None], [example]).value_B) == pytest.approx(1, abs=1e-6)


def test_order_and_batch_change_nothing(reward):
    people, places = PEOPLE[:4], GRID[:4]
    picture = scene(people, places)
    cases = [
        (picture, example_of(people[:3], places, id="a")),
        (picture, example_of([people[2], people[0], people[1]], places[::-1], id="b")),
        (scene(people[:1], places[:1]), example_of(people[:1], places[:1], id="c")),
    ]
    together = reward.score(torch.stack([p for p, _ in cases]), [e for _, e in cases]).value_B
    alone = torch.cat([reward.score(p[None], [e]).value_B for p, e in cases])
    assert torch.allclose(together, alone, atol=1e-12)
    assert float(together[0]) == pytest.approx(float(together[1]), abs=1e-12)


def test_of_a_group_photograph_the_largest_face_counts(reward):
    group = scene(PEOPLE[:2], [(0, 0), (24, 24)])
    example = dataclasses.replace(
        example_of([group], GRID[:1]),
        extras={
            FACE_LANDMARKS: landmarks_at(GRID[0]),
            IDENTITY_LANDMARKS: [torch.cat([landmarks_at((0, 0)), landmarks_at((24, 24)) * 1.0001])],
        },
    )
    score = reward.score(scene([PEOPLE[1]], GRID[:1])[None], [example])
    assert float(score.value_B) == pytest.approx(1, abs=1e-3)


def test_gradient_in_the_pixels_matches_finite_differences(reward):
    example = example_of(PEOPLE[:2], GRID[:3])
    picture = (0.1 + 0.8 * scene(PEOPLE[2:5], GRID[:3]))[None].requires_grad_()
    (grad,) = torch.autograd.grad(reward.score(picture, [example]).value_B.sum(), picture)
    direction = grad / grad.norm()
    with torch.no_grad():
        ahead, behind = (reward.score(picture + step * direction, [example]).value_B for step in (1e-5, -1e-5))
    assert float(ahead - behind) / 2e-5 == pytest.approx(float(grad.norm()), rel=1e-4)


def test_what_cannot_be_scored_is_masked_counted_and_gives_no_gradient(reward):
    faceless = dataclasses.replace(
        example_of(PEOPLE[:1], GRID[:1], id="d"),
        extras={FACE_LANDMARKS: landmarks_at(GRID[0]), IDENTITY_LANDMARKS: [[]]},
    )
    examples = [
        example_of(PEOPLE[:1], GRID[:1], id="a"),
        example_of(PEOPLE[:1], [], id="b"),
        example_of([], GRID[:1], id="c"),
        faceless,
    ]
    pixels = torch.stack([scene(PEOPLE[1:2], GRID[:1])] * 4).requires_grad_()
    score = reward.score(pixels, examples)
    assert score.valid_B.tolist() == [True, False, False, False]
    assert score.counts == {"faces": 3, "no_face": 1, "unreadable_reference": 1}
    (grad,) = torch.autograd.grad(score.value_B.sum(), pixels)
    assert bool((grad[0] != 0).any())
    assert bool((grad[1:] == 0).all())


def test_pixels_that_are_not_finite_are_masked(reward):
    pixels = torch.stack([scene(PEOPLE[:1], GRID[:1])] * 2)
    pixels[0, 1] = torch.inf
    pixels[0, 2] = torch.nan
    score = reward.score(pixels, [example_of(PEOPLE[:1], GRID[:1], id=name) for name in "ab"])
    assert score.valid_B.tolist() == [False, True]


def test_contract():
    check_reward(IdentityReward(FaceEncoder(TwoPlaces(), tiny_iresnet(), crop_size=CROP)), image_size=(48, 64))
    examples = [
        example_of([p.float() for p in PEOPLE[:m]], GRID[:n], id=f"{m}{n}") for m, n in ((1, 1), (2, 3), (1, 0))
    ]
    check_reward(IdentityReward(FaceEncoder(GivenDetector(), tiny_iresnet(), crop_size=CROP)), examples=examples)


def test_by_name_as_an_experiment_does(tmp_path):
    save_iresnet(tiny_iresnet(), tmp_path / "face.safetensors")
    cls = resolve("rewards", "identity")
    assert cls is IdentityReward
    made = factory(cls)(**check_args(factory(cls), {"checkpoint": str(tmp_path / "face.safetensors")}, "args"))
    score = made.score(scene(PEOPLE[:1], GRID[:1]).float()[None], [example_of(PEOPLE[:1], GRID[:1])])
    assert float(score.value_B) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ConfigError, match="detektor"):
        check_args(factory(cls), {"checkpoint": "x", "detektor": "given"}, "args")
