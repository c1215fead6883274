"""The tiny detector and face network: their files, their losses, and that their recipes learn. Nothing is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from rewardgen.errors import CheckpointError
from rewardgen.rewards.faces.centre_detector import (
    STRIDE,
    CentreDetector,
    cells,
    decode,
    encode,
    load_centre_detector,
    save_centre_detector,
)
from rewardgen.rewards.faces.iresnet import IResNet
from rewardgen.rewards.faces.onnx_detectors import open_detector
from rewardgen.world.recipes import detector, embedder


def test_outputs_of_a_cell_are_read_as_they_are_taught() -> None:
    lesson = detector.groups(3, 1, least=6)
    boxes, landmarks = lesson.boxes_NK4.flatten(0, 1), lesson.landmarks_NK52.flatten(0, 1)
    middle = STRIDE * ((boxes[:, :2] + boxes[:, 2:]) / 2 / STRIDE).round()
    outputs = torch.cat([torch.zeros(len(boxes), 1), encode(boxes, landmarks, middle)], 1)
    for n in range(len(boxes)):
        found_boxes, found_landmarks = decode(outputs[n, None, None], middle[n, None])
        torch.testing.assert_close(found_boxes[0, 0], boxes[n])
        torch.testing.assert_close(found_landmarks[0, 0], landmarks[n])
    assert cells(2, 3).tolist() == [[0, 0], [4, 0], [8, 0], [0, 4], [4, 4], [8, 4]]


def test_the_middle_of_a_cell_is_where_the_network_looks() -> None:
    """The gradient of a cell's outputs in the pixels is centred on the pixel that `cells` says."""
    torch.manual_seed(0)
    model = CentreDetector(8).eval()
    pixels = torch.rand(1, 3, 96, 96, requires_grad=True)
    model.stem(2 * pixels - 1)[0, :, 9, 14].abs().sum().backward()
    touched = (pixels.grad.abs().sum((0, 1)) > 0).nonzero()
    assert (touched.min(0).values + touched.max(0).values).tolist() == [2 * 9 * STRIDE, 2 * 14 * STRIDE]


def test_mirrored_pictures_keep_their_landmarks_in_order() -> None:
    """Mirroring twice gives back the picture; the viewer's left eye stays the left one."""
    lesson = detector.alone(24, 2)
    drawn = detector.drawn(lesson, 24, torch.Generator().manual_seed(0))
    assert bool((drawn.landmarks_NK52[:, 0, 0, 0] < drawn.landmarks_NK52[:, 0, 1, 0]).all())
    assert bool((drawn.landmarks_NK52[:, 0, 3, 0] < drawn.landmarks_NK52[:, 0, 4, 0]).all())
    low, high = drawn.boxes_NK4[:, :, None, :2], drawn.boxes_NK4[:, :, None, 2:]
    assert bool(((drawn.landmarks_NK52 >= low) & (drawn.landmarks_NK52 <= high)).all())


def test_the_detector_learns_and_survives_its_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CentreDetector(16)
    lesson = detector.alone(24, 3)
    losses = detector.train(model, [lesson], 60, batch=8)
    assert sum(losses[-8:]) < 0.4 * sum(losses[:8])
    found = detector.recall(model, lesson)
    assert found["recall"] > 0.8
    assert found["precision"] > 0.8
    path = tmp_path / "detector.safetensors"
    save_centre_detector(model, path)
    again = open_detector(str(path), confidence=0.3)
    assert isinstance(again, CentreDetector)
    assert again.confidence == 0.3
    before, after = (m.detect(lesson.pixels_N3HW, [None] * 24) for m in (model, load_centre_detector(path)))
    assert [len(faces) for faces in before] == [len(faces) for faces in after]
    for ours, theirs in zip(before, after, strict=True):
        torch.testing.assert_close(ours.landmarks_N52, theirs.landmarks_N52, rtol=0, atol=0.1)  # half precision
    assert not any(faces.landmarks_N52.requires_grad for faces in after)
    assert not any(map(len, load_centre_detector(path, confidence=1.01).detect(lesson.pixels_N3HW, [None] * 24)))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda t: t.pop("stem.0.0.weight"), r"lacks the tensor 'stem\.0\.0\.weight'"),
        (lambda t: t.pop("head.weight"), "is it a CentreDetector"),
        (lambda t: t.update(more=torch.zeros(1)), "unknown tensor 'more'"),
        (lambda t: t.update({"head.bias": torch.zeros(14)}), r"'head\.bias' has shape \(14,\)"),
        (lambda t: t["head.bias"].fill_(torch.nan), r"'head\.bias' holds values that are no finite"),
    ],
)
def test_damaged_files_are_refused(damage: object, said: str, tmp_path: Path) -> None:
    path = tmp_path / "detector.safetensors"
    save_centre_detector(CentreDetector(8), path)
    tensors = load_file(path)
    damage(tensors)  # type: ignore[operator]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=said):
        load_centre_detector(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="damaged"):
        load_centre_detector(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        open_detector(str(tmp_path / "nowhere.safetensors"))


def test_arcface_is_cross_entropy_of_the_widened_angle() -> None:
    torch.manual_seed(0)
    model = embedder.Centres(IResNet(embedder.CONFIG), 5).eval()
    crops, who = torch.rand(6, 3, 32, 32) * 2 - 1, torch.tensor([0, 1, 2, 3, 4, 0])
    with torch.no_grad():
        cosine = F.normalize(model.network(crops)) @ F.normalize(model.centre_MD).T
        for margin in (0.0, 0.3):
            angle = cosine.acos()
            angle[torch.arange(6), who] += margin
            expected = F.cross_entropy(embedder.SCALE * angle.cos(), who)
            torch.testing.assert_close(model(crops, who, margin), expected, rtol=1e-4, atol=1e-4)


def test_the_face_network_learns_who_is_who() -> None:
    pixels, landmarks, who = embedder.album(12, 6, 1, None, 0.0)
    torch.manual_seed(0)
    model = embedder.Centres(IResNet(embedder.CONFIG), 12)
    losses = embedder.train(model, pixels, landmarks, who, 30, 24)
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])
    apart = embedder.separation(model.network, None, people=24, looks=2)
    assert apart["same"] - apart["different"] > 0.2
