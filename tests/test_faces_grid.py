"""The drawing of matched faces, and `rewardgen score --explain`: what is said agrees with the similarities."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from rewardgen.cli import main
from rewardgen.evaluation.evaluate import Evaluation
from rewardgen.evaluation.faces_grid import (
    BLIND,
    COLUMN,
    FAULT,
    MATCH,
    NOBODY,
    Verdict,
    draw_matches,
    judge,
    save_faces_grid,
    stack,
)
from rewardgen.evaluation.grid import GAP, HEADER
from rewardgen.rewards.brightness import Brightness
from rewardgen.rewards.identity import IdentityReward
from rewardgen.rewards.matching import MatchingReward
from rewardgen.types import Example, FaceMatches
from tests.toy_faces import CROP, example_of, linear_encoder, person, scene

ANNA, BERT, CARL = (person(seed) for seed in (1, 2, 3))
SCALE = 7  # 64 pixels are enlarged to 448


def matches(cosine: list[list[float]], pairs: list[tuple[int, int]], faceless: tuple[int, ...] = ()) -> FaceMatches:
    cosine_MN = torch.tensor(cosine)
    matched_MN = torch.zeros(cosine_MN.shape, dtype=torch.bool)
    for m, n in pairs:
        matched_MN[m, n] = True
    boxes = torch.tensor([[10.0 * n, 20.0, 10.0 * n + 8, 40.0] for n in range(cosine_MN.shape[1])]).reshape(-1, 4)
    people = torch.tensor([[2.0, 2.0, 12.0, 12.0]]).repeat(len(cosine_MN), 1)
    return FaceMatches(
        boxes_N4=boxes,
        cosine_MN=cosine_MN,
        matched_MN=matched_MN,
        reference_M=tuple(range(len(cosine_MN))),
        reference_boxes_M4=people,
        faceless=faceless,
    )


def has(picture: Image.Image, colour: tuple[int, int, int]) -> bool:
    return any(found == colour for _, found in picture.getcolors(1 << 24) or [])


def test_a_face_more_like_another_reference_is_a_confusion() -> None:
    verdict = judge(matches([[0.9, 0.2, 0.1], [0.8, 0.3, 0.6]], [(0, 0), (1, 2)]))
    assert [(m, n, other) for m, n, _, other in verdict.matches] == [(0, 0, None), (1, 2, None)]
    assert (verdict.missing, verdict.extra) == ((), (1,))
    confused = judge(matches([[0.9, 0.7], [0.8, 0.4]], [(0, 0), (1, 1)]))
    assert [other for *_, other in confused.matches] == [None, 0]
    assert confused.describe() == "2 matched (1 confused), 0 missing, 0 extra"
    assert judge(matches([[], [], []], [])) == Verdict(matches=(), missing=(0, 1, 2), extra=())


@pytest.mark.parametrize(
    ("found", "seen", "unseen"),
    [
        (matches([[0.9]], [(0, 0)]), {MATCH}, {FAULT, NOBODY, BLIND}),
        (matches([[0.9, 0.1]], [(0, 0)]), {MATCH, NOBODY}, {FAULT}),
        (matches([[0.9], [0.1]], [(0, 0)]), {MATCH, FAULT}, {NOBODY}),
        (matches([[0.9, 0.7], [0.8, 0.4]], [(0, 0), (1, 1)]), {MATCH, FAULT}, {NOBODY}),
        (matches([[], []], []), {FAULT}, {MATCH, NOBODY}),
    ],
)
def test_colours_tell_what_happened(found: FaceMatches, seen: set[object], unseen: set[object]) -> None:
    picture = draw_matches(torch.zeros(3, 64, 64), [torch.zeros(3, 16, 16)] * len(found.reference_M), found)
    assert all(has(picture, colour) for colour in seen)
    assert not any(has(picture, colour) for colour in unseen)


def test_boxes_lie_where_the_faces_are() -> None:
    page = draw_matches(torch.zeros(3, 64, 64), [torch.ones(3, 16, 16)], matches([[0.5, 0.1]], [(0, 0)]))
    left = page.width - GAP - 64 * SCALE
    x, y = left + round(18.5 * SCALE), HEADER + round(30 * SCALE)  # right edge of the face that belongs to nobody
    assert NOBODY in {page.getpixel((x + d, y)) for d in (-1, 0, 1)}
    assert page.getpixel((x - 3 * SCALE, y)) == (0, 0, 0)
    assert page.getpixel((GAP + COLUMN - 4, HEADER + COLUMN // 2)) == (255, 255, 255)
    assert page.height == HEADER + 64 * SCALE + GAP


def test_a_reference_without_a_face_is_marked() -> None:
    references = [torch.zeros(3, 16, 16), torch.zeros(3, 8, 30)]
    page = draw_matches(torch.zeros(3, 40, 64), references, matches([[0.5]], [(0, 0)], faceless=(1,)))
    assert has(page, BLIND)


def test_pages_are_stacked() -> None:
    sheet = stack([[Image.new("RGB", (10, 20)), Image.new("RGB", (5, 9))], [Image.new("RGB", (7, 3))] * 2])
    assert sheet.size == (17, 23)


def pictures() -> tuple[Tensor, Example]:
    """Bert and somebody unknown are drawn; Anna and Bert were asked for."""
    return scene([CARL, BERT], [(2, 2), (24, 24)]), example_of([ANNA, BERT], [(2, 2), (24, 24)])


@pytest.mark.parametrize("reward", [MatchingReward(linear_encoder()), IdentityReward(linear_encoder())])
def test_rewards_explain_what_they_matched(reward: MatchingReward | IdentityReward) -> None:
    picture, example = pictures()
    (found,) = reward.explain(picture[None], [example])
    assert found.matched_MN.tolist() == [[True, False], [False, True]]
    assert float(found.cosine_MN[1, 1]) == pytest.approx(1, abs=1e-5)
    assert abs(float(found.cosine_MN[0, 0])) < 0.4
    assert found.reference_M == (0, 1)
    last = CROP - 1
    assert bool((found.reference_boxes_M4 >= 0).all() and (found.reference_boxes_M4 <= last).all())
    seen = reward.faces.compare(picture[None], [example], one_each=False)
    torch.testing.assert_close(found.cosine_MN, (seen.wanted[0] @ seen.drawn[0].T).float())


def test_before_and_after_stand_side_by_side(tmp_path: Path) -> None:
    picture, example = pictures()
    nobody = Example(id="nobody")
    base, trained = (
        Evaluation(example_ids=("a", "nobody"), scores={}, pixels_K3HW=torch.stack([first, picture]).float())
        for first in (picture, torch.zeros_like(picture))
    )
    metrics = {"brightness": Brightness(), "people": MatchingReward(linear_encoder())}
    path = save_faces_grid(tmp_path / "faces.png", [example, nobody], base, trained, metrics)
    assert path == tmp_path / "faces.png"
    with Image.open(path) as page:
        single = draw_matches(picture, example.identity_refs, metrics["people"].explain(picture[None], [example])[0])
        assert page.size == (2 * single.width, single.height)
        left, right = (
            page.convert("RGB").crop((0, 0, *single.size)),
            page.convert("RGB").crop((single.width, 0, *page.size)),
        )
    assert has(left, (127, 127, 127)) or has(left, (128, 128, 128))  # the scene's grey, which black has not
    assert not has(right, (128, 128, 128))
    nothing = tmp_path / "nothing.png"
    assert save_faces_grid(nothing, [nobody], base, trained, metrics) is None
    assert save_faces_grid(nothing, [example], base, trained, {"brightness": Brightness()}) is None
    assert not nothing.exists()


REWARD = """
import torch
from rewardgen.rewards.matching import MatchingReward
from tests.toy_faces import TwoPlaces, linear_encoder

