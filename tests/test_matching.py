"""The matching reward: the assignment, its arithmetic, its options, and the way from pixels to the value."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewardgen.errors import CheckpointError, ConfigError
from rewardgen.plugins import check_args, factory, resolve
from rewardgen.reward import check_reward
from rewardgen.rewards.faces.detector import FACE_LANDMARKS, IDENTITY_LANDMARKS, GivenDetector
from rewardgen.rewards.faces.encoder import FaceEncoder
from rewardgen.rewards.faces.iresnet import save_iresnet
from rewardgen.rewards.matching import MatchingReward, assign, assign_batch, matching_value, missing_cost
from rewardgen.types import Example
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


def random_similarity(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.rand(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def best_total(similarity_MN: Tensor) -> float:
    """By trying every assignment."""
    short = similarity_MN if similarity_MN.shape[0] <= similarity_MN.shape[1] else similarity_MN.T
    m, n = short.shape
    return max(
        sum(float(short[row, column]) for row, column in enumerate(columns))
        for columns in itertools.permutations(range(n), m)
    )


class TestAssignment:
    @pytest.mark.parametrize(("m", "n"), list(itertools.product(range(1, 7), range(1, 7))))
    def test_it_is_the_best_of_all(self, m, n):
        similarity = random_similarity(m, n, seed=10 * m + n)
        matched = assign(similarity)
        assert int(matched.sum()) == min(m, n)
        assert bool((matched.sum(0) <= 1).all())
        assert bool((matched.sum(1) <= 1).all())
        assert float(similarity[matched].sum()) == pytest.approx(best_total(similarity), abs=1e-12)

    def test_it_does_not_fall_into_the_greedy_trap(self):
        similarity = torch.tensor([[0.9, 0.8], [0.8, 0.1]])
        assert assign(similarity).tolist() == [[False, True], [True, False]]

    @given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000))
    @settings(max_examples=40, deadline=None)
    def test_it_follows_a_permutation_of_rows_and_columns(self, m, n, seed):
        similarity = random_similarity(m, n, seed)
        generator = torch.Generator().manual_seed(seed)
        rows, columns = torch.randperm(m, generator=generator), torch.randperm(n, generator=generator)
        assert torch.equal(assign(similarity[rows][:, columns]), assign(similarity)[rows][:, columns])

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_what_is_not_finite_is_not_assigned(self, bad):
        similarity = random_similarity(3, 3)
        similarity[1, 2] = bad
        assert not bool(assign(similarity).any())

    @pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0)])
    def test_nobody(self, shape):
        assert assign(torch.zeros(shape)).shape == shape

    def test_a_batch_ignores_its_padding(self):
        sizes = [(2, 3), (4, 1), (0, 2), (3, 3), (2, 0)]
        similarity = torch.full((5, 4, 3), 99.0, dtype=torch.float64)
        present = torch.zeros(5, 4, 3, dtype=torch.bool)
        for b, (m, n) in enumerate(sizes):
            similarity[b, :m, :n] = random_similarity(m, n, b)
            present[b, :m, :n] = True
        matched = assign_batch(similarity, present)
        assert not bool((matched & ~present).any())
        for b, (m, n) in enumerate(sizes):
            assert torch.equal(matched[b, :m, :n], assign(similarity[b, :m, :n]))


def value_of(similarity_MN: Tensor, **options: Any) -> Tensor:
    present = torch.ones_like(similarity_MN, dtype=torch.bool)[None]
    return matching_value(similarity_MN[None], assign(similarity_MN)[None], present, **options)[0]


class TestValue:
    @pytest.mark.parametrize(("m", "n"), [(1, 1), (2, 2), (3, 2), (2, 5)])
    @pytest.mark.parametrize("normalise", ["pairs", "matches", "each"])
    @pytest.mark.parametrize("floor", [None, 0.1])
    def test_it_is_the_formula(self, m, n, normalise, floor):
        similarity, pull, push = random_similarity(m, n), 0.0, 0.0
        for i, j in itertools.product(range(m), range(n)):
            cosine = float(similarity[i, j])
            if assign(similarity)[i, j]:
                pull += cosine
            else:
                push += cosine if floor is None else max(cosine, floor)
        matches, others = min(m, n), m * n - min(m, n)
        expected = {
            "pairs": (pull - push) / (m * n),
            "matches": (pull - push) / matches,
            "each": pull / matches - (push / others if others else 0),
        }[normalise]
        assert float(value_of(similarity, normalise=normalise, floor=floor)) == pytest.approx(expected, abs=1e-12)

    @pytest.mark.parametrize(("m", "n"), [(1, 1), (2, 2), (6, 6), (6, 4), (3, 5)])
    def test_what_perfect_matches_of_strangers_are_worth(self, m, n):
        """The official form pays less the more people there are; by matches it pays the same."""
        similarity = torch.eye(max(m, n), dtype=torch.float64)[:m, :n]
        assert float(value_of(similarity)) == pytest.approx(1 / max(m, n))
        assert float(value_of(similarity, normalise="matches")) == pytest.approx(1)
        assert float(value_of(similarity, normalise="each")) == pytest.approx(1)

    @pytest.mark.parametrize("people", [2, 4, 6])
    def test_pull_and_push_weigh_the_same_only_where_each_is_divided_by_its_number(self, people):
        similarity = random_similarity(people, people).requires_grad_()
        matched = assign(similarity.detach())
        for normalise, outweighs in (("pairs", people - 1), ("matches", people - 1), ("each", 1)):
            (grad,) = torch.autograd.grad(value_of(similarity, normalise=normalise), similarity)
            assert -float(grad[~matched].sum() / grad[matched].sum()) == pytest.approx(outweighs)

    @pytest.mark.parametrize(("m", "n"), [(1, 1), (2, 2), (3, 2), (2, 5), (6, 6)])
    @pytest.mark.parametrize("floor", [None, 0.1])
    def test_of_the_hardest_negatives_each_reference_has_one(self, m, n, floor):
        similarity = random_similarity(m, n)
        matched, hardest = assign(similarity), []
        for i in range(m):
            others = [float(similarity[i, j]) for j in range(n) if not matched[i, j]]
            if others:
                hardest.append(max(others) if floor is None else max(*others, floor))
        pull, push = float(similarity[matched].mean()), sum(hardest) / len(hardest) if hardest else 0
        options = {"negatives": "hardest", "floor": floor}
        assert float(value_of(similarity, normalise="each", **options)) == pytest.approx(pull - push, abs=1e-12)
        total = (float(similarity[matched].sum()) - sum(hardest)) / min(m, n)
        assert float(value_of(similarity, normalise="matches", **options)) == pytest.approx(total, abs=1e-12)

    def test_the_hardest_negative_alone_has_a_gradient(self):
        similarity = torch.tensor([[0.9, 0.2, 0.3], [0.4, 0.8, 0.1], [0.0, -0.1, 0.7]]).requires_grad_()
        (grad,) = torch.autograd.grad(value_of(similarity, normalise="each", negatives="hardest"), similarity)
        torch.testing.assert_close(3 * grad, torch.tensor([[1.0, 0, -1], [-1, 1, 0], [-1, 0, 1]]))

    def test_the_floor_stops_the_push_between_strangers_only(self):
        similarity = torch.tensor([[-0.5, 0.3], [-0.2, 0.4]], dtype=torch.float64).requires_grad_()
        # Matched: (0, 1) would total 0.1, the diagonal -0.1.
        assert assign(similarity).tolist() == [[False, True], [True, False]]
        (free,) = torch.autograd.grad(value_of(similarity), similarity)
        assert free.tolist() == [[-0.25, 0.25], [0.25, -0.25]]
        (floored,) = torch.autograd.grad(value_of(similarity, floor=0.0), similarity)
        assert floored.tolist() == [[0, 0.25], [0.25, -0.25]]  # (1, 0) is matched: it may still rise

    @pytest.mark.parametrize(
        "options", [{}, {"normalise": "matches"}, {"normalise": "each"}, {"negatives": "hardest"}, {"floor": 0.05}]
    )
    def test_gradient_in_the_embeddings(self, options):
        refs = torch.nn.functional.normalize(random_similarity(3, 8, 1), dim=-1)
        drawn = random_similarity(4, 8, 2).requires_grad_()

        def value(drawn_ND: Tensor) -> Tensor:
            return value_of(refs @ torch.nn.functional.normalize(drawn_ND, dim=-1).T, **options)

        assert torch.autograd.gradcheck(value, (drawn,))

    @pytest.mark.parametrize("negatives", ["all", "hardest"])
    def test_padding_stays_out_of_value_and_gradient(self, negatives):
        similarity = torch.full((2, 3, 3), torch.nan, dtype=torch.float64)
        similarity[0, :2, :1] = random_similarity(2, 1)
        present = ~similarity.isnan()
        similarity.requires_grad_()
        value = matching_value(similarity, assign_batch(similarity, present), present, negatives=negatives)
        alone = similarity[0, :2, :1].detach()
        assert value.tolist() == [float(value_of(alone, negatives=negatives)), 0]
        (grad,) = torch.autograd.grad(value.sum(), similarity)
        assert bool((grad[~present] == 0).all())


def score_of(reward: MatchingReward, picture: Tensor, example: Example) -> float:
    score = reward.score(picture[None], [example])
    assert score.valid_B.tolist() == [True]
    return float(score.value_B)


def gradient_of(reward: MatchingReward, picture: Tensor, example: Example) -> Tensor:
    pixels = picture[None].clone().requires_grad_()
    (grad,) = torch.autograd.grad(reward.score(pixels, [example]).value_B.sum(), pixels)
    return grad[0]


PEOPLE = [person(seed) for seed in range(6)]


@pytest.fixture
def reward() -> MatchingReward:
    return MatchingReward(linear_encoder())


class TestReward:
    def test_value_is_that_of_the_cosines(self, reward):
        people, places = PEOPLE[:3], GRID[:4]
        picture = scene([*people, person(9)], places)
        embedded = torch.nn.functional.normalize(
            reward.faces.network(2 * torch.stack([*people, person(9)]) - 1), dim=-1
        )
        expected = float(value_of(embedded[:3] @ embedded.T))
        assert score_of(reward, picture, example_of(people, places)) == pytest.approx(expected, abs=1e-6)
        assert 0.15 < expected < 0.35  # 1/4 but for the chance likeness of strangers

    @pytest.mark.parametrize("count", [2, 4, 6])
    def test_the_order_of_references_and_faces_changes_nothing(self, reward, count):
        people, places = PEOPLE[:count], GRID[:count]
        picture = scene(people, places)
        expected = score_of(reward, picture, example_of(people, places))
        grad = gradient_of(reward, picture, example_of(people, places))
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            refs = [people[i] for i in torch.randperm(count, generator=generator).tolist()]
            faces = [places[i] for i in torch.randperm(count, generator=generator).tolist()]
            assert score_of(reward, picture, example_of(refs, faces)) == pytest.approx(expected, abs=1e-12)
            assert torch.allclose(gradient_of(reward, picture, example_of(refs, faces)), grad, atol=1e-12)

    def test_a_picture_does_not_depend_on_its_batch(self, reward):
        cases = [(3, 3), (2, 4), (1, 0), (0, 2), (4, 2)]
        pictures = torch.stack([scene(PEOPLE[:n], GRID[:n]) for _, n in cases])
        examples = [example_of(PEOPLE[:m], GRID[:n], id=f"{m}{n}") for m, n in cases]
        together = reward.score(pictures, examples)
        assert together.valid_B.tolist() == [True, True, False, False, True]
        order = [4, 2, 0, 3, 1]
        again = reward.score(pictures[order], [examples[i] for i in order])
        assert torch.equal(again.valid_B, together.valid_B[order])
        assert torch.allclose(again.value_B, together.value_B[order], atol=1e-12)
        for i in (0, 1, 4):
            alone = score_of(reward, pictures[i], examples[i])
            assert alone == pytest.approx(float(together.value_B[i]), abs=1e-12)

    @pytest.mark.parametrize(
        "options", [{}, {"normalise": "matches", "floor": 0.0, "miss": 0.5, "extra": 0.3}, {"miss": 1.0}]
    )
    @pytest.mark.parametrize(("m", "n"), [(2, 2), (3, 2), (2, 3), (2, 0)])
    def test_gradient_in_the_pixels_matches_finite_differences(self, options, m, n):
        if n == 0 and "miss" not in options:
            options = {"miss": 1.0, "normalise": "matches"}
        reward, example = MatchingReward(linear_encoder(), **options), example_of(PEOPLE[:m], GRID[:n])
        # Strangers on a noisy ground: a perfect match or an empty window has no gradient to check.
        noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        picture = 0.7 * scene([person(20 + i) for i in range(n)], GRID[:n]) + 0.2 * noise
        grad = gradient_of(reward, picture, example)
        direction = grad / grad.norm() + 0.3 * torch.nn.functional.normalize(picture.flatten(), dim=0).view_as(picture)
        step = 1e-5
        ahead, behind = (score_of(reward, picture + sign * step * direction, example) for sign in (1, -1))
        assert (ahead - behind) / (2 * step) == pytest.approx(float((grad * direction).sum()), rel=1e-4)

    def test_the_gradient_stays_in_the_faces(self, reward):
        places = GRID[:2]
        grad = gradient_of(reward, scene(PEOPLE[:2], places), example_of(PEOPLE[:2], places))
        inside = scene([torch.ones_like(PEOPLE[0])] * 2, places) == 1
        assert bool((grad[inside] != 0).any())
        assert bool((grad[~inside].abs() < 1e-9).all())

    def test_climbing_the_gradient_makes_strangers_alike_to_their_references(self):
        reward = MatchingReward(linear_encoder())
        example = example_of(PEOPLE[:2], GRID[:2])
        picture = scene([person(11), person(12)], GRID[:2])
        before = score_of(reward, picture, example)
        for _ in range(30):
            grad = gradient_of(reward, picture, example)
            picture = (picture + 0.5 * grad / grad.norm()).clamp(0, 1)
        assert score_of(reward, picture, example) > before + 0.2

    def test_an_exchange_of_two_people_is_not_worse_and_a_double_is(self, reward):
        example = example_of(PEOPLE[:2], GRID[:2])
        right, swapped, twice = (
            score_of(reward, scene(people, GRID[:2]), example)
            for people in (PEOPLE[:2], PEOPLE[1::-1], [PEOPLE[0], PEOPLE[0]])
        )
        assert swapped == pytest.approx(right, abs=1e-12)
        assert twice < right - 0.2

    def test_what_cannot_be_scored_is_masked_counted_and_gives_no_gradient(self, reward):
        faceless = dataclasses.replace(
            example_of(PEOPLE[:2], GRID[:2], id="faceless reference"),
            extras={FACE_LANDMARKS: landmarks_at(*GRID[:2]), IDENTITY_LANDMARKS: [landmarks_at((0, 0)), []]},
        )
        examples = [example_of(PEOPLE[:2], GRID[:2]), example_of(PEOPLE[:2], []), example_of([], GRID[:1]), faceless]
        pixels = torch.stack([scene(PEOPLE[:2], GRID[:2])] * 4).requires_grad_()
        score = reward.score(pixels, examples)
        assert score.valid_B.tolist() == [True, False, False, False]
        assert score.counts == {
            "faces": 5,
            "no_face": 1,
            "unreadable_reference": 1,
            "missing_faces": 2,
            "extra_faces": 0,
        }
        (grad,) = torch.autograd.grad(score.value_B.sum(), pixels)
        assert bool((grad[0] != 0).any())
        assert bool((grad[1:] == 0).all())

    def test_pixels_that_are_not_finite_are_masked(self, reward):
        pixels = torch.stack([scene(PEOPLE[:2], GRID[:2])] * 2)
        pixels[1] = torch.nan
        score = reward.score(pixels, [example_of(PEOPLE[:2], GRID[:2]), example_of(PEOPLE[:2], GRID[:2])])
        assert score.valid_B.tolist() == [True, False]

    def test_a_whole_batch_without_faces(self, reward):
        pixels = torch.zeros(2, 3, 64, 64, dtype=torch.float64, requires_grad=True)
        score = reward.score(pixels, [example_of(PEOPLE[:1], [])] * 2)
        assert score.valid_B.tolist() == [False, False]
        assert score.value_B.requires_grad


class TestReferences:
    def group(self, people: list[Tensor]) -> Example:
        places = GRID[: len(people)]
        return Example(
            id="group",
            identity_refs=(scene(people, places),),
            extras={FACE_LANDMARKS: landmarks_at(*GRID[:2]), IDENTITY_LANDMARKS: [landmarks_at(*places)]},
        )

    def test_a_group_photograph_is_as_good_as_portraits(self, reward):
        picture = scene(PEOPLE[:2], GRID[:2])
        expected = score_of(reward, picture, example_of(PEOPLE[:3], GRID[:2]))
        assert score_of(reward, picture, self.group(PEOPLE[:3])) == pytest.approx(expected, abs=1e-6)

    def test_one_each_takes_the_largest_face_and_forgets_the_background(self, reward):
        portrait = scene(PEOPLE[:2], [(0, 0), (24, 24)])
        nearer = torch.cat([landmarks_at((24, 24)) + (landmarks_at((24, 24)) - 32) * 0.1, landmarks_at((0, 0))])
        example = Example(
            id="a",
            identity_refs=(portrait,),
            extras={FACE_LANDMARKS: landmarks_at((24, 24)), IDENTITY_LANDMARKS: [nearer.flip(0)]},
        )
        one = MatchingReward(linear_encoder(), references="one_each").score(portrait[None], [example])
        both = reward.score(portrait[None], [example])
        assert (one.counts["missing_faces"], both.counts["missing_faces"]) == (0, 1)
        people = reward.faces.references(example)[0]
        drawn = reward.faces.compare(portrait[None], [example], one_each=True).drawn[0]
        assert float(one.value_B) == pytest.approx(float(people[0] @ drawn[0]), abs=1e-12)
        assert float(both.value_B) == pytest.approx(float(value_of(people @ drawn.T)), abs=1e-12)


class TestMiss:
    def test_it_costs_nothing_when_everybody_is_there(self):
        picture, example = scene(PEOPLE[:3], GRID[:3]), example_of(PEOPLE[:3], GRID[:3])
        plain, with_miss = MatchingReward(linear_encoder()), MatchingReward(linear_encoder(), miss=1.0)
        assert score_of(with_miss, picture, example) == score_of(plain, picture, example)
        assert torch.equal(gradient_of(with_miss, picture, example), gradient_of(plain, picture, example))

    def test_a_dropped_face_costs_where_the_official_form_rewards_it(self):
        """Two of three people drawn: officially as good as all three; with the term it is worse."""
        example = [example_of(PEOPLE[:3], GRID[:n]) for n in (2, 3)]
        pictures = [scene(PEOPLE[:n], GRID[:n]) for n in (2, 3)]
        plain, with_miss = MatchingReward(linear_encoder()), MatchingReward(linear_encoder(), miss=1.0)
        official = [score_of(plain, p, e) for p, e in zip(pictures, example, strict=True)]
        assert official[0] == pytest.approx(official[1], abs=0.1)
        ours = [score_of(with_miss, p, e) for p, e in zip(pictures, example, strict=True)]
        assert ours[0] < ours[1] - 0.15

    def test_without_any_face_there_is_a_value_and_a_useful_gradient(self):
        """Climbing it makes the missing person appear somewhere, without a detector."""
        reward, example = MatchingReward(linear_encoder(), miss=1.0), example_of(PEOPLE[:1], [])
        picture = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        before = score_of(reward, picture, example)
        assert -1 < before < -0.6  # the best of 59 windows is a little like anybody
        for _ in range(40):
            grad = gradient_of(reward, picture, example)
            picture = (picture + 0.7 * grad / grad.norm()).clamp(0, 1)
        assert score_of(reward, picture, example) > before + 0.4

    def test_faces_that_were_found_are_left_alone(self):
        """The one who is missing is sought elsewhere: the pixels of the other's face get the official gradient only."""
        noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        inside = scene([torch.ones_like(PEOPLE[0])], GRID[:1]) == 1
        picture = torch.where(inside, scene([person(20)], GRID[:1]), noise)
        example = example_of(PEOPLE[:2], GRID[:1])
        plain, with_miss = (
            gradient_of(MatchingReward(linear_encoder(), miss=miss), picture, example) for miss in (0.0, 1.0)
        )
        assert bool((plain[inside] != 0).all())
        assert torch.equal(with_miss[inside], plain[inside])
        assert bool((with_miss[~inside] != 0).any())

    def test_two_missing_people_are_sought_in_two_places_each_where_it_looks_most_like_them(self):
        encoder = linear_encoder()
        # Windows of half of 32 pixels are 16 wide and start at 0, 8 and 16: each person fills one.
        picture = scene(PEOPLE[:2], [(0, 0), (16, 16)], (32, 32))
        wanted = torch.cat(encoder.references(example_of(PEOPLE[:2], [])))
        nobody = GivenDetector().detect(picture[None], [torch.zeros(0, 5, 2)])
        assert float(missing_cost(encoder, picture[None], nobody, [wanted])) == pytest.approx(0, abs=1e-5)
        twins = torch.cat([wanted[:1], wanted[:1]])
        assert float(missing_cost(encoder, picture[None], nobody, [twins])) > 0.3

    def test_where_no_window_is_left_the_whole_cost_is_due(self):
        encoder = linear_encoder()
        everywhere = [
            GivenDetector().detect(torch.zeros(1), [torch.tensor([[[0.0, 0], [40, 0], [9, 9], [0, 40], [40, 40]]])])[0]
        ]
        wanted = torch.cat(encoder.references(example_of(PEOPLE[:2], [])))
        pixels = torch.rand(1, 3, 32, 32, dtype=torch.float64, requires_grad=True)
        cost = missing_cost(encoder, pixels, everywhere, [wanted])
        assert cost.tolist() == [2]
        assert float(torch.autograd.grad(cost.sum(), pixels)[0].abs().max()) == 0


