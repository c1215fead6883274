"""DINO and DINOv2 against transformers' own forward, on folders as they are released."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rewardgen.errors import CheckpointError
from rewardgen.reward import check_reward, score
from rewardgen.rewards.dino import DinoReward
from rewardgen.types import Example
from tests.toy_reward_models import (
    clip_folder,
    dino_folder,
    dino_processor,
    dinov2_folder,
    dinov2_processor,
    photo,
    to_tensor,
)

RELEASES: dict[str, tuple[Callable[[Path], Any], Any]] = {
    "DINO": (dino_folder, dino_processor()),
    "DINOv2": (dinov2_folder, dinov2_processor()),
}
NAMES = {
    "DINO": "encoder.layer.1.attention.attention.query.weight",
    "DINOv2": "encoder.layer.1.attention.attention.query.weight",
}


@pytest.mark.parametrize("name", RELEASES)
def test_equal_to_the_class_tokens_of_transformers(tmp_path: Path, name: str) -> None:
    make, processor = RELEASES[name]
    model = make(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert NAMES[name] in tensors
    assert not any("pooler" in key for key in tensors)
    drawn, references = [photo(1), photo(2)], [photo(3, 50, 90), photo(4, 40, 41), photo(5)]
    with torch.no_grad():
        tokens = [
            model(**processor(images=picture, return_tensors="pt")).last_hidden_state[0, 0]
            for picture in [*drawn, *references]
        ]
    unit = [token / token.norm() for token in tokens]
    expected = [float(unit[0] @ (unit[2] + unit[3]) / 2), float(unit[1] @ unit[4])]
    examples = [
        Example(id="a", content_refs=(to_tensor(references[0]), to_tensor(references[1]))),
        Example(id="b", content_refs=(to_tensor(references[2]),)),
    ]
    reward = DinoReward.from_pretrained(str(tmp_path))
    found = score(reward, torch.stack([to_tensor(picture) for picture in drawn]), examples, enable_grad=False)
    assert found.value_B.tolist() == pytest.approx(expected, abs=1e-5)
    assert abs(expected[0] - expected[1]) > 1e-3
    check_reward(reward, image_size=(40, 72))


def test_a_torch_file_is_read_as_plain_weights(tmp_path: Path) -> None:
    """As older releases have it: `pytorch_model.bin` in place of safetensors."""
    dino_folder(tmp_path)
    expected = DinoReward.from_pretrained(str(tmp_path))
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    found = DinoReward.from_pretrained(str(tmp_path))
    for (name, tensor), other in zip(expected.state_dict().items(), found.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name


def test_code_in_a_torch_file_is_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.mkdir, (tmp_path / "broken-in",)

    dino_folder(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors") | {"x": Payload()}, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="could run code; nothing of it was run") as caught:
        DinoReward.from_pretrained(str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "broken-in").exists()


def test_against_says_which_pictures_are_meant(tmp_path: Path) -> None:
    dino_folder(tmp_path)
    reward = DinoReward.from_pretrained(str(tmp_path), against="target")
    drawn = to_tensor(photo(1))[None]
    example = Example(id="a", content_refs=(to_tensor(photo(2)),), target=drawn[0])
    assert reward.score(drawn, [example]).value_B.item() == pytest.approx(1, abs=1e-6)
    assert not reward.score(drawn, [Example(id="a", content_refs=(drawn[0],))]).valid_B.any()


@pytest.mark.parametrize("damage", ["missing", "not finite", "cut", "nothing", "another kind"])
def test_what_is_no_whole_model_is_refused(tmp_path: Path, damage: str) -> None:
    dino_folder(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors, key = load_file(file), "layernorm.bias"
    if damage == "missing":
        save_file({name: tensor for name, tensor in tensors.items() if name != key}, file, {"format": "pt"})
    elif damage == "not finite":
        save_file(tensors | {key: tensors[key] * torch.inf}, file, {"format": "pt"})
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "nothing":
        file.unlink()
    else:
        clip_folder(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        DinoReward.from_pretrained(str(tmp_path))
    told = str(caught.value)
    assert str(tmp_path) in told
    assert "\n" not in told
    assert {"missing": key, "not finite": key, "another kind": "is a 'clip'"}.get(damage, "") in told


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    for source in (str(tmp_path / "nowhere"), "./nowhere", "~nobody-of-this-name/x"):
        with pytest.raises(CheckpointError, match="does not exist"):
            DinoReward.from_pretrained(source)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    with pytest.raises(CheckpointError, match="is a 'resnet'"):
        DinoReward.from_pretrained(str(tmp_path))
