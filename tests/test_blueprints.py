"""Rewards from their sizes alone do as much work as the real ones; integers that a dry run knows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rewardgen.dry_run import Observer, dry
from rewardgen.errors import CheckpointError
from rewardgen.measure import LiveBytes, OperationCounter
from rewardgen.reward import Reward
from rewardgen.rewards.aesthetic import AestheticReward
from rewardgen.rewards.clip import ClipReward
from rewardgen.rewards.dino import DinoReward
from rewardgen.rewards.hpsv2 import Hpsv2Reward
from rewardgen.rewards.image_reward import ImageReward
from rewardgen.rewards.judging.blueprint import take_shapes
from rewardgen.rewards.judging.local import LocalModel
from rewardgen.rewards.judging.questions import load_question
from rewardgen.rewards.pickscore import PickScoreReward
from rewardgen.rewards.vlm_judge import VlmJudge
from rewardgen.rewards.vlm_judge_local import LocalVlmJudge
from rewardgen.sources import ASSETS
from rewardgen.types import Example
from tests.toy_reward_models import clip_folder, dino_folder, dinov2_folder

QWEN = {
    "model_type": "qwen2_5_vl",
    "image_token_id": 60,
    "text_config": {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    },
    "vision_config": {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32,
        "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1],
    },
}  # fmt: skip


def picture(side: int = 40) -> Tensor:
    return torch.rand(3, side, side, generator=torch.Generator().manual_seed(side))


def example() -> Example:
    return Example(id="a", prompt="plums", content_refs=(picture(44),), style_refs=(picture(52),))


def number(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def work(reward: Reward, *, counted: Any) -> int:
    """Operations of a score and its gradient, the second time: references and texts are remembered."""
    reward.requires_grad_(False).eval()
    pixels_B3HW = torch.stack([picture(), picture()]).requires_grad_()
    # The same ones both times: in a dry run only a picture itself has its values, no other one that is made like it.
    examples = [example(), example()]
    reward.score(pixels_B3HW.detach(), examples)
    with counted as counter:
        value_B = reward.score(pixels_B3HW, examples).value_B
        torch.autograd.grad(value_B.sum(), pixels_B3HW)
    return int(counter.take_operations() if isinstance(counter, Observer) else counter.total)


def judge_folder(_: Path) -> None:
    """The bundled judge is where it is."""


@pytest.mark.parametrize(
    ("kind", "make", "args"),
    [
        (DinoReward, dino_folder, {}),
        (DinoReward, dinov2_folder, {}),
        (ClipReward, clip_folder, {"against": "prompt"}),
        (ClipReward, clip_folder, {"against": "content"}),
        (PickScoreReward, clip_folder, {}),
        (LocalVlmJudge, judge_folder, {"question": "style", "model": str(ASSETS / "judge")}),
    ],
)
def test_a_blueprint_does_the_work_of_the_reward(
    kind: Any, make: Callable[[Path], Any], args: dict[str, Any], tmp_path: Path
) -> None:
    make(tmp_path)
    args = {"model": str(tmp_path), **args}
    real = kind.from_pretrained(**args)
    done = work(real, counted=OperationCounter())
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    with dry():
        planned = kind.blueprint(**args)
        assert number(planned) == number(real)
        assert work(planned, counted=Observer([])) == done > 0


def test_a_judge_that_cuts_pictures_into_patches(tmp_path: Path) -> None:
    """Qwen-VL looks at its integers at every turn: windows, sequences of pictures, places of tokens."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN))

    def watched(memory: Callable[[list[Tensor]], Any]) -> tuple[int, int]:
        model, processor, preprocess = take_shapes(str(tmp_path), torch.float32)
        question = load_question("style")
        judge = LocalVlmJudge(LocalModel(model, processor, question, preprocess=preprocess)).requires_grad_(False)
        pixels = picture().requires_grad_()
        judge.score(pixels.detach()[None], [example()])
        with memory([*judge.parameters(), *judge.buffers()]) as seen, OperationCounter() as counter:
            (value,) = judge.score(pixels[None], [example()]).value_B
            torch.autograd.grad(value, pixels)
        live = seen.memory if isinstance(seen, Observer) else seen
        return live.peak, counter.total

    peak, operations = watched(LiveBytes)
    with dry():
        planned_peak, planned_operations = watched(Observer)
    assert planned_operations == operations > 0
    assert planned_peak == pytest.approx(peak, rel=0.02)


def test_released_sizes_that_are_not_here() -> None:
    """Numbers of parameters as the releases state them."""
    weights = {"checkpoint": "nowhere.pt", "tokenizer": "nowhere"}
    with dry():
        found = {
            "dino": number(DinoReward.blueprint("facebook/dino-vits16")),
            "dinov2": number(DinoReward.blueprint("facebook/dinov2-base")),
            "clip": number(ClipReward.blueprint("openai/clip-vit-base-patch32")),
            "pickscore": number(PickScoreReward.blueprint("yuvalkirstain/PickScore_v1")),
            "hpsv2": number(Hpsv2Reward.blueprint(**weights)),
            "aesthetic": number(AestheticReward.blueprint("nowhere.pth", model="google/siglip-so400m-patch14-384")),
            "image_reward": number(ImageReward.blueprint(**weights)),
            "judge": number(LocalVlmJudge.blueprint("Qwen/Qwen2.5-VL-3B-Instruct", "style", dtype="bfloat16")),
        }
        with pytest.raises(CheckpointError, match=r"its config.json is not here, .* known: facebook/dino-vits16"):
            DinoReward.blueprint("somebody/dino")
    millions = {"dino": 21.67, "dinov2": 86.58, "clip": 151.3, "pickscore": 986.1, "hpsv2": 986.1}
    millions |= {"aesthetic": 429.6, "image_reward": 446.0, "judge": 3754.6}
    assert {name: count / 1e6 for name, count in found.items()} == pytest.approx(millions, rel=0.01)


def test_a_plan_asks_no_service() -> None:
    planned = VlmJudge.blueprint("style", ["http://localhost:1/v1"], "none", key_env="NO_SUCH_KEY")
    assert planned.score(picture()[None], [example()]).valid_B.all()


def test_integers_of_integers_are_known() -> None:
    with dry():
        places = torch.arange(6).view(2, 3)
        assert places.tolist() == [[0, 1, 2], [3, 4, 5]]
        late = places > 2
        assert torch.zeros(2, 3)[late].shape == (3,)
        assert late.nonzero().tolist() == [[1, 0], [1, 1], [1, 2]]
        assert torch.tensor([7, 9]).repeat_interleave(torch.tensor([1, 2])).tolist() == [7, 9, 9]
        assert torch.tensor([places[1, 0] + 1, 8]).tolist() == [4, 8]
        places[0] += 10
        assert places.sum().item() == 45
        # What comes from a picture, from chance or from a mere flag is not.
        levels = torch.zeros(2, 3).long()
        assert levels.tolist() == [[1, 1, 1], [1, 1, 1]]
        places.copy_(levels)
        assert places.tolist() == [[1, 1, 1], [1, 1, 1]]
        assert torch.randint(5, 9, (2,)).tolist() == [1, 1]
        assert bool(torch.tensor([False, False]).all())