class TestExtra:
    def test_each_face_too_many_costs_the_same_share_and_moves_no_pixel(self):
        picture, example = scene(PEOPLE[:5], GRID[:5]), example_of(PEOPLE[:2], GRID[:5])
        plain, with_extra = MatchingReward(linear_encoder()), MatchingReward(linear_encoder(), extra=0.5)
        cost = score_of(plain, picture, example) - score_of(with_extra, picture, example)
        assert cost == pytest.approx(0.5 * 3 / 2, abs=1e-12)
        assert torch.equal(gradient_of(with_extra, picture, example), gradient_of(plain, picture, example))

    def test_nobody_too_many_costs_nothing(self):
        for m, n in ((2, 2), (3, 2)):
            picture, example = scene(PEOPLE[:n], GRID[:n]), example_of(PEOPLE[:m], GRID[:n])
            assert score_of(MatchingReward(linear_encoder(), extra=0.5), picture, example) == score_of(
                MatchingReward(linear_encoder()), picture, example
            )


OPTIONS: list[dict[str, Any]] = [
    {},
    {"normalise": "matches", "floor": 0.0, "miss": 0.5, "extra": 0.5},
    {"references": "one_each", "miss": 0.5},
]


class TestContract:
    @pytest.mark.parametrize("options", OPTIONS)
    def test_with_a_detector_that_looks(self, options):
        encoder = FaceEncoder(TwoPlaces(), tiny_iresnet(), crop_size=CROP)
        check_reward(MatchingReward(encoder, **options), image_size=(48, 64))

    @pytest.mark.parametrize("options", OPTIONS)
    def test_with_the_given_detector(self, options):
        examples = [
            example_of([p.float() for p in PEOPLE[:m]], GRID[:n], id=f"{m} {n}")
            for m, n in ((2, 2), (3, 1), (1, 3), (2, 0))
        ]
        encoder = FaceEncoder(GivenDetector(), tiny_iresnet(), crop_size=CROP)
        check_reward(MatchingReward(encoder, **options), examples=examples)

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"miss": -1.0}, "miss: -1 "), ({"extra": -0.5}, "extra: -0.5 "), ({"floor": 1.5}, "floor: 1.5 is no cosine")],
    )
    def test_impossible_options_are_refused(self, options, message):
        with pytest.raises(ConfigError, match=message):
            MatchingReward(linear_encoder(), **options)
        # Before any weight is read.
        with pytest.raises(ConfigError, match=message):
            MatchingReward.from_pretrained("nowhere.safetensors", **options)


class TestFromPretrained:
    def test_by_name_as_an_experiment_does(self, tmp_path):
        save_iresnet(tiny_iresnet(), tmp_path / "face.safetensors")
        cls = resolve("rewards", "matching")
        assert cls is MatchingReward
        asked = {"checkpoint": str(tmp_path / "face.safetensors"), "normalise": "matches", "miss": 0.5, "floor": 0.0}
        made = factory(cls)(**check_args(factory(cls), asked, "args"))
        assert (made.normalise, made.miss, made.extra, made.floor, made.references) == (
            "matches",
            0.5,
            0.0,
            0.0,
            "all_faces",
        )
        assert made.faces.crop_size == CROP
        assert math.isfinite(
            score_of(made, scene(PEOPLE[:2], GRID[:2]).float(), example_of([p.float() for p in PEOPLE[:2]], GRID[:2]))
        )
        with pytest.raises(ConfigError, match="normalise"):
            check_args(factory(cls), asked | {"normalise": "people"}, "args")

    def test_a_detector_file_that_is_not_there_is_named_first(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"scrfd\.onnx does not exist"):
            MatchingReward.from_pretrained("nowhere.safetensors", detector=str(tmp_path / "scrfd.onnx"))
