"""The people's pieces of the tiny world without any training: a folder that stands in for the bundled assets.

The policy is the tiny base as it is, the face network is random, and the detector sees a face about everywhere. Nothing
it finds means anything, but all of it has the files, classes and sizes of the real ones.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from rewardgen.rewards.faces.align import template
from rewardgen.rewards.faces.centre_detector import UNIT, CentreDetector, save_centre_detector
from rewardgen.rewards.faces.iresnet import IResNet, save_iresnet
from rewardgen.sources import ASSETS
from rewardgen.world.recipes import embedder

FACE = 40.0
"""Pixels of a side of the faces that the detector sees."""


def make_world(folder: Path) -> Path:
    """`folder/people` with a pipeline, a detector and a face network, and `folder/world.json`."""
    torch.manual_seed(0)
    shutil.copytree(ASSETS / "base", folder / "people")
    shutil.copy(ASSETS / "world.json", folder / "world.json")
    detector = CentreDetector(8)
    assert detector.head.bias is not None
    with torch.no_grad():
        sides = torch.full((4,), FACE / 2)
        landmarks = (template(int(FACE)) - FACE / 2).flatten().float()
        detector.head.bias.copy_(torch.cat([torch.tensor([2.0]), torch.cat([sides, landmarks]) / UNIT]))
        detector.head.weight.mul_(0.1)
    save_centre_detector(detector.eval(), folder / "people" / "detector.safetensors")
    save_iresnet(IResNet(embedder.CONFIG).eval(), folder / "people" / "embedder.safetensors")
    return folder
