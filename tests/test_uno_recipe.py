"""The tiny UNO's training material: whose place is whose, and the lesson on single places."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel

from rewardgen.policies.uno import UnoPolicy
from rewardgen.rewards.faces.encoder import FaceEncoder
from rewardgen.world.build import ASSETS
from rewardgen.world.faces import MAX_PEOPLE
from rewardgen.world.people_dataset import TinyPeople
from rewardgen.world.recipes import detector, embedder, training, uno_base

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def policy() -> UnoPolicy:
    transformer = FluxTransformer2DModel.from_pretrained(ASSETS / "base" / "transformer", torch_dtype=torch.float32)
    return uno_base.policy_of(ASSETS, transformer, "transformer")


def test_everybody_stands_where_the_dataset_says() -> None:
    """By the bundled detector and face network: the face at a person's place is the one on their portrait."""
    world = TinyPeople("held_out", 8, seed=3, people=4)
    examples = [world[i] for i in range(len(world))]
    encoder = FaceEncoder(detector.load(ASSETS), embedder.load(ASSETS), crop_size=embedder.CONFIG.image_size)
    seen = encoder.compare(torch.stack([example.extras["truth"] for example in examples]), examples, one_each=True)
    right = total = 0
    for example, faces, (wanted_MD, drawn_ND) in zip(examples, seen.found, seen.pairs(), strict=True):
        middle_N2 = (faces.boxes_N4[:, :2] + faces.boxes_N4[:, 2:]) / 2
        place_N = (middle_N2[:, 1] > 48).long() * 3 + (middle_N2[:, 0] / 32).long().clamp(0, 2)
        for nearest, place in zip((wanted_MD @ drawn_ND.T).argmax(1), example.extras["place_of"], strict=True):
            right, total = right + int(place_N[nearest] == place), total + 1
    assert right / total > 0.9


def test_the_lesson_on_places_learns(policy: UnoPolicy) -> None:
    worlds = [uno_base.cells_of(policy, TinyPeople("train", 24, seed=people, people=people)) for people in (4, 6)]
    assert [world.portraits_NKRC.shape[:3] for world in worlds] == [(24, 4, 25), (24, 6, 25)]
    assert all(world.truth_NLC.shape == (24, 144, 32) for world in worlds)
    assert bool(((worlds[1].place_NK.sort(1).values) == torch.arange(MAX_PEOPLE)).all())
    before = policy.transformer.x_embedder.weight.clone()
    losses = uno_base.learn_to_copy(policy, worlds, 12)
    assert sum(losses[6:]) < sum(losses[:6])
    assert not torch.equal(before, policy.transformer.x_embedder.weight)


def test_references_come_in_the_order_of_places_but_for_a_share() -> None:
    example = TinyPeople("train", 1, people=6)[0]
    places = example.extras["place_of"].tolist()
    place_of = dict(zip(example.identity_refs, places, strict=True))
    rng = torch.Generator().manual_seed(0)
    arranged = [uno_base.arranged(example, rng) for _ in range(400)]
    orders = [[place_of[reference] for reference in one.identity_refs] for one in arranged]
    assert all(sorted(order) == list(range(MAX_PEOPLE)) for order in orders)
    in_order = sum(order == sorted(order) for order in orders) / len(orders)
    assert abs(in_order - (1 - uno_base.SHUFFLED)) < 0.06
    assert abs(sum(one.prompt == "" for one in arranged) / len(arranged) - uno_base.SILENT) < 0.06


class Stopped(Exception):
    """Ends a training half way."""


def test_a_cut_off_stage_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "KEEP_EVERY", 4)
    recipe, asked = training.Recipe(name="toy", version="1", steps=14, batch=3, lr=0.1, seed=1), list[int]()

    def run(keep: Path | None, *, shift: float = 0.0, until: int = 99) -> torch.Tensor:
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 1)

        def loss(step: int) -> torch.Tensor:
            if step == until:
                raise Stopped
            asked.append(step)
            noise = torch.randn(recipe.batch, 3, generator=torch.Generator().manual_seed(step))
            value: torch.Tensor = (module(noise) - noise.sum(1, keepdim=True) - shift).square().mean()
            return value

        assert len(training.fit(module, loss, recipe, recipe.steps, keep)) == recipe.steps
        return module.weight.detach()

    undisturbed, keep = run(None), tmp_path / "runs" / "toy.pt"
    with pytest.raises(Stopped):
        run(keep, until=10)
    asked.clear()
    assert torch.equal(run(keep), undisturbed)
    assert asked == [0, *range(8, 14)]  # the first says that nothing else has changed
    asked.clear()
    assert torch.equal(run(keep), undisturbed)
    assert asked == [0]
    other = run(keep, shift=1.0)  # other material: from the start
    assert torch.equal(other, run(None, shift=1.0))
    assert asked.count(1) == 2
