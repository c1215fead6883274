"""IResNet, the face network of ArcFace (Deng et al., arXiv 1801.07698), with the tensor names of its releases.

The released files (insightface's `arcface_torch` "r50" and "r100", among them glint360k's) load as they are. Suffixes:
B crops, S side of a crop, C channels, D length of an embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rewardgen.errors import CheckpointError
from rewardgen.rewards.loading import check_tensors, read_tensors, size_of, without_prefix

LAYERS = {"r18": (2, 2, 2, 2), "r34": (3, 4, 6, 3), "r50": (3, 4, 14, 3), "r100": (3, 13, 30, 3)}
"""Blocks in each of the four stages, by the releases' names."""
_EPS = 1e-5
_COUNTER = ".num_batches_tracked"
_REDUCTION = 16
"""Each of the four stages halves the sides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IResNetConfig:
    """Sizes: blocks and channels of each stage, length of an embedding, side of a crop in pixels (a multiple of 16)."""

    layers: tuple[int, ...] = LAYERS["r50"]
    widths: tuple[int, ...] = (64, 128, 256, 512)
    embedding_dim: int = 512
    image_size: int = 112

    def __post_init__(self) -> None:
        if self.image_size % _REDUCTION or len(self.layers) != 4 or len(self.widths) != 4:
            raise ValueError(
                f"an IResNet has four stages and crops of a multiple of {_REDUCTION} pixels; got layers {self.layers},"
                f" widths {self.widths}, image_size {self.image_size}"
            )


class IResNet(nn.Module):
    """Aligned RGB crops [B, 3, S, S] in [-1, 1] to embeddings [B, D], not normalised.

    Dropout before the last linear map is left out: it is 0 in the releases and changes no output.
    """

    def __init__(self, config: IResNetConfig) -> None:
        super().__init__()
        self.config = config
        first, last = config.widths[0], config.widths[-1]
        self.conv1 = nn.Conv2d(3, first, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(first, eps=_EPS)
        self.prelu = nn.PReLU(first)
        inputs = (first, *config.widths[:-1])
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(*(_Block(width if block else before, width, 1 if block else 2) for block in range(blocks)))
            for before, width, blocks in zip(inputs, config.widths, config.layers, strict=True)
        )
        self.bn2 = nn.BatchNorm2d(last, eps=_EPS)
        self.fc = nn.Linear(last * (config.image_size // _REDUCTION) ** 2, config.embedding_dim)
        self.features = nn.BatchNorm1d(config.embedding_dim, eps=_EPS)

    def forward(self, crops_B3SS: Tensor) -> Tensor:
        x = self.prelu(self.bn1(self.conv1(crops_B3SS)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        embedding_BD: Tensor = self.features(self.fc(self.bn2(x).flatten(1)))
        return embedding_BD


class _Block(nn.Module):
    """Batch norm first, no ReLU after the sum; the stride sits in the second convolution."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before, eps=_EPS)
        self.conv1 = nn.Conv2d(before, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width, eps=_EPS)
        self.prelu = nn.PReLU(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width, eps=_EPS)
        self.downsample: nn.Module | None = None
        if stride != 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width, eps=_EPS)
            )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        shortcut = x_BCHW if self.downsample is None else self.downsample(x_BCHW)
        inner: Tensor = self.prelu(self.bn2(self.conv1(self.bn1(x_BCHW))))
        out: Tensor = self.bn3(self.conv2(inner)) + shortcut
        return out


def save_iresnet(model: IResNet, path: str | Path) -> None:
    """Write a safetensors file with the names of the releases; its sizes follow from the tensors."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}, path)


def load_iresnet(path: str | Path) -> IResNet:
    """Read an IResNet in float32 on the CPU, in evaluation mode: a safetensors file or a torch file of plain weights.

    Raises:
        CheckpointError: the file is missing, damaged or holds code, or a tensor is missing, unknown, of another shape
            or not finite.
    """
    tensors, _ = read_tensors("face network", path, under="state_dict")
    return iresnet_from(tensors, str(path))


def iresnet_from(tensors: Mapping[str, Tensor], source: str) -> IResNet:
    """Make an IResNet, whose sizes follow from the tensors. A prefix `module.` is dropped.

    Args:
        tensors: by the releases' names; `num_batches_tracked` may be left out, it plays no part.
        source: where they are from, for messages.

    Raises:
        CheckpointError: a tensor is missing, unknown, of another shape or not finite; it is named.
    """
    what = f"face network {source}"
    found = without_prefix(what, tensors)
    config = _infer_config(found, source)
    with torch.device("meta"):
        model = IResNet(config)
    expected = model.state_dict()
    counters = {name: torch.zeros((), dtype=torch.long) for name in expected if name.endswith(_COUNTER)}
    found = counters | found
    check_tensors(what, found, {name: tuple(t.shape) for name, t in expected.items()}, counters=list(counters))
    model.load_state_dict({name: found[name].to(tensor.dtype) for name, tensor in expected.items()}, assign=True)
    return model.eval()


def _infer_config(tensors: Mapping[str, Tensor], source: str) -> IResNetConfig:
    what = f"face network {source}"
    widths = tuple(size_of(what, tensors, f"layer{stage}.0.conv1.weight", 4, "an IResNet")[0] for stage in range(1, 5))
    embedding_dim, flat = size_of(what, tensors, "fc.weight", 2, "an IResNet")
    blocks = [{name.split(".")[1] for name in tensors if name.startswith(f"layer{stage}.")} for stage in range(1, 5)]
    side = math.isqrt(flat // widths[-1])
    if side * side * widths[-1] != flat or not side:
        raise CheckpointError(
            f"face network {source}: 'fc.weight' of shape {tuple(tensors['fc.weight'].shape)} fits no square of"
            f" {widths[-1]} channels"
        )
    return IResNetConfig(
        layers=tuple(map(len, blocks)), widths=widths, embedding_dim=embedding_dim, image_size=side * _REDUCTION
    )
