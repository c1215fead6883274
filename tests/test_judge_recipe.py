"""The tiny judge's recipe: its stages learn, and artefacts change pictures without changing labels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rewardgen.rewards.judging.local import LocalModel
from rewardgen.rewards.judging.questions import load_question
from rewardgen.world.build import ASSETS
from rewardgen.world.pairs import UNLIKE, StylePairs
from rewardgen.world.recipes import judge as recipe
from rewardgen.world.recipes.judge import choose_pairs, teach_comparing, teach_eyes
from rewardgen.world.recipes.lessons import Lesson, rendered
from rewardgen.world.recipes.vae import load
from rewardgen.world.scenes import concat, draw_contents, draw_styles, render, spoil
from rewardgen.world.similarity import style_similarity
from rewardgen.world.tiny_vlm import tiny_llava


def test_the_eyes_learn_likeness_of_styles() -> None:
    model, _ = tiny_llava(vision_width=24, vision_layers=1, text_width=24, text_layers=1)
    style, content = draw_styles(8, 1), draw_contents(16, 2)
    styles = concat([style, style])
    lesson = Lesson(render(content, styles, 3), styles, content)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    losses = teach_eyes(model, [lesson], 16)
    assert losses[-1] < 0.7 * losses[0]
    changed = {name.split(".")[1] for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert changed == {"vision_tower"}


def test_pairs_are_the_same_style_a_near_one_and_another_in_the_stated_shares() -> None:
    lesson, number = rendered(64, 7, load(ASSETS), photos=False), 2000
    a_P, b_P = choose_pairs(64, number, torch.Generator().manual_seed(0))
    assert int(a_P.max()) < 32, "a reference is never spoiled"
    assert not bool((a_P == b_P).any())
    truth_P = style_similarity(lesson.style, lesson.style)[a_P, b_P]
    same_P, kin_P = (b_P < 32) & (a_P % 16 == b_P % 16), a_P % 16 == b_P % 16
    assert abs(float(same_P.float().mean()) - recipe.SAME) < 0.03
    assert abs(float((kin_P & ~same_P).float().mean()) - recipe.NEAR) < 0.03
    assert float(truth_P[same_P].min()) > 0.99
    assert float(truth_P[~kin_P].mean()) < 0.4 < UNLIKE < float(truth_P[kin_P & ~same_P].mean()) < 0.95


def test_comparing_is_learned_by_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "COMPARING", replace(recipe.COMPARING, batch=8, lr=5e-3))
    model, processor = tiny_llava(vision_width=24, vision_layers=1, text_width=24, text_layers=2)
    judge = LocalModel(model, processor, load_question(recipe.QUESTION), checkpointing=False)
    style, content = draw_styles(4, 1), draw_contents(16, 2)
    styles = concat([style, style, spoil(style, draw_styles(4, 3), 4), style])
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    losses = teach_comparing(judge, [Lesson(render(content, styles, 3), styles, content)], 24)
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    changed = {name.split(".")[1] for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert {"vision_tower", "multi_modal_projector", "language_model"} <= changed
    assert not model.training


def test_artefacts_change_pictures_and_no_labels() -> None:
    plain, disturbed = StylePairs("train", 8), StylePairs("train", 8)
    disturbed.disturb(load(ASSETS), seed=5)
    gaps = [float((disturbed[i].target - plain[i].target).abs().mean()) for i in range(8)]
    assert max(gaps) > 1e-3
    assert max(gaps) < 0.1
    assert [disturbed[i].extras for i in range(8)] == [plain[i].extras for i in range(8)]


def test_the_bundled_judge_tells_unseen_styles_apart() -> None:
    """On fresh held-out pairs, plain and with artefacts; an untrained judge answers by chance."""
    for disturbed in (False, True):
        found = recipe.held_out_agreement(ASSETS, 80, disturbed=disturbed)
        assert found.balanced_accuracy >= 0.9
