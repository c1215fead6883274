"""The tiny world: the generator tells the truth, the witnesses see it, and what is bundled belongs to its recipes."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from rewardgen.errors import ConfigError
from rewardgen.reward import check_reward
from rewardgen.world import build
from rewardgen.world.dataset import TinyWorld
from rewardgen.world.recipes import vae as vae_recipe
from rewardgen.world.scenes import (
    Style,
    content_grid,
    describe,
    draw_contents,
    draw_photo_styles,
    draw_styles,
    oklab,
    render,
    spoil,
    take,
)
from rewardgen.world.similarity import style_similarity
from rewardgen.world.witness import (
    PALETTE_APART,
    TEXTURE_APART,
    ContentWitness,
    StyleWitness,
    palette_distance,
    texture_distance,
    unrelated_distances,
)

pytestmark = pytest.mark.filterwarnings("ignore")


def test_pictures_are_a_function_of_content_style_and_seed() -> None:
    content, style = draw_contents(6, 1), draw_styles(6, 2)
    pixels = render(content, style, 3)
    assert pixels.shape == (6, 3, 64, 64)
    assert float(pixels.min()) >= 0
    assert float(pixels.max()) <= 1
    assert torch.equal(pixels, render(content, style, 3))
    one = render(take(content, torch.tensor([4])), replace(take(style, torch.tensor([4])), grain_N=torch.zeros(1)))
    assert torch.allclose(one[0], render(content, replace(style, grain_N=torch.zeros(6)))[4], atol=1e-6)


def test_splits_share_no_arrangement_and_no_style_bucket() -> None:
    train, held_out = draw_contents(400, 5, "train"), draw_contents(100, 6, "held_out")
    seen = {tuple(row) for row in content_grid(train).tolist()}
    assert not seen & {tuple(row) for row in content_grid(held_out).tolist()}
    from rewardgen.world.scenes import _style_keys

    assert not set(_style_keys(draw_styles(400, 5, "train"))) & set(_style_keys(draw_styles(100, 6, "held_out")))


def test_prompts_name_every_shape_once_in_reading_order() -> None:
    content = draw_contents(50, 9)
    for prompt, kinds in zip(describe(content), content.kind_NK.tolist(), strict=True):
        assert prompt.count("a ") == sum(kind >= 0 for kind in kinds)


def test_oklab_of_known_colours() -> None:
    lab = oklab(torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
    expected = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.62796, 0.22486, 0.12585]])
    assert torch.allclose(lab, expected, atol=5e-3)


def test_similarity_is_one_on_itself_symmetric_and_falls_when_spoiled() -> None:
    style, other = draw_styles(60, 11), draw_styles(60, 12)
    own = style_similarity(style, style)
    assert torch.allclose(own.diag(), torch.ones(60), atol=1e-3)
    assert torch.allclose(own, own.T, atol=1e-5)
    assert float(own.min()) >= 0
    assert float(own.max()) <= 1 + 1e-6
    halfway = replace(style, background_N3=torch.lerp(style.background_N3, other.background_N3, 0.5))
    one, half = style_similarity(style, style).diag(), style_similarity(style, halfway).diag()
    full = style_similarity(style, replace(style, background_N3=other.background_N3)).diag()
    assert bool((one > half).all())
    assert float((half - full).mean()) > 0.02


def test_spoiling_changes_the_style_and_never_the_truth_it_came_from() -> None:
    style, other = draw_styles(200, 13), draw_styles(200, 14)
    before = {f.name: getattr(style, f.name).clone() for f in fields(Style)}
    spoiled = spoil(style, other, 15)
    assert all(torch.equal(before[name], getattr(style, name)) for name in before)
    changed = (spoiled.background_N3 - style.background_N3).abs().sum(1) > 1e-4
    assert 0.3 < float(changed.float().mean()) < 0.5
    assert bool((spoiled.amount_N <= style.amount_N).all())


def test_style_witness_orders_right_near_and_unrelated() -> None:
    world = TinyWorld("held_out", 40, seed=3)
    examples = [world[i] for i in range(40)]
    witness = StyleWitness()
    truth = torch.stack([e.extras["truth"] for e in examples])
    right = witness.score(truth, examples).value_B
    blurred = witness.score(torch.nn.functional.avg_pool2d(truth, 5, 1, 2), examples).value_B
    wrong = witness.score(truth.roll(1, 0), examples).value_B
    assert torch.allclose(right, torch.ones(40), atol=1e-5)
    assert bool((right > blurred).all())
    assert float(blurred.mean()) > float(wrong.mean()) + 0.2
    assert abs(float(wrong.mean())) < 0.3


def test_witness_scale_is_that_of_unrelated_styles() -> None:
    palette, texture = unrelated_distances(400)
    assert palette == pytest.approx(PALETTE_APART, rel=0.1)
    assert texture == pytest.approx(TEXTURE_APART, rel=0.1)


def test_distances_are_zero_on_themselves_and_palette_ignores_places() -> None:
    pixels = render(draw_contents(8, 21), draw_styles(8, 22))
    shuffled = pixels.flatten(2)[:, :, torch.randperm(64 * 64, generator=torch.Generator().manual_seed(0))]
    assert float(palette_distance(pixels, pixels).max()) == 0
    assert float(texture_distance(pixels, pixels).max()) == 0
    assert float(palette_distance(pixels, shuffled.view_as(pixels)).max()) < 1e-6


def test_content_witness_reads_the_truth_and_notices_another_arrangement() -> None:
    world = TinyWorld("held_out", 120, seed=4)
    examples = [world[i] for i in range(120)]
    truth = torch.stack([e.extras["truth"] for e in examples])
    witness = ContentWitness()
    assert float(witness.score(truth, examples).value_B.mean()) > 0.8
    assert float(witness.score(truth.roll(1, 0), examples).value_B.mean()) < 0.2


@pytest.mark.parametrize("witness", [StyleWitness, ContentWitness])
def test_witnesses_keep_the_reward_contract(witness: type) -> None:
    world = TinyWorld("held_out", 5, seed=4)
    check_reward(witness(), examples=[world[i] for i in range(5)])


def test_witnesses_do_not_apply_without_truth() -> None:
    world = TinyWorld("held_out", 2)
    blind = [replace(world[0], extras={}), world[1]]
    for witness in (StyleWitness(), ContentWitness()):
        assert witness.score(torch.rand(2, 3, 64, 64), blind).valid_B.tolist() == [False, True]


def test_training_targets_are_imperfect_and_held_out_ones_true() -> None:
    train, held_out = TinyWorld("train", 60), TinyWorld("held_out", 20)
    wrong = [not torch.equal(train[i].target, train[i].extras["truth"]) for i in range(60)]
    assert 0.3 < sum(wrong) / 60 < 0.95
    assert all(torch.equal(held_out[i].target, held_out[i].extras["truth"]) for i in range(20))


@pytest.mark.parametrize(("arguments", "said"), [({"split": "test"}, "split"), ({"size": 0}, "size")])
def test_bad_arguments_of_the_dataset_are_named(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TinyWorld(**arguments)  # type: ignore[arg-type]


def test_bundled_pieces_belong_to_the_current_recipes() -> None:
    found = {name: build.stale(name, piece) for name, piece in build.pieces().items()}
    assert found == dict.fromkeys(found, "")


def test_bundled_world_is_small() -> None:
    assert sum(path.stat().st_size for path in build.ASSETS.rglob("*") if path.is_file()) < 25e6


def test_unknown_piece_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'vae'"):
        build.build_world(["vea"], folder=tmp_path)


def test_autoencoder_recipe_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """On four small pictures, always the same, so that a minute's work is done in seconds."""
    lesson = vae_recipe.pictures(4, 5)[:, :, ::2, ::2]
    monkeypatch.setattr(vae_recipe, "pictures", lambda n, seed: lesson)
    vae = vae_recipe.untrained()
    losses = vae_recipe.train_round(vae, replace(vae_recipe.ROUNDS[0], batch=4), 60, 0.5, 0.0)
    assert sum(losses[-8:]) < 0.6 * sum(losses[:8])
    with torch.no_grad():
        rebuilt = vae.decode(vae.encode(lesson * 2 - 1).latent_dist.mean).sample / 2 + 0.5
    error = (rebuilt.clamp(0, 1) - lesson).square().mean()
    # What nothing but the average colour would give: no picture has gone through the latents yet.
    average = (lesson - lesson.mean((0, 2, 3), keepdim=True)).square().mean()
    assert float(error) < 0.65 * float(average)


def test_photo_styles_are_plain() -> None:
    photo = draw_photo_styles(20, 1)
    assert float(photo.amount_N.max()) == 0
    assert float(photo.outline_N.max()) == 0
