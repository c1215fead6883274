"""The aesthetic predictor v2.5 against transformers' SigLIP and the published head."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rewardgen.errors import CheckpointError
from rewardgen.reward import check_reward, score
from rewardgen.rewards.aesthetic import AestheticReward
from rewardgen.types import Example
from tests.toy_reward_models import photo, siglip_folder, siglip_processor, to_tensor


class Head(nn.Module):
    """As published, narrower: linear layers with dropout between all of them."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (24, 16, 12, 8, 6, 1)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Linear(before, after), nn.Dropout(0.5)]
        self.scoring_head = nn.Sequential(*layers[:-1])


@pytest.fixture
def head() -> Head:
    torch.manual_seed(1)
    return Head().eval()


@pytest.fixture
def files(tmp_path: Path, head: Head) -> tuple[Path, Path]:
    siglip_folder(tmp_path / "siglip")
    torch.save(OrderedDict(head.state_dict()), tmp_path / "aesthetic_predictor_v2_5.pth")
    return tmp_path / "aesthetic_predictor_v2_5.pth", tmp_path / "siglip"


def test_equal_to_the_published_formula(files: tuple[Path, Path], head: Head) -> None:
    model = siglip_folder(files[1])
    pictures = [photo(1), photo(2), photo(3)]
    assert {f"scoring_head.{place}.{part}" for place in (0, 2, 4, 6, 8) for part in ("weight", "bias")} == set(
        head.state_dict()
    )
    with torch.no_grad():
        pooled = model.vision_model(**siglip_processor()(images=pictures, return_tensors="pt")).pooler_output
        expected: Tensor = head.scoring_head(pooled / pooled.norm(dim=-1, keepdim=True))[:, 0]
    reward = AestheticReward.from_pretrained(str(files[0]), model=str(files[1]))
    drawn = torch.stack([to_tensor(picture) for picture in pictures])
    found = score(reward, drawn, [Example(id=str(i)) for i in range(3)], enable_grad=False)
    assert torch.allclose(found.value_B, expected, atol=1e-5)
    assert expected.std() > 1e-3
    assert found.valid_B.all()
    check_reward(reward, image_size=(40, 72))
    assert not any(parameter.requires_grad for parameter in reward.parameters())


def test_safetensors_and_a_wrong_head(files: tuple[Path, Path], head: Head, tmp_path: Path) -> None:
    save_file(head.state_dict(), tmp_path / "head.safetensors")
    reward = AestheticReward.from_pretrained(str(tmp_path / "head.safetensors"), model=str(files[1]))
    assert torch.equal(reward.head.get_parameter("2.weight"), head.scoring_head.get_parameter("2.weight"))
    state = head.state_dict()
    for change, message in (
        ({"scoring_head.2.weight": torch.zeros(12, 15)}, r"'scoring_head\.2\.weight' has shape \(12, 15\)"),
        ({"scoring_head.9.weight": torch.zeros(1, 1)}, r"'scoring_head\.9\.bias'"),
        ({"scoring_head.0.bias": torch.full((16,), torch.nan)}, "not finite"),
        ({"scoring_head.x": torch.zeros(1)}, r"unknown tensor 'scoring_head\.x'"),
    ):
        torch.save(state | change, tmp_path / "other.pth")
        with pytest.raises(CheckpointError, match=message):
            AestheticReward.from_pretrained(str(tmp_path / "other.pth"), model=str(files[1]))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"lacks the tensor 'scoring_head\.0\.weight'"):
        AestheticReward.from_pretrained(str(tmp_path / "other.pth"), model=str(files[1]))