class Toy(MatchingReward):
    @classmethod
    def from_pretrained(cls):
        return cls(linear_encoder(TwoPlaces()), references="one_each")
"""


def score(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["score", *map(str, arguments)])
    return int(stopped.value.code or 0), capsys.readouterr().err


def test_the_command_draws_any_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "toy.py").write_text(REWARD)
    for name, seed in (("group", 1), ("a", 2), ("b", 3)):
        noise = torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(seed))
        Image.fromarray((255 * noise).byte().numpy()).save(tmp_path / f"{name}.png")
    toy, group, out = f"{tmp_path / 'toy.py'}:Toy", tmp_path / "group.png", tmp_path / "out.png"
    people = ("--identity", tmp_path / "a.png", "--identity", tmp_path / "b.png")
    code, said = score(capsys, group, group, "--reward", toy, *people, "--explain", out)
    assert code == 0, said
    assert str(out) in said
    with Image.open(out) as page:
        assert page.size[1] == 2 * (HEADER + 448 + GAP)
        assert has(page.convert("RGB"), MATCH) or has(page.convert("RGB"), FAULT)
    for arguments, reason in (
        ((group, "-r", toy, "--explain", out), "--identity"),
        ((group, "-r", "brightness", *people, "--explain", out), "none of brightness can explain"),
        ((group, "-r", toy, *people, "--explain", tmp_path / "out.jpg"), "ends in .png"),
        ((group, "-r", toy, *people, "--explain", tmp_path / "no" / "out.png"), "there is no folder"),
    ):
        code, said = score(capsys, *arguments)
        assert code == 2
        assert reason in said
