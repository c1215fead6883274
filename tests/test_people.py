"""The identity world: drawn faces with known truth, splits without doubles, the dataset and its layout witness."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rewardgen.errors import ConfigError
from rewardgen.reward import check_reward
from rewardgen.types import Example
from rewardgen.world.faces import MAX_PEOPLE, PLACES, PORTRAIT, SIDE, draw_groups, lay, portraits
from rewardgen.world.people import LOOK, SHAPE, Looks, draw_looks, draw_people, kinds, take
from rewardgen.world.people_dataset import DOUBLES, LOOKALIKES, TinyPeople, doubles, lookalikes
from rewardgen.world.places import LayoutWitness, taken


def neutral(people: int, **values: float) -> Looks:
    """Straight on, even light, white clothes."""
    looks = draw_looks(people, 0)
    pose = torch.zeros_like(looks.pose_ML)
    for name, value in ({"gain": 1.0, "lids": 1.0} | values).items():
        pose[:, list(LOOK).index(name)] = value
    return Looks(pose_ML=pose, clothes_M3=torch.ones(people, 3))


def large(people: object, looks: Looks, side: int = 120) -> tuple[Tensor, Tensor, Tensor]:
    """Portraits so large that every part of a face has pixels of its own."""
    n = len(looks.clothes_M3)
    picture = torch.full((n, 3, side, side), 0.5)
    middle = torch.full((n, 2), side / 2)
    landmarks, boxes = lay(picture, torch.arange(n), people, looks, middle, torch.full((n,), 0.3 * side))  # type: ignore[arg-type]
    return picture, landmarks, boxes


def colour_at(pictures: Tensor, points_M2: Tensor) -> Tensor:
    x, y = points_M2.round().long().unbind(1)
    return pictures[torch.arange(len(pictures)), :, y, x]


def test_held_out_people_have_no_double_in_training() -> None:
    train, held_out = draw_people(2000, 1, "train"), draw_people(600, 2, "held_out")
    reserved, everybody = set(kinds(held_out)), kinds(draw_people(2000, 3))
    assert not reserved & set(kinds(train))
    assert len(reserved) > 80
    assert 0.04 < sum(kind in reserved for kind in everybody) / len(everybody) < 0.15
    again = draw_people(2000, 1, "train")
    assert torch.equal(train.shape_MS, again.shape_MS)
    assert torch.equal(train.skin_M3, again.skin_M3)


def test_traits_and_looks_fill_their_ranges() -> None:
    for drawn, ranges in ((draw_people(2000, 4).shape_MS, SHAPE), (draw_looks(2000, 5).pose_ML, LOOK)):
        low, high = (torch.tensor(side) for side in zip(*ranges.values(), strict=True))
        share = (drawn - low) / (high - low)
        assert bool(((share >= 0) & (share <= 1)).all())
        torch.testing.assert_close(share.mean(0), torch.full((len(ranges),), 0.5), rtol=0, atol=0.03)


@pytest.mark.parametrize(("yaw", "roll"), [(0.0, 0.0), (-0.35, 0.0), (0.0, 0.2)])
def test_landmarks_lie_on_what_they_name(yaw: float, roll: float) -> None:
    """Pupils at the eyes, the nose's colour at the nose, and the mouth's corners where its colour ends."""
    people = draw_people(14, 6)
    looks = neutral(14, yaw=yaw, roll=roll)
    pictures, landmarks, boxes = large(people, looks)
    gaze = 0.08 * 36 * looks("yaw")[:, 0] * torch.tensor([1.0, 0.0])  # pupils turn a little further than the head
    for eye in (0, 1):
        torch.testing.assert_close(
            colour_at(pictures, landmarks[:, eye] + gaze),
            people.iris_M3 * 0.15,
            rtol=0,
            atol=0.06,
        )
    torch.testing.assert_close(colour_at(pictures, landmarks[:, 2]), people.skin_M3 * 0.7, rtol=0, atol=0.03)
    inward = (landmarks[:, 4] - landmarks[:, 3]) * 0.15
    shaven = people.beard_M == 0
    inside = colour_at(pictures, landmarks[:, 3] + inward)
    outside = colour_at(pictures, landmarks[:, 3] - inward)
    assert bool(((inside - people.skin_M3).norm(dim=1) > 0.1)[shaven].all())
    assert bool(((outside - inside).norm(dim=1) > 0.1)[shaven].all())
    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    assert bool(((landmarks >= low) & (landmarks <= high)).all())
    assert bool((landmarks[:, 0, 0] < landmarks[:, 1, 0]).all())


def test_a_look_changes_the_picture_and_light_only_the_brightness() -> None:
    people = take(draw_people(1, 7), torch.zeros(4, dtype=torch.long))
    pose = torch.cat([neutral(1, **values).pose_ML for values in ({}, {"gain": 0.85}, {"smile": 1.0}, {"pitch": 0.15})])
    pictures, landmarks, _ = large(people, Looks(pose_ML=pose, clothes_M3=torch.ones(4, 3)))
    plain, dark, smiling, _ = pictures
    covered = (plain - 0.5).abs().sum(0) > 1e-4
    ratio = (dark / plain)[:, covered & (plain < 0.999).all(0)]
    assert float(ratio.median()) == pytest.approx(0.85, abs=1e-3)
    assert torch.equal(landmarks[0], landmarks[1])
    assert bool((landmarks[3, :, 1] > landmarks[0, :, 1]).all())  # the head nods downwards
    changed = ((smiling - plain).abs().sum(0) > 0.05).nonzero()
    assert len(changed)
    assert int(changed[:, 0].min()) > float(landmarks[0, 2, 1])  # nothing above the nose


def test_everybody_stands_where_the_prompt_says() -> None:
    people = draw_people(30, 8)
    who = torch.tensor([[0, 1, 2, -1, -1, -1], [3, -1, -1, -1, -1, -1], [4, 5, 6, 7, 8, 9]])
    pictures, known, prompts = draw_groups(people, who, 9)
    assert pictures.shape == (3, 3, SIDE, SIDE)
    assert bool(((pictures >= 0) & (pictures <= 1)).all())
    for row, prompt in enumerate(prompts):
        places = [place for place in known.place_NK[row].tolist() if place >= 0]
        assert len(set(places)) == len(places) == int((who[row] >= 0).sum())
        assert prompt.split(" on ")[0] == " and ".join(PLACES[place] for place in sorted(places))
        for k, place in enumerate(known.place_NK[row].tolist()):
            if place >= 0:
                middle = (known.boxes_NK4[row, k, :2] + known.boxes_NK4[row, k, 2:]) / 2
                assert int(middle[1] // 48) * 3 + int(middle[0] // 32) == place
    # The same people in the same places: somebody else's face changes that place and no other.
    swapped, _, _ = draw_groups(people, torch.where(who == 3, 20, who), 9)
    difference = (swapped - pictures).abs().sum((1, 2, 3))
    assert (difference > 0).tolist() == [False, True, False]


def test_portraits_show_one_face_each_inside_the_picture() -> None:
    pictures, boxes, landmarks = portraits(draw_people(64, 10), 11)
    assert pictures.shape == (64, 3, PORTRAIT, PORTRAIT)
    assert bool((landmarks > 0).all() and (landmarks < PORTRAIT - 1).all())
    assert bool((boxes[:, 2:] > boxes[:, :2]).all())


def test_the_dataset_is_true_where_it_is_held_out_and_imperfect_where_it_trains() -> None:
    train, held_out = TinyPeople("train", 30), TinyPeople("held_out", 20, people=3)
    wrong = [not torch.equal(train[i].target, train[i].extras["truth"]) for i in range(30)]
    assert 0.3 < sum(wrong) / 30 < 1
    assert not any(wrong[i] for i in range(30) if len(train[i].identity_refs) == 1)
    known = TinyPeople("train", 30, targets="true")
    assert all(torch.equal(known[i].target, train[i].extras["truth"]) for i in range(30))
    assert all(torch.equal(held_out[i].target, held_out[i].extras["truth"]) for i in range(20))
    assert {len(held_out[i].identity_refs) for i in range(20)} == {3}
    counts = [len(train[i].identity_refs) for i in range(30)]
    assert set(counts) == set(range(1, MAX_PEOPLE + 1))
    assert counts == [int(train[i].extras["places"].sum()) for i in range(30)]
    first, again = train[3], TinyPeople("train", 30)[3]
    assert torch.equal(first.target, again.target)
    assert all(map(torch.equal, first.identity_refs, again.identity_refs))
    assert len({train[i].id for i in range(30)} | {held_out[i].id for i in range(20)}) == 50


def test_lookalikes_are_as_many_as_said_and_others_untouched() -> None:
    people, others = draw_people(2000, 12), draw_people(2000, 13)
    spoiled = lookalikes(people, others, LOOKALIKES, 14)
    changed = (spoiled.skin_M3 != people.skin_M3).any(1)
    assert float(changed.float().mean()) == pytest.approx(LOOKALIKES, abs=0.04)
    for name in ("shape_MS", "hair_M3", "style_M", "beard_M", "glasses_M"):
        assert torch.equal(getattr(spoiled, name)[~changed], getattr(people, name)[~changed])
    torch.testing.assert_close(spoiled.skin_M3[changed], ((people.skin_M3 + others.skin_M3) / 2)[changed])


def test_doubles_are_as_many_as_said_and_of_the_same_picture() -> None:
    rng = torch.Generator().manual_seed(0)
    count_N = torch.randint(1, MAX_PEOPLE + 1, (3000,), generator=rng)
    who_NK = torch.where(torch.arange(MAX_PEOPLE) < count_N[:, None], torch.arange(18000).view(3000, MAX_PEOPLE), -1)
    shown_NK = doubles(who_NK, DOUBLES, 3)
    assert bool(((shown_NK < 0) == (who_NK < 0)).all())
    assert bool(
        (shown_NK.div(MAX_PEOPLE, rounding_mode="floor")[who_NK >= 0] == who_NK[who_NK >= 0] // MAX_PEOPLE).all()
    )
    changed_NK = shown_NK != who_NK
    assert not bool(changed_NK[count_N == 1].any())
    for number in range(2, MAX_PEOPLE + 1):
        changed = changed_NK[count_N == number][:, :number].float()
        assert float(changed.mean()) == pytest.approx(DOUBLES, abs=0.05)
    six = (shown_NK - who_NK)[count_N == MAX_PEOPLE] % MAX_PEOPLE
    assert torch.bincount(six[six > 0]).bool().tolist() == [False] + 5 * [True]  # anybody else


@pytest.mark.parametrize(
    ("arguments", "said"), [({"split": "test"}, "split"), ({"size": 0}, "size"), ({"people": 7}, "people")]
)
def test_bad_arguments_of_the_dataset_are_named(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TinyPeople(**arguments)  # type: ignore[arg-type]


def test_layout_witness_reads_the_truth_and_notices_another_layout() -> None:
    world = TinyPeople("held_out", 60)
    examples = [world[i] for i in range(60)]
    truth = torch.stack([example.extras["truth"] for example in examples])
    places = torch.stack([example.extras["places"] for example in examples])
    assert float((taken(truth) == places).float().mean()) > 0.98
    witness = LayoutWitness()
    assert float(witness.score(truth, examples).value_B.mean()) > 0.97
    assert float(witness.score(truth.roll(1, 0), examples).value_B.mean()) < 0.7
    blurred = torch.nn.functional.avg_pool2d(truth, 3, 1, 1)
    assert float(witness.score(blurred, examples).value_B.mean()) > 0.9
    assert witness.score(truth[:2], [Example(id="blind"), examples[1]]).valid_B.tolist() == [False, True]
    assert not bool(witness.score(truth[:2, :, :64, :64], examples[:2]).valid_B.any())
    check_reward(witness, examples=examples[:5], image_size=(SIDE, SIDE))
