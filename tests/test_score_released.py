"""`rewardgen score` with local copies of released folders: the numbers are the rewards' own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rewardgen.cli import main
from rewardgen.rewards.clip import ClipReward
from rewardgen.rewards.dino import DinoReward
from rewardgen.types import Example
from tests.toy_reward_models import clip_folder, dino_folder, photo, to_tensor


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["score", *arguments])
    told = capsys.readouterr()
    return int(stopped.value.code or 0), told.out, told.err


def test_a_row_of_uso_bench(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CLIP-T, CLIP-I and DINO at once, two of them by one reward; a folder by its bare name."""
    monkeypatch.chdir(tmp_path)
    clip_folder(tmp_path / "weights" / "clip")
    dino_folder(tmp_path / "dino")
    for name, seed in (("drawn.png", 1), ("reference.png", 2)):
        photo(seed).save(name)
    code, out, err = run(
        capsys,
        *("drawn.png", "--prompt", "a red cat", "--content", "reference.png", "--json"),
        *("-r", "clip_t=clip", "clip_t.model=weights/clip"),
        *("-r", "clip_i=clip", "clip_i.model=./weights/clip", "clip_i.against=content"),
        *("-r", "dino", f"dino.model={tmp_path / 'dino'}"),
    )
    assert code == 0, err
    found = json.loads(out)["pictures"][0]["scores"]
    drawn, reference = to_tensor(photo(1))[None], to_tensor(photo(2))
    example = [Example(id="a", prompt="a red cat", content_refs=(reference,))]
    clip = ClipReward.from_pretrained("weights/clip")
    dino = DinoReward.from_pretrained("dino")
    with torch.no_grad():
        expected = {
            "clip_t": clip.score(drawn, example).value_B.item(),
            "clip_i": ClipReward(clip.encoder, against="content").score(drawn, example).value_B.item(),
            "dino": dino.score(drawn, example).value_B.item(),
        }
    assert found == pytest.approx(expected, abs=1e-5)
    assert len({round(value, 3) for value in found.values()}) == 3

    code, out, err = run(capsys, "drawn.png", "--prompt", "a cat", "-r", "dino", "dino.model=./dino")
    assert code == 0
    assert "n.a." in out
    assert "dino applies to none of the pictures" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-r", "dino"], "dino.model: required argument is missing"),
        (["-r", "dino", "dino.model=./nowhere"], "./nowhere does not exist"),
        (["-r", "dino", "dino.model=./empty"], "./empty: cannot load"),
        (["-r", "a=clip", "-r", "a=dino"], "there is a reward 'a' already"),
        (["-r", "a=clib"], "Did you mean 'clip'?"),
        (["-r", "clip", "clip.model=x", "clip.against=prompts"], "clip.against"),
    ],
)
def test_what_is_missing_is_one_message(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    photo(1).save("drawn.png")
    code, out, err = run(capsys, "drawn.png", "--content", "drawn.png", *arguments)
    assert code == 2
    assert not out
    assert message in " ".join(err.split())
    assert "Traceback" not in err
