"""Every bundled reward keeps the contract. A new file in `rewards/` needs an entry in `TINY`."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import rewardgen.rewards
from rewardgen.reward import Reward, check_reward
from rewardgen.rewards.aesthetic import AestheticReward, Pooled
from rewardgen.rewards.brightness import Brightness
from rewardgen.rewards.clip import ClipReward
from rewardgen.rewards.clip_encoder import ClipEncoder
from rewardgen.rewards.csd import CsdConfig, CsdModel, CsdReward
from rewardgen.rewards.dino import ClassToken, DinoReward
from rewardgen.rewards.face_count import FaceCountReward
from rewardgen.rewards.faces.encoder import FaceEncoder
from rewardgen.rewards.hpsv2 import Hpsv2Reward
from rewardgen.rewards.id_conf import IdConfReward
from rewardgen.rewards.id_sim import IdSimReward
from rewardgen.rewards.identity import IdentityReward
from rewardgen.rewards.image_processor import ImageProcessor
from rewardgen.rewards.image_reward import BlipScorer, ImageReward
from rewardgen.rewards.judging.local import LocalModel
from rewardgen.rewards.judging.questions import load_question
from rewardgen.rewards.matching import MatchingReward
from rewardgen.rewards.pickscore import PickScoreReward
from rewardgen.rewards.picture_encoder import PictureEncoder
from rewardgen.rewards.structure import StructureReward
from rewardgen.rewards.vlm_judge import VlmJudge
from rewardgen.rewards.vlm_judge_local import LocalVlmJudge
from rewardgen.world.tiny_vlm import tiny_llava
from tests import toy_reward_models as toys
from tests.judge_servers import JudgeServer
from tests.test_hpsv3 import tiny as tiny_hpsv3
from tests.toy_faces import CROP, TwoPlaces, tiny_iresnet


def tiny_csd(round_8bit: bool = False) -> CsdReward:
    torch.manual_seed(0)
    config = CsdConfig(image_size=32, patch_size=8, width=32, layers=2, heads=2, output_dim=12)
    return CsdReward(CsdModel(config), round_8bit=round_8bit)


def tiny_faces() -> FaceEncoder:
    return FaceEncoder(TwoPlaces(), tiny_iresnet(), crop_size=CROP)


def tiny_clip(**processor: Any) -> ClipEncoder:
    processor = processor or {"short_side": toys.SIDE, "crop": (toys.SIDE, toys.SIDE)}
    return ClipEncoder(toys.clip_model(), toys.clip_tokenizer(), ImageProcessor(**processor))


def tiny_dino() -> DinoReward:
    processor = ImageProcessor(size=(toys.SIDE, toys.SIDE), kernel="bilinear")
    return DinoReward(PictureEncoder(ClassToken(toys.dino_model()), processor))


def tiny_aesthetic() -> AestheticReward:
    siglip = toys.siglip_model().vision_model
    head = nn.Sequential(nn.Linear(24, 8), nn.Linear(8, 1))
    return AestheticReward(PictureEncoder(Pooled(siglip), ImageProcessor(size=(toys.SIDE, toys.SIDE))), head)


def tiny_image_reward() -> ImageReward:
    blip = BlipScorer(toys.blip_vision(), toys.blip_text(), nn.Sequential(nn.Linear(24, 8), nn.Linear(8, 1)))
    return ImageReward(blip, toys.bert_tokenizer(), ImageProcessor(short_side=toys.SIDE, crop=(toys.SIDE, toys.SIDE)))


@functools.cache
def judge_server() -> JudgeServer:
    """One for all tests; its thread ends with the process."""
    return JudgeServer().__enter__()


def tiny_local_judge() -> LocalVlmJudge:
    sizes = {"vision_width": 24, "vision_layers": 2, "text_width": 24, "text_layers": 2}
    return LocalVlmJudge(LocalModel(*tiny_llava(image_size=32, **sizes), load_question("style")), min_mass=0.0)


TINY: dict[str, Callable[[], Reward]] = {
    "aesthetic": tiny_aesthetic,
    "brightness": Brightness,
    "clip": lambda: ClipReward(tiny_clip()),
    "clip, pictures": lambda: ClipReward(tiny_clip(), against="identity"),
    "csd": tiny_csd,
    "csd, 8 bit": lambda: tiny_csd(round_8bit=True),
    "dino": tiny_dino,
    "hpsv2": lambda: Hpsv2Reward(tiny_clip(long_side=toys.SIDE)),
    "identity": lambda: IdentityReward(tiny_faces()),
    "id_sim": lambda: IdSimReward(tiny_faces()),
    "id_conf": lambda: IdConfReward(tiny_faces()),
    "face_count": lambda: FaceCountReward(tiny_faces()),
    "face_count, missing": lambda: FaceCountReward(tiny_faces(), count="missing"),
    "hpsv3": tiny_hpsv3,
    "image_reward": tiny_image_reward,
    "structure": StructureReward,
    "matching": lambda: MatchingReward(tiny_faces()),
    "matching, options": lambda: MatchingReward(tiny_faces(), normalise="matches", floor=0.0, miss=0.5, extra=0.5),
    "pickscore": lambda: PickScoreReward(tiny_clip()),
    "vlm_judge": lambda: VlmJudge("style", (judge_server().url,), "tiny"),
    "vlm_judge_local": tiny_local_judge,
}
"""Rewards with tiny random weights, by the file's name; variants after a comma."""


def bundled_rewards() -> set[str]:
    names = [module.name for module in pkgutil.iter_modules(rewardgen.rewards.__path__)]
    modules = {name: importlib.import_module(f"rewardgen.rewards.{name}") for name in names}
    return {
        name
        for name, module in modules.items()
        for cls in vars(module).values()
        if inspect.isclass(cls) and issubclass(cls, Reward) and cls.__module__ == module.__name__
    }


def test_every_bundled_reward_is_checked():
    assert bundled_rewards() == {name.partition(",")[0] for name in TINY}


@pytest.mark.parametrize("image_size", [(64, 64), (40, 72)])
@pytest.mark.parametrize("name", TINY)
def test_bundled_rewards_keep_the_contract(name, image_size):
    check_reward(TINY[name](), image_size=image_size)
