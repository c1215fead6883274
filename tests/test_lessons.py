"""What the tiny CSD is taught: labels read back from pictures agree with the truth they were rendered from."""

from __future__ import annotations

import torch

from rewardgen.world.recipes.lessons import mixed_pairs, nudge
from rewardgen.world.recipes.readback import read_back
from rewardgen.world.scenes import draw_contents, draw_styles, render, spoil
from rewardgen.world.similarity import style_similarity


def test_read_back_recovers_what_was_rendered() -> None:
    content, style = draw_contents(80, 1), draw_styles(80, 2)
    found = read_back(render(content, style, 3), content, style)
    assert float((found.background_N3 - style.background_N3).abs().mean()) < 0.005
    assert float((found.fill_NK3 - style.fill_NK3).abs().mean()) < 0.01
    assert float((found.amount_N - style.amount_N).abs().mean()) < 0.06
    assert float(style_similarity(style, found).diag().mean()) > 0.96


def test_read_back_sees_how_far_a_picture_is_from_what_was_asked() -> None:
    content, style, other = draw_contents(80, 4), draw_styles(80, 5), draw_styles(80, 6)
    shown = spoil(style, other, 7)
    truth = style_similarity(style, shown).diag()
    found = style_similarity(style, read_back(render(content, shown, 8), content, style)).diag()
    assert float(torch.corrcoef(torch.stack([truth, found]))[0, 1]) > 0.9


def test_a_flat_picture_reads_as_a_style_without_texture_and_outline() -> None:
    content, style = draw_contents(30, 9), draw_styles(30, 10)
    flat = style.background_N3[:, :, None, None].expand(30, 3, 64, 64)
    found = read_back(flat, content, style)
    assert float(found.amount_N.max()) < 1e-3
    assert torch.allclose(found.background_N3, style.background_N3, atol=1e-4)


def test_near_misses_are_near_and_never_equal_in_all() -> None:
    style, other = draw_styles(100, 11), draw_styles(100, 12)
    near = style_similarity(style, nudge(style, other, 13)).diag()
    far = style_similarity(style, other).diag()
    assert float(near.mean()) > 0.7 > 0.4 > float(far.mean())


def test_mixed_pairs_cover_the_range() -> None:
    _, style, _, shown = mixed_pairs(64, 14)
    truth = style_similarity(style, shown).diag()
    assert float(truth[0::4].min()) > 0.999
    assert float(truth[3::4].mean()) < 0.4
