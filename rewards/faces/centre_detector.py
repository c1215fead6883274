"""A small face detector of our own, for pictures whose faces are all of about one size: the tiny world's.

Every cell of a grid says how likely a face has its middle there, and where from there its box and landmarks are, as
in CenterNet (arXiv 1904.07850). It runs in torch, needs no extra, and loads from one safetensors file.

Suffixes: B pictures, H and W pixels, Y and X cells, P cells of one picture, N faces, 4 = (x1, y1, x2, y2),
52 = five landmarks (x, y), G = 15 outputs of a cell: score, distances to the four sides, ten offsets of landmarks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from rewardgen.errors import CheckpointError
from rewardgen.rewards.faces.detector import FaceDetector, Faces
from rewardgen.rewards.faces.suppression import confident

STRIDE, UNIT = 4, 16.0
"""Pixels from cell to cell, and pixels that an output of 1 means."""
DILATIONS = (1, 2, 4, 2, 1)
OUTPUTS = 15


class CentreDetector(nn.Module, FaceDetector):
    """Convolutions down to a quarter of the resolution, residual blocks of growing reach, one linear map per cell.

    Args:
        width: channels.
        confidence: least score of a face.
        overlap: of two boxes with a larger intersection over union the less confident goes.
    """

    def __init__(self, width: int = 32, *, confidence: float = 0.5, overlap: float = 0.4) -> None:
        super().__init__()
        self.confidence, self.overlap = confidence, overlap
        self.stem = nn.Sequential(_convolution(3, width // 2, stride=2), _convolution(width // 2, width, stride=2))
        self.blocks = nn.ModuleList(_convolution(width, width, dilation=dilation) for dilation in DILATIONS)
        self.head = nn.Conv2d(width, OUTPUTS, 1)
        assert self.head.bias is not None  # for the type checker
        nn.init.constant_(self.head.bias[:1], -4.0)  # most cells hold no face

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        """RGB in [0, 1] to raw outputs [B, 15, Y, X]; the score is the logit of a probability."""
        x = self.stem(2 * pixels_B3HW - 1)
        for block in self.blocks:
            x = x + block(x)
        outputs_BGYX: Tensor = self.head(x)
        return outputs_BGYX

    def detect(self, pixels_B3HW: Tensor, known: Sequence[Tensor | None]) -> list[Faces]:
        with torch.no_grad():
            outputs_BGYX = self(pixels_B3HW.to(self.head.weight)).float()
        score_B1YX = outputs_BGYX[:, :1].sigmoid()
        # Only the best cell of each neighbourhood speaks.
        peak_B1YX = score_B1YX * (score_B1YX == F.max_pool2d(score_B1YX, 3, 1, 1))
        rows, columns = outputs_BGYX.shape[2:]
        boxes_BP4, landmarks_BP52 = decode(outputs_BGYX.flatten(2).mT, cells(rows, columns).to(outputs_BGYX))
        found = zip(peak_B1YX.flatten(1).cpu(), boxes_BP4.cpu(), landmarks_BP52.cpu(), strict=True)
        return [
            confident(score_P, boxes_P4, landmarks_P52, self.confidence, self.overlap)
            for score_P, boxes_P4, landmarks_P52 in found
        ]


def cells(rows: int, columns: int) -> Tensor:
    """The pixel (x, y) at the middle of each cell, row by row, [rows * columns, 2]."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return STRIDE * torch.stack([x, y], -1).reshape(-1, 2).float()


def decode(outputs_BPG: Tensor, middle_P2: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of cells to boxes [B, P, 4] and landmarks [B, P, 5, 2] in pixels."""
    low, high = middle_P2 - UNIT * outputs_BPG[..., 1:3], middle_P2 + UNIT * outputs_BPG[..., 3:5]
    offsets_BP52 = outputs_BPG[..., 5:].unflatten(-1, (5, 2))
    return torch.cat([low, high], -1), middle_P2[:, None] + UNIT * offsets_BP52


def encode(boxes_N4: Tensor, landmarks_N52: Tensor, middle_N2: Tensor) -> Tensor:
    """What a cell at `middle_N2` should say about a face, less the score, [N, 14]: the inverse of `decode`."""
    low, high = middle_N2 - boxes_N4[:, :2], boxes_N4[:, 2:] - middle_N2
    return torch.cat([low, high, (landmarks_N52 - middle_N2[:, None]).flatten(1)], 1) / UNIT


def save_centre_detector(model: CentreDetector, path: str | Path) -> None:
    """Write a safetensors file in half precision; its one size follows from the tensors."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    save_file({name: tensor.detach().half().contiguous() for name, tensor in tensors.items()}, path)


def load_centre_detector(path: str | Path, *, confidence: float = 0.5, overlap: float = 0.4) -> CentreDetector:
    """Read a detector in float32 on the CPU, in evaluation mode.

    Raises:
        CheckpointError: the file is missing or damaged; a tensor is missing, unknown, of another shape or not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"face detector {path} {'is no file' if path.exists() else 'does not exist'}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"face detector {path} is damaged: {error}") from error
    first = tensors.get("head.weight")
    if first is None or first.ndim != 4:
        raise CheckpointError(f"face detector {path} lacks the tensor 'head.weight'; is it a CentreDetector?")
    width = first.shape[1]
    with torch.device("meta"):  # a damaged file may ask for any size
        blank = CentreDetector(width)
    _check(tensors, {name: t for name, t in blank.state_dict().items() if t.is_floating_point()}, path)
    model = CentreDetector(width, confidence=confidence, overlap=overlap)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)
    return model.eval()


def _check(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    if wrong := sorted(expected.keys() ^ found.keys()):
        fault = "lacks the tensor" if wrong[0] in expected else "holds the unknown tensor"
        raise CheckpointError(f"face detector {path} {fault} '{wrong[0]}'")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"face detector {path}: '{name}' has shape {tuple(tensor.shape)};"
                f" expected {tuple(expected[name].shape)}"
            )
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise CheckpointError(f"face detector {path}: '{name}' holds values that are no finite numbers")


def _convolution(inputs: int, outputs: int, *, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )
