"""The tiny judge's recipe: its eyes learn, and artefacts change pictures without changing labels."""

from __future__ import annotations

import torch

from rewardgen.world.build import ASSETS
from rewardgen.world.pairs import StylePairs
from rewardgen.world.recipes.judge import teach_eyes
from rewardgen.world.recipes.lessons import Lesson
from rewardgen.world.recipes.vae import load
from rewardgen.world.scenes import concat, draw_contents, draw_styles, render
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


def test_artefacts_change_pictures_and_no_labels() -> None:
    plain, disturbed = StylePairs("train", 8), StylePairs("train", 8)
    disturbed.disturb(load(ASSETS), seed=5)
    gaps = [float((disturbed[i].target - plain[i].target).abs().mean()) for i in range(8)]
    assert max(gaps) > 1e-3
    assert max(gaps) < 0.1
    assert [disturbed[i].extras for i in range(8)] == [plain[i].extras for i in range(8)]
