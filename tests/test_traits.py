"""The identity witnesses: traits as numbers, agreement by its definition, what they say of true and false pictures."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest
import torch

from rewardgen.errors import ConfigError
from rewardgen.reward import check_reward
from rewardgen.types import Example
from rewardgen.world.faces import SIDE, draw_groups
from rewardgen.world.people import draw_people, take
from rewardgen.world.people_dataset import TinyPeople
from rewardgen.world.recipes import traits as recipe
from rewardgen.world.traits import TraitWitness, agreement, cells, traits

GROUPS = 40


def groups(people: int) -> tuple[list[Example], torch.Tensor]:
    world = TinyPeople("held_out", GROUPS, seed=31, people=people)
    examples = [world[index] for index in range(GROUPS)]
    return examples, torch.stack([example.extras["truth"] for example in examples])


def test_a_person_is_one_and_a_stranger_zero() -> None:
    mine_MT, others_MT = traits(draw_people(3000, 1)), traits(draw_people(3000, 2))
    assert float(mine_MT.square().sum(1).mean()) == pytest.approx(1, abs=0.02)
    assert float((mine_MT * others_MT).sum(1).mean()) == pytest.approx(0, abs=0.02)
    assert float(mine_MT.mean(0).abs().max()) < 0.02, "the average person is zero"


def test_each_part_of_a_person_weighs_a_sixth() -> None:
    people = draw_people(2000, 3)
    others = take(people, torch.randperm(2000, generator=torch.Generator().manual_seed(0)))
    for field in ("skin_M3", "hair_M3", "style_M", "beard_M", "glasses_M", "shape_MS"):
        changed = replace(people, **{field: getattr(others, field)})
        kept = (traits(people) * traits(changed)).sum(1).mean()
        assert float(kept) == pytest.approx(5 / 6, abs=0.025), field


def test_places_come_in_the_order_of_the_prompt() -> None:
    """A picture whose every place has its number as colour."""
    rows = torch.arange(SIDE) // (SIDE // 2)
    columns = torch.arange(SIDE) // (SIDE // 3)
    picture = (3 * rows[:, None] + columns).expand(1, 3, SIDE, SIDE) / 6
    found = cells(picture)
    assert found.shape == (1, 6, 3, 48, 32)
    torch.testing.assert_close(found.flatten(2).amin(2), torch.arange(6)[None] / 6)
    torch.testing.assert_close(found.flatten(2).amax(2), torch.arange(6)[None] / 6)


def test_agreement_is_that_of_the_best_assignment() -> None:
    agreement_MF = torch.randn(4, 4, generator=torch.Generator().manual_seed(5))
    best = max(permutations(range(4)), key=lambda order: float(agreement_MF[range(4), order].sum()))
    own = float(agreement_MF[range(4), best].mean())
    assert agreement(agreement_MF, apart=False) == pytest.approx(own)
    others = (float(agreement_MF.sum()) - 4 * own) / 12
    assert agreement(agreement_MF, apart=True) == pytest.approx(own - others, abs=1e-6)


@pytest.mark.parametrize("people", [2, 6])
def test_true_pictures_agree_and_those_of_others_do_not(people: int) -> None:
    examples, truth = groups(people)
    strangers = [
        replace(example, extras=example.extras | {"traits": other.extras["traits"]})
        for example, other in zip(examples, examples[1:] + examples[:1], strict=True)
    ]
    for witness in (TraitWitness(), TraitWitness("apart")):
        right = witness.score(truth, examples).value_B.mean()
        wrong = witness.score(truth, strangers).value_B.mean()
        assert float(right) > 0.3
        assert abs(float(wrong)) < 0.06, "sharp faces of strangers say nothing"


def test_who_stands_where_does_not_matter_and_mixtures_are_told() -> None:
    examples, truth = groups(6)
    witness, apart = TraitWitness(), TraitWitness("apart")
    swapped = [replace(e, extras=e.extras | {"traits": e.extras["traits"].flip(0)}) for e in examples]
    torch.testing.assert_close(witness.score(truth, swapped).value_B, witness.score(truth, examples).value_B)
    # Everybody as the mean of the picture's six places: like each a little, and like nobody more than like the others.
    height, width = SIDE // 2, SIDE // 3
    mixture = cells(truth).mean(1).repeat(1, 1, SIDE // height, SIDE // width)
    assert abs(float(apart.score(mixture, examples).value_B.mean())) < 0.03
    assert float(apart.score(truth, examples).value_B.mean()) > 0.3


def test_where_the_witnesses_do_not_apply() -> None:
    examples, truth = groups(2)
    alone = TinyPeople("held_out", 1, seed=31, people=1)[0]
    mixed = [examples[0], alone, Example(id="blind")]
    assert TraitWitness().score(truth[:3], mixed).valid_B.tolist() == [True, True, False]
    assert TraitWitness("apart").score(truth[:3], mixed).valid_B.tolist() == [True, False, False]
    assert not bool(TraitWitness().score(truth[:2, :, :64, :64], examples[:2]).valid_B.any())
    with pytest.raises(ConfigError, match="'face' is neither 'likeness' nor 'apart'"):
        TraitWitness("face")  # type: ignore[arg-type]
    check_reward(TraitWitness(), examples=examples[:4], image_size=(SIDE, SIDE))


def test_its_blueprint_has_its_sizes() -> None:
    sizes = [
        {name: p.shape for name, p in one.named_parameters()} for one in (TraitWitness(), TraitWitness.blueprint())
    ]
    assert sizes[0] == sizes[1]


def test_the_reader_learns() -> None:
    reader = recipe.make(None, steps=150, pictures=150)
    untaught = recipe.make(None, steps=1, pictures=100)
    assert recipe.explained(reader, None, 60) > 0.25
    assert recipe.explained(untaught, None, 60) < 0.1


def test_lessons_say_who_stands_where() -> None:
    """The place of a lesson's person shows them: its cell is that of a picture with this person alone there."""
    cells_F3HW, traits_FT = recipe.lessons(30, 7, "train", None)
    people = draw_people(6 * 30, 7, "train")
    who = (traits(people)[None] - traits_FT[:, None]).abs().sum(2).argmin(1)
    assert len(set(who.tolist())) == len(who), "everybody occurs once"
    pictures, known, _ = draw_groups(people, torch.arange(180).reshape(30, 6), 13)
    first = (who < 1).nonzero()[0, 0]
    place = known.place_NK[0, 0]
    assert torch.equal(cells(pictures)[0, place], cells_F3HW[first])
