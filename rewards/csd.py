"""CSD, the style descriptor of Somepalli et al. (arXiv 2404.01292), and the reward of USO's Style Reward Learning."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from rewardgen.errors import CheckpointError
from rewardgen.reward import Reward
from rewardgen.rewards.clip_vit import ClipVit
from rewardgen.rewards.preprocess import clamp_straight_through, normalise, resize_centre_crop
from rewardgen.types import Example, Score

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
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
        self._cache: OrderedDict[tuple[bytes, torch.dtype, torch.device], Tensor] = OrderedDict()

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
        if not _is_safetensors(path):
            return cls(CsdModel(load_csd(path, heads=heads).config), round_8bit=round_8bit)
        try:
            with safe_open(path, framework="pt") as file:
                names = ("backbone.conv1.weight", "backbone.positional_embedding", "last_layer_style")
                blank = {name: torch.empty(0) for name in file.keys()}  # noqa: SIM118 - not a mapping
                tensors = blank | {name: torch.empty(file.get_slice(name).get_shape()) for name in names}
                stated = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}")).get("heads")
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"CSD checkpoint {path} is damaged: {error}") from error
        return cls(CsdModel(_infer_config(tensors, _choose_heads(heads, stated, path), path)), round_8bit=round_8bit)

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        style_BD = self.embed(pixels_B3HW)
        references = [self._mean_reference(example, style_BD) for example in examples]
        valid = [bool(example.style_refs) for example in examples]
        value_B = (style_BD * torch.stack(references)).sum(-1)
        return Score(value_B=value_B, valid_B=torch.tensor(valid, device=value_B.device))

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
        key = (_digest(pixels_3HW), weight.dtype, weight.device)
        if key not in self._cache:
            # One at a time: an embedding must not depend, in its last bits, on what else was new in this batch.
            with torch.inference_mode(False), torch.no_grad():
                self._cache[key] = self.embed(pixels_3HW.detach()[None])[0]
        self._cache.move_to_end(key)
        if len(self._cache) > CACHED_REFERENCES:
            self._cache.popitem(last=False)
        return self._cache[key]


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
    try:
        if not path.is_file():
            raise CheckpointError(f"CSD checkpoint {path} {'is no file' if path.exists() else 'does not exist'}")
    except OSError as error:
        raise CheckpointError(f"CSD checkpoint {path} cannot be read: {error.strerror}") from error
    found, stated = _read_safetensors(path) if _is_safetensors(path) else (_read_torch(path), None)
    tensors = {name.removeprefix("module."): tensor for name, tensor in found.items()}
    if len(tensors) < len(found):
        raise CheckpointError(f"CSD checkpoint {path} holds tensors twice, with and without 'module.'")
    config = _infer_config(tensors, _choose_heads(heads, stated, path), path)
    with torch.device("meta"):
        model = CsdModel(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _check_tensors(tensors, expected, path)
    _check_values(tensors, path)
    model.load_state_dict({name: tensors[name].float() for name in expected}, assign=True)
    return model.eval()


def _digest(picture: Tensor) -> bytes:
    content = picture.detach().cpu().contiguous()
    code = hashlib.blake2b(f"{content.dtype}{tuple(content.shape)}".encode(), digest_size=16)
    code.update(content.view(torch.uint8).numpy().data)
    return code.digest()


def _is_safetensors(path: Path) -> bool:
    """A safetensors file starts with the length of its JSON header in 8 bytes; hub files may have any name."""
    try:
        with path.open("rb") as file:
            return file.read(9)[8:] == b"{"
    except OSError as error:
        raise CheckpointError(f"CSD checkpoint {path} cannot be read: {error.strerror}") from error


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], int | None]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"CSD checkpoint {path} is damaged: {error}") from error
    try:
        return tensors, int(json.loads(metadata[METADATA_KEY])["heads"]) if METADATA_KEY in metadata else None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"CSD checkpoint {path}: metadata '{METADATA_KEY}' states no heads") from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        # The released file also holds the training script's arguments, a plain bag of values.
        with torch.serialization.safe_globals([argparse.Namespace]), path.open("rb") as file:
            content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle is a program for the reader: it ends in any error there is
        raise CheckpointError(
            f"CSD checkpoint {path} is neither safetensors nor a torch file of plain weights{_why(error)}"
        ) from error
    state = content.get("model_state_dict", content) if isinstance(content, Mapping) else None
    named = isinstance(state, Mapping) and all(isinstance(name, str) for name in state)
    if state is None or not named or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(
            f"CSD checkpoint {path} holds no tensors by name, neither at its top nor under 'model_state_dict'"
        )
    return dict(state)


def _why(error: Exception) -> str:
    """In our words: torch's message advises to switch its protection off."""
    text = str(error)
    if wanted := re.search(r"GLOBAL ([\w.]+)", text):
        return f": it asks for '{wanted[1]}', which could run code; nothing of it was run"
    if "TorchScript" in text:
        return ": it is a TorchScript program"
    if not isinstance(error, RuntimeError) or not text.strip():
        return ""
    return ": " + "".join(character for character in text.strip().splitlines()[0] if character.isprintable())


def _choose_heads(asked: int | None, stated: int | None, path: Path) -> int | None:
    if asked is not None and stated is not None and asked != stated:
        raise CheckpointError(f"CSD checkpoint {path} states {stated} heads; leave out heads={asked}")
    return asked if stated is None else stated


def _infer_config(tensors: Mapping[str, Tensor], heads: int | None, path: Path) -> CsdConfig:
    names = {
        "backbone.conv1.weight": 4,
        "backbone.positional_embedding": 2,
        "last_layer_style": 2,
    }
    for name, ndim in names.items():
        if name not in tensors:
            raise CheckpointError(f"CSD checkpoint {path} lacks the tensor '{name}'")
        if tensors[name].ndim != ndim:
            raise CheckpointError(f"CSD checkpoint {path}: '{name}' should have {ndim} dimensions")
        if not tensors[name].numel():
            raise CheckpointError(f"CSD checkpoint {path}: '{name}' is empty")
    width, _, patch_size, _ = tensors["backbone.conv1.weight"].shape
    num_patches = tensors["backbone.positional_embedding"].shape[0] - 1
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
        output_dim=tensors["last_layer_style"].shape[1],
    )


def _check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], path: Path) -> None:
    for name in sorted(expected.keys() - tensors.keys()):
        raise CheckpointError(f"CSD checkpoint {path} lacks the tensor '{name}'")
    for name in sorted(tensors.keys() - expected.keys()):
        raise CheckpointError(f"CSD checkpoint {path} holds the unknown tensor {name!r}")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(
                f"CSD checkpoint {path}: '{name}' has shape {tuple(tensors[name].shape)}; expected {shape}"
            )


def _check_values(tensors: Mapping[str, Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        here = tensor.device.type == "cpu" and tensor.layout == torch.strided and tensor.is_floating_point()
        # A few bytes can be described as a tensor that would fill the memory.
        if not here or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise CheckpointError(f"CSD checkpoint {path}: '{name}' is no ordinary tensor of floating-point numbers")
        if not tensor.isfinite().all():
            raise CheckpointError(f"CSD checkpoint {path}: '{name}' holds values that are not finite")
