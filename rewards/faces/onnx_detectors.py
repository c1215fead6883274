"""Released face detectors as ONNX files: SCRFD (insightface) and RetinaFace. Needs the extra `faces`.

Only the networks run in onnxruntime; what goes in and what is read out is here. Suffixes: P anchors of one picture,
N faces, 4 = (x1, y1, x2, y2), 52 = five landmarks (x, y).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rewardgen.errors import CheckpointError, ConfigError
from rewardgen.rewards.faces.centre_detector import load_centre_detector
from rewardgen.rewards.faces.detector import FaceDetector, Faces, GivenDetector
from rewardgen.rewards.faces.suppression import confident

_BGR_MEAN = (104.0, 117.0, 123.0)
_RETINAFACE_ANCHORS = {8: (16, 32), 16: (64, 128), 32: (256, 512)}
"""Stride of each level to the sides of its anchors, in pixels."""
_RETINAFACE_VARIANCE = (0.1, 0.2)


class Session(Protocol):
    """The part of `onnxruntime.InferenceSession` that is used."""

    def get_inputs(self) -> Sequence[Any]: ...

    def get_outputs(self) -> Sequence[Any]: ...

    def run(self, output_names: Sequence[str] | None, feeds: dict[str, Any]) -> Sequence[Any]: ...


def open_detector(detector: str, *, confidence: float | None = None) -> FaceDetector:
    """A detector by the name that experiments use.

    Args:
        detector: `given` (landmarks of the examples); the path of an ONNX file: SCRFD with landmarks (9 or 15
            outputs) or RetinaFace (3 outputs); or that of a safetensors file: a `CentreDetector`.
        confidence: least score of a face; by default each release's own.

    Raises:
        ConfigError: onnxruntime is not installed, or `confidence` is given to a detector without scores.
        CheckpointError: the file is missing, unreadable or of another kind.
    """
    check_confidence(detector, confidence)
    if detector == "given":
        return GivenDetector()
    options = {} if confidence is None else {"confidence": confidence}
    if Path(detector).suffix == ".safetensors":
        return load_centre_detector(detector, **options)
    session = open_session(Path(detector))
    count = len(session.get_outputs())
    if count in Scrfd.STRIDES:
        return Scrfd(session, **options)
    if count == 3:
        return RetinaFace(session, **options)
    raise CheckpointError(
        f"face detector {detector} has {count} outputs; SCRFD with landmarks has 9 or 15, RetinaFace has 3"
    )


def check_confidence(detector: str, confidence: float | None) -> None:
    """Raise ConfigError where `confidence` is given to a detector without scores."""
    if detector == "given" and confidence is not None:
        raise ConfigError("confidence: the detector 'given' has none to compare with; leave it out")


def open_session(path: Path) -> Session:
    """The one place that imports onnxruntime.

    Raises:
        ConfigError: onnxruntime is not installed.
        CheckpointError: the file is missing or no ONNX model.
    """
    if not path.is_file():
        raise CheckpointError(f"face detector {path} does not exist (write 'given' to use the examples' own landmarks)")
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise ConfigError(
            f"face detector {path} needs onnxruntime, which cannot be imported ({error}):"
            " pip install -e '.[faces]' in the checkout"
        ) from None
    try:
        session: Session = runtime.InferenceSession(str(path), providers=runtime.get_available_providers())
    except Exception as error:  # onnxruntime's own errors share no base class that it exports
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"face detector {path} cannot be read by onnxruntime: {reason}") from error
    return session


class Scrfd(FaceDetector):
    """SCRFD (Guo et al., arXiv 2105.04714) as insightface exports it, e.g. `det_10g.onnx`.

    The picture is fitted into the top left of the network's input (640 x 640 where the file leaves it open), without
    changing its aspect. Scores leave the network between 0 and 1.

    Args:
        session: outputs are the scores of all strides, then the boxes, then the landmarks.
        confidence: least score of a face.
        overlap: of two boxes with a larger intersection over union the less confident goes.
    """

    STRIDES: ClassVar[dict[int, tuple[int, ...]]] = {9: (8, 16, 32), 15: (8, 16, 32, 64, 128)}
    """By the number of outputs."""

    def __init__(self, session: Session, *, confidence: float = 0.5, overlap: float = 0.4) -> None:
        self.session, self.confidence, self.overlap = session, confidence, overlap
        self.strides = self.STRIDES[len(session.get_outputs())]
        height, width = session.get_inputs()[0].shape[2:]
        self.input_size = (height, width) if isinstance(height, int) and isinstance(width, int) else (640, 640)

    def detect(self, pixels_B3HW: Tensor, known: Sequence[Tensor | None]) -> list[Faces]:
        return [self._detect(pixels_3HW) for pixels_3HW in pixels_B3HW]

    def _detect(self, pixels_3HW: Tensor) -> Faces:
        height, width = pixels_3HW.shape[1:]
        scale = min(self.input_size[0] / height, self.input_size[1] / width)
        fitted = (max(int(height * scale), 1), max(int(width * scale), 1))
        resized_13HW = F.interpolate(pixels_3HW[None].float(), fitted, mode="bilinear", align_corners=False)
        below, right = self.input_size[0] - fitted[0], self.input_size[1] - fitted[1]
        padded_13HW = F.pad(resized_13HW, (0, right, 0, below))
        outputs = _run(self.session, (255 * padded_13HW - 127.5) / 128)
        levels = len(self.strides)
        parts = [
            self._level(stride, outputs[i], outputs[i + levels], outputs[i + 2 * levels])
            for i, stride in enumerate(self.strides)
        ]
        scores_P, boxes_P4, landmarks_P52 = (torch.cat(columns) for columns in zip(*parts, strict=True))
        scale = fitted[0] / height
        return confident(scores_P, boxes_P4 / scale, landmarks_P52 / scale, self.confidence, self.overlap)

    def _level(self, stride: int, scores: Tensor, boxes: Tensor, landmarks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs are distances from the anchor's centre, in strides."""
        rows, columns = self.input_size[0] // stride, self.input_size[1] // stride
        scores_P = scores.reshape(-1)
        centre_P2 = stride * _grid(rows, columns).repeat_interleave(len(scores_P) // (rows * columns), dim=0)
        distance_P4, offset_P52 = stride * boxes.reshape(-1, 4), stride * landmarks.reshape(-1, 5, 2)
        boxes_P4 = torch.cat([centre_P2 - distance_P4[:, :2], centre_P2 + distance_P4[:, 2:]], dim=1)
        return scores_P, boxes_P4, centre_P2[:, None] + offset_P52


class RetinaFace(FaceDetector):
    """RetinaFace (Deng et al., arXiv 1905.00641) in the common PyTorch form, exported to ONNX: UMO's detector.

    Args:
        session: takes `retinaface_input` with channels first, for pictures of any size, and returns boxes [1, P, 4],
            class probabilities [1, P, 2] and landmarks [1, P, 10], all relative to the anchors.
        confidence: least probability of a face. Default: UMO's.
        overlap: of two boxes with a larger intersection over union the less confident goes. Default: UMO's.
    """

    def __init__(self, session: Session, *, confidence: float = 0.8, overlap: float = 0.4) -> None:
        self.session, self.confidence, self.overlap = session, confidence, overlap

    def detect(self, pixels_B3HW: Tensor, known: Sequence[Tensor | None]) -> list[Faces]:
        return [self._detect(pixels_3HW[None]) for pixels_3HW in pixels_B3HW]

    def _detect(self, pixels_13HW: Tensor) -> Faces:
        height, width = pixels_13HW.shape[2:]
        boxes, probabilities, landmarks = _run(self.session, retinaface_input(pixels_13HW).permute(0, 3, 1, 2))
        anchor_P4 = retinaface_anchors(height, width)
        centre_P2, side_P2 = anchor_P4.split(2, dim=1)
        by_centre, by_side = _RETINAFACE_VARIANCE
        middle_P2 = centre_P2 + by_centre * boxes[0, :, :2] * side_P2
        half_P2 = side_P2 * torch.exp(by_side * boxes[0, :, 2:]) / 2
        landmarks_P52 = centre_P2[:, None] + by_centre * landmarks[0].reshape(-1, 5, 2) * side_P2[:, None]
        boxes_P4 = torch.cat([middle_P2 - half_P2, middle_P2 + half_P2], dim=1)
        return confident(probabilities[0, :, 1], boxes_P4, landmarks_P52, self.confidence, self.overlap)


def retinaface_input(pixels_B3HW: Tensor) -> Tensor:
    """RGB in [0, 1] to what RetinaFace was trained on, channels last: BGR in [0, 255] minus the mean, [B, H, W, 3]."""
    bgr_BHW3 = 255 * pixels_B3HW.flip(1).permute(0, 2, 3, 1)
    return bgr_BHW3 - bgr_BHW3.new_tensor(_BGR_MEAN)


def retinaface_anchors(height: int, width: int) -> Tensor:
    """Centres and sides (x, y, w, h) in pixels, [P, 4]: strides, rows, columns, then the sides of a stride."""
    levels = []
    for stride, sides in _RETINAFACE_ANCHORS.items():
        centre_P2 = stride * (_grid(-(-height // stride), -(-width // stride)) + 0.5)
        side_P2 = torch.tensor(sides, dtype=torch.float32).repeat(len(centre_P2))[:, None].expand(-1, 2)
        levels.append(torch.cat([centre_P2.repeat_interleave(len(sides), dim=0), side_P2], dim=1))
    return torch.cat(levels)


def _grid(rows: int, columns: int) -> Tensor:
    """(x, y) of each cell, row by row, [rows * columns, 2]."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([x, y], dim=-1).reshape(-1, 2).float()


def _run(session: Session, images_13HW: Tensor) -> list[Tensor]:
    image = np.ascontiguousarray(images_13HW.detach().cpu().float().numpy())
    return [torch.from_numpy(np.array(out)).float() for out in session.run(None, {session.get_inputs()[0].name: image})]
