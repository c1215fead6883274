"""CSD, the style descriptor of Somepalli et al. (arXiv 2404.01292), and the reward of USO's Style Reward Learning."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from rewardgen.errors import CheckpointError
from rewardgen.reward import Reward
from rewardgen.rewards.cache import TensorCache, digest
from rewardgen.rewards.clip_vit import ClipVit
from rewardgen.rewards.loading import (
    check_tensors,
    is_safetensors,
    read_shapes,
    read_tensors,
    size_of,
    without_prefix,
)
from rewardgen.rewards.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    clamp_straight_through,
    normalise,
    resize_centre_crop,
)
from rewardgen.transfer import to_device
from rewardgen.types import Example, Score

METADATA_KEY = "rewardgen.csd"
"""Where our safetensors files keep their `CsdConfig`, as JSON."""
CACHED_REFERENCES = 4096
"""Reference embeddings kept by `CsdReward`; 768 floats each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CsdConfig:
    """Sizes of a CSD model: side of picture and patch in pixels, transformer sizes, length of a descriptor."""

    image_size: int = 224
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    output_dim: int = 768


class CsdModel(nn.Module):
    """CLIP's visual tower with a linear map to style and one to content; names as in the released checkpoint."""

    def __init__(self, config: CsdConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = ClipVit(
            image_size=config.image_size,
            patch_size=config.patch_size,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
        )
        scale = config.width**-0.5
        self.last_layer_style = nn.Parameter(scale * torch.randn(config.width, config.output_dim))
        self.last_layer_content = nn.Parameter(scale * torch.randn(config.width, config.output_dim))

    def forward(self, images_B3SS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures normalised with `CLIP_MEAN` and `CLIP_STD` to (feature, content, style).

        `feature` is [B, width]; `content` and `style` are [B, output_dim] of unit length. The gradient reversal
        that the authors train content with is left out: it changes no output.
        """
        feature = self.backbone(images_B3SS)
        content = F.normalize(feature @ self.last_layer_content, dim=-1)
        return feature, content, F.normalize(feature @ self.last_layer_style, dim=-1)


class CsdReward(Reward):
    """Cosine of CSD's style descriptors of the picture and of the style references (USO, section 3.3), in [-1, 1].

    With several style references it is the mean cosine; an example without one is not valid. Pixels are clamped to
    [0, 1], the range that a saved picture has, straight-through: a pixel beyond it is scored as the picture will look
    and still receives a gradient. Preprocessing is PIL's (short side to the model's size, centre crop), so that the
    score is that of the picture file. References carry no gradient and are embedded once each.

    Args:
        model: frozen here and put in evaluation mode.
        round_8bit: also round as PIL does, which makes the score that of a saved 8-bit picture; the gradient is
            that of the unrounded picture.
    """

    differentiable = True

    def __init__(self, model: CsdModel, *, round_8bit: bool = False) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.round_8bit = round_8bit
        self._cache = TensorCache()

    @classmethod
    def from_pretrained(cls, checkpoint: str, *, heads: int | None = None, round_8bit: bool = False) -> CsdReward:
        """Read a checkpoint with `load_csd`; `heads` only for files that state none and break CLIP's convention."""
        return cls(load_csd(checkpoint, heads=heads), round_8bit=round_8bit)

    @classmethod
    def blueprint(cls, checkpoint: str, *, heads: int | None = None, round_8bit: bool = False) -> CsdReward:
        """A reward of the right sizes whose weights mean nothing; those of the release where the file is not here."""
        path = Path(checkpoint)
        if not path.is_file():
            return cls(CsdModel(CsdConfig()), round_8bit=round_8bit)
        if not is_safetensors("CSD checkpoint", path):
            return cls(CsdModel(load_csd(path, heads=heads).config), round_8bit=round_8bit)
        tensors, metadata = read_shapes("CSD checkpoint", path)
        config = _infer_config(tensors, _choose_heads(heads, _stated_heads(metadata, path), path), path)
        return cls(CsdModel(config), round_8bit=round_8bit)

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        style_BD = self.embed(pixels_B3HW)
        references = [self._mean_reference(example, style_BD) for example in examples]
        valid = [bool(example.style_refs) for example in examples]
        value_B = (style_BD * torch.stack(references)).sum(-1)
        return Score(value_B=value_B, valid_B=to_device(torch.tensor(valid), value_B.device))

    def embed(self, pixels_B3HW: Tensor) -> Tensor:
        """Style descriptors [B, D] in float32, of unit length, of pictures of any one size."""
        weight = self.model.last_layer_style
        pixels = clamp_straight_through(pixels_B3HW.to(weight.device))
        pixels = resize_centre_crop(pixels, self.model.config.image_size, round_8bit=self.round_8bit)
        images = normalise(pixels, CLIP_MEAN, CLIP_STD)
        # A reward differs between pictures in its third digit; autocast's bfloat16 would drown that.
        with torch.autocast(images.device.type, enabled=False):
            style_BD: Tensor = self.model(images.to(weight.dtype))[2]
        return style_BD.float()

    def _mean_reference(self, example: Example, like: Tensor) -> Tensor:
        if not example.style_refs:
            return torch.zeros_like(like[0])
        # The mean of cosines is the cosine with the mean: the descriptors have unit length.
        return torch.stack([self._reference(picture) for picture in example.style_refs]).mean(0)

    def _reference(self, pixels_3HW: Tensor) -> Tensor:
        weight = self.model.last_layer_style
        # One at a time: an embedding must not depend, in its last bits, on what else was new in this batch.
        return self._cache.get(
            (digest(pixels_3HW), weight.dtype, weight.device),
            lambda: self.embed(pixels_3HW.detach()[None])[0],
            CACHED_REFERENCES,
        )


def save_csd(model: CsdModel, path: str | Path) -> None:
    """Write weights and sizes to a safetensors file, with the names of the released checkpoint."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, path, metadata={METADATA_KEY: json.dumps(asdict(model.config))})


def load_csd(path: str | Path, *, heads: int | None = None) -> CsdModel:
    """Read a CSD model in float32 on the CPU: a safetensors file, or the authors' torch file.

    Sizes follow from the tensors. The number of heads does not: it is taken from the file's metadata (`save_csd`
    writes it), else from `heads`, else it is CLIP's width / 64.

    The authors' file is a pickle. Only torch's reader of plain weights touches it: it knows tensors, containers and
    the bag of the script's arguments, and refuses everything else before running it. `save_csd` makes a safetensors
    file of what was read. Neither format has a checksum: a changed value that is still a number is not noticed.

    Raises:
        CheckpointError: the file is missing or damaged, a tensor is missing, unknown, of another shape or not finite,
            or `heads` is needed, impossible or contradicts the file.
    """
    path = Path(path)
    # The released file also holds the training script's arguments, a plain bag of values.
    found, metadata = read_tensors("CSD checkpoint", path, under="model_state_dict", plain=[argparse.Namespace])
    what = f"CSD checkpoint {path}"
    tensors = without_prefix(what, found)
    config = _infer_config(tensors, _choose_heads(heads, _stated_heads(metadata, path), path), path)
    with torch.device("meta"):
        model = CsdModel(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_tensors(what, tensors, expected)
    model.load_state_dict({name: tensors[name].float() for name in expected}, assign=True)
    return model.eval()


def _stated_heads(metadata: Mapping[str, str], path: Path) -> int | None:
    try:
        return int(json.loads(metadata[METADATA_KEY])["heads"]) if METADATA_KEY in metadata else None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"CSD checkpoint {path}: metadata '{METADATA_KEY}' states no heads") from error


def _choose_heads(asked: int | None, stated: int | None, path: Path) -> int | None:
    if asked is not None and stated is not None and asked != stated:
        raise CheckpointError(f"CSD checkpoint {path} states {stated} heads; leave out heads={asked}")
    return asked if stated is None else stated


def _infer_config(tensors: Mapping[str, Tensor], heads: int | None, path: Path) -> CsdConfig:
    what = f"CSD checkpoint {path}"
    width, _, patch_size, _ = size_of(what, tensors, "backbone.conv1.weight", 4)
    num_patches = size_of(what, tensors, "backbone.positional_embedding", 2)[0] - 1
    _, output_dim = size_of(what, tensors, "last_layer_style", 2)
    blocks = {name.split(".")[3] for name in tensors if name.startswith("backbone.transformer.resblocks.")}
    if heads is None and width % 64:
        raise CheckpointError(f"CSD checkpoint {path} of width {width} states no number of heads; pass heads=")
    heads = width // 64 if heads is None else heads
    if heads < 1 or width % heads:
        raise CheckpointError(f"CSD checkpoint {path}: width {width} cannot be split into {heads} heads")
    return CsdConfig(
        image_size=math.isqrt(num_patches) * patch_size,
        patch_size=patch_size,
        width=width,
        layers=len(blocks),
        heads=heads,
        output_dim=output_dim,
    )
