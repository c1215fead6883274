"""From a picture and five landmarks to the upright crop a face network was trained on, with gradient in the pixels.

Suffixes: B pictures, N faces of one picture, F faces of all pictures, K most faces of one picture, S side of a crop,
23 = a matrix that maps (x, y, 1) in the picture to (x, y) in the crop. Pixel centres lie at whole numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

TEMPLATE_SIZE = 112
TEMPLATE_52 = (
    (38.2946, 51.6963),
    (73.5318, 51.5014),
    (56.0252, 71.7366),
    (41.5493, 92.3655),
    (70.7299, 92.2041),
)
"""ArcFace's landmarks in the 112 x 112 crop: left eye, right eye, nose, left and right corner of the mouth."""
_SINGULAR = 1e-6
"""Scales below it (and above its inverse) come from landmarks that are no face."""


def template(size: int = TEMPLATE_SIZE) -> Tensor:
    """ArcFace's landmarks [5, 2], float64, in a crop of another side."""
    return torch.tensor(TEMPLATE_52, dtype=torch.float64) * (size / TEMPLATE_SIZE)


def similarity_transform(landmarks_N52: Tensor, target_52: Tensor) -> Tensor:
    """Rotation, uniform scale and translation [N, 2, 3] that bring landmarks closest to a target (least squares).

    It is Umeyama's estimate (1991) without reflection. In the plane it has a closed form: with points as complex
    numbers about their mean, the best `a` in `target = a * source` is `<source, target> / |source|^2`. Computed in
    float64, all faces at once. Landmarks that coincide give a matrix that is not finite; `is_usable` tells.
    """
    source_N52, target_52 = landmarks_N52.double(), target_52.to(landmarks_N52.device).double()
    source_mean_N2, target_mean_2 = source_N52.mean(1), target_52.mean(0)
    (x_N5, y_N5), (u_5, v_5) = (source_N52 - source_mean_N2[:, None]).unbind(-1), (target_52 - target_mean_2).unbind(-1)
    spread_N = (x_N5.square() + y_N5.square()).sum(1)
    cos_N, sin_N = (x_N5 * u_5 + y_N5 * v_5).sum(1) / spread_N, (x_N5 * v_5 - y_N5 * u_5).sum(1) / spread_N
    linear_N22 = torch.stack([cos_N, -sin_N, sin_N, cos_N], dim=1).reshape(-1, 2, 2)
    shift_N2 = target_mean_2 - (linear_N22 @ source_mean_N2[:, :, None])[:, :, 0]
    return torch.cat([linear_N22, shift_N2[:, :, None]], dim=2)


def is_usable(transform_N23: Tensor) -> Tensor:
    """Bool [N]: whether the matrix is finite and can be inverted."""
    scale_N: Tensor = torch.linalg.det(transform_N23[:, :, :2]).abs().sqrt()
    return transform_N23.isfinite().all(2).all(1) & (scale_N > _SINGULAR) & (scale_N < 1 / _SINGULAR)


def crop_boxes(transform_N23: Tensor, size: int) -> Tensor:
    """The upright boxes (x1, y1, x2, y2) around what each crop shows, in pixels of the picture, float64 [N, 4]."""
    last = size - 1.0
    corners_P2 = transform_N23.new_tensor([[0, 0], [last, 0], [0, last], [last, last]], dtype=torch.float64)
    source_NP2 = _to_picture(transform_N23.double(), corners_P2)
    return torch.cat([source_NP2.amin(1), source_NP2.amax(1)], dim=1)


def warp(images_B3HW: Tensor, transforms: Sequence[Tensor], size: int = TEMPLATE_SIZE) -> Tensor:
    """Cut all faces [F, 3, S, S] out of all pictures: bilinear, 0 outside of the picture, gradient in the pixels only.

    One `grid_sample` for the batch. The faces of a picture are stacked along the height of one tall output, so that
    no picture is copied for its second face. As in the authors' face path nothing is smoothed before it is made
    smaller.

    Args:
        images_B3HW: pictures; 0 is what lies outside, so hand them over in [-1, 1].
        transforms: for each picture its matrices [N, 2, 3], usable ones; N may differ and be 0.
        size: side S of a crop in pixels.

    Returns:
        The crops, picture by picture, in the dtype of the pictures but at least float32.
    """
    images_B3HW = images_B3HW.to(torch.promote_types(images_B3HW.dtype, torch.float32))
    batch, channels, height, width = images_B3HW.shape
    counts = [len(transform_N23) for transform_N23 in transforms]
    most = max(counts, default=0)
    if most == 0:
        # No crop, yet still a function of the pictures: what is computed from it keeps a gradient, of 0.
        return images_B3HW.flatten()[:0].reshape(0, channels, size, size)
    grid_FSS2 = _sampling_grid(torch.cat([t.to(images_B3HW.device) for t in transforms]), size, height, width)
    grid_BKSS2 = pad_sequence(list(grid_FSS2.to(images_B3HW).split(counts)), batch_first=True)
    tall_B3LS = F.grid_sample(
        images_B3HW,
        grid_BKSS2.reshape(batch, most * size, size, 2),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=True,
    )
    crops_BK3SS = tall_B3LS.reshape(batch, channels, most, size, size).transpose(1, 2)
    present_BK = torch.arange(most)[None] < torch.tensor(counts)[:, None]
    return crops_BK3SS[present_BK.to(images_B3HW.device)]


def _sampling_grid(transform_F23: Tensor, size: int, height: int, width: int) -> Tensor:
    """Where each crop pixel lies in its picture, in `grid_sample`'s coordinates: -1 and 1 are the outermost pixels."""
    transform_F23 = transform_F23.double()
    steps_S = torch.arange(size, dtype=torch.float64, device=transform_F23.device)
    crop_P2 = torch.stack([steps_S.repeat(size), steps_S.repeat_interleave(size)], dim=1)
    source_FP2 = _to_picture(transform_F23, crop_P2)
    extent_2 = torch.tensor([max(width - 1, 1), max(height - 1, 1)], dtype=torch.float64, device=transform_F23.device)
    return (2 * source_FP2 / extent_2 - 1).reshape(-1, size, size, 2)


def _to_picture(transform_F23: Tensor, crop_P2: Tensor) -> Tensor:
    """Places [F, P, 2] in the picture of places [P, 2] in the crop."""
    inverse_F22 = torch.linalg.inv(transform_F23[:, :, :2])
    source_FP2: Tensor = (crop_P2 - transform_F23[:, None, :, 2]) @ inverse_F22.transpose(1, 2)
    return source_FP2
