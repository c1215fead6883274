"""Detectors, alignment, face networks, windows and metrics."""

from __future__ import annotations

import itertools
import math
import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from skimage.transform import SimilarityTransform
from torch import Tensor

from rewardgen.errors import CheckpointError, ConfigError, ScoringError
from rewardgen.rewards.faces import encoder as encoder_module
from rewardgen.rewards.faces.align import crop_boxes, is_usable, similarity_transform, template, warp
from rewardgen.rewards.faces.detector import (
    FACE_LANDMARKS,
    IDENTITY_LANDMARKS,
    FaceDetector,
    Faces,
    GivenDetector,
    known_in_picture,
    known_in_references,
)
from rewardgen.rewards.faces.encoder import FaceEncoder
from rewardgen.rewards.faces.iresnet import LAYERS, IResNet, IResNetConfig, load_iresnet, save_iresnet
from rewardgen.rewards.faces.metrics import id_conf, id_sim, identity_report
from rewardgen.rewards.faces.onnx_detectors import (
    RetinaFace,
    Scrfd,
    open_detector,
    retinaface_anchors,
    retinaface_input,
)
from rewardgen.rewards.faces.suppression import suppress
from rewardgen.rewards.faces.windows import untouched, window_transforms, windows
from rewardgen.types import Example
from tests.toy_faces import CROP, TINY, example_of, landmarks_at, linear_encoder, person, scene, tiny_iresnet


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def turned(scale: float, angle: float, x: float, y: float) -> Tensor:
    """The matrix [2, 3] of a similarity."""
    c, s = scale * math.cos(angle), scale * math.sin(angle)
    return torch.tensor([[c, -s, x], [s, c, y]], dtype=torch.float64)


class TestSimilarityTransform:
    @given(st.floats(0.05, 20), st.floats(-math.pi, math.pi), st.floats(-500, 500), st.floats(-500, 500))
    @settings(max_examples=30, deadline=None)
    def test_a_known_similarity_is_recovered(self, scale, angle, x, y):
        matrix = turned(scale, angle, x, y)
        source = torch.cat([torch.rand(5, 2, generator=rng(), dtype=torch.float64) * 90, torch.ones(5, 1)], dim=1)
        found = similarity_transform(source[None, :, :2], source @ matrix.T)[0]
        assert torch.allclose(found, matrix, atol=1e-9 * (1 + abs(x) + abs(y)) * scale + 1e-9)

    def test_it_is_umeyamas_estimate_also_for_mirrored_and_crooked_faces(self):
        landmarks_N52 = torch.rand(40, 5, 2, generator=rng(1), dtype=torch.float64) * 200
        landmarks_N52[::2] = template() * torch.tensor([-1.0, 1.0]) + torch.rand(20, 5, 2, generator=rng(2))
        ours = similarity_transform(landmarks_N52, template())
        for matrix, landmarks in zip(ours, landmarks_N52, strict=True):
            theirs = SimilarityTransform.from_estimate(landmarks.numpy(), template().numpy())
            assert np.abs(matrix.numpy() - theirs.params[:2]).max() < 1e-9

    def test_landmarks_that_are_no_face_are_told(self):
        face = template()
        # (x, y) -> (y, x) about the centre of a square is orthogonal to every rotation of it.
        square = torch.tensor([[-1.0, -1], [1, -1], [0, 0], [-1, 1], [1, 1]])
        wrong = torch.stack([face * 0 + 7, face * torch.nan, face * torch.inf, face * 1e-9, face])
        assert is_usable(similarity_transform(wrong, template())).tolist() == [False, False, False, False, True]
        assert is_usable(similarity_transform(square[None] * torch.tensor([-1.0, 1.0]), square)).tolist() == [False]
        assert is_usable(similarity_transform(torch.zeros(0, 5, 2), template())).tolist() == []

    def test_the_template_grows_with_the_crop(self):
        assert torch.allclose(template(224), 2 * template())


def bilinear(image: np.ndarray, x: float, y: float) -> np.ndarray:
    """By the book, with zeros outside."""
    total = np.zeros(len(image))
    for row, column in itertools.product((math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)):
        if 0 <= row < image.shape[1] and 0 <= column < image.shape[2]:
            total += image[:, row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


class TestWarp:
    def test_every_pixel_is_bilinear_at_the_place_the_matrix_says(self):
        image = torch.rand(3, 13, 21, generator=rng(), dtype=torch.float64)
        matrix = turned(0.7, 0.4, 1.5, -2.0)
        crop = warp(image[None], [matrix[None]], 9)[0]
        inverse = np.linalg.inv(np.vstack([matrix.numpy(), [0, 0, 1]]))
        for row, column in itertools.product(range(9), range(9)):
            x, y, _ = inverse @ [column, row, 1]
            assert np.allclose(crop[:, row, column].numpy(), bilinear(image.numpy(), x, y), atol=1e-9)
        assert bool((crop == 0).any())
        assert bool((crop != 0).any())

    def test_a_shift_is_a_cut_and_a_quarter_turn_is_a_quarter_turn(self):
        image = torch.rand(1, 3, 20, 30, generator=rng())
        assert torch.allclose(warp(image, [turned(1, 0, -4, -3)[None]], 8)[0], image[0, :, 3:11, 4:12], atol=1e-5)
        square = image[:, :, :20, :20]
        quarter = warp(square, [turned(1, math.pi / 2, 19, 0)[None]], 20)[0]
        assert torch.allclose(quarter, torch.rot90(square[0], -1, (1, 2)), atol=1e-5)

    def test_a_batch_with_different_numbers_of_faces_equals_one_at_a_time(self):
        images = torch.rand(4, 3, 17, 23, generator=rng(), dtype=torch.float64)
        matrices = torch.stack([turned(0.5 + 0.1 * i, 0.3 * i, i, -i) for i in range(6)])
        split = list(matrices.split([2, 0, 3, 1]))
        together = warp(images, split, 7)
        alone = [warp(image[None], [m[None]], 7) for image, some in zip(images, split, strict=True) for m in some]
        assert torch.allclose(together, torch.cat(alone), atol=1e-12)

    def test_the_box_of_a_crop_holds_every_pixel_that_it_reads(self):
        matrices = torch.stack([turned(0.9, 0.6, 0, -14), turned(1.1, -2.0, -7, 33)])
        picture = torch.rand(1, 1, 40, 40, generator=rng(), dtype=torch.float64, requires_grad=True)
        for matrix, box in zip(matrices, crop_boxes(matrices, 9), strict=True):
            (grad,) = torch.autograd.grad(warp(picture, [matrix[None]], 9).sum(), picture)
            rows, columns = grad[0, 0].nonzero(as_tuple=True)
            x1, y1, x2, y2 = box.clamp(0, 39).tolist()
            assert (int(columns.min()), int(rows.min())) == (math.floor(x1), math.floor(y1))
            assert (int(columns.max()), int(rows.max())) == (math.ceil(x2), math.ceil(y2))

    def test_gradient(self):
        image = torch.rand(2, 1, 6, 7, generator=rng(), dtype=torch.float64, requires_grad=True)
        matrices = [turned(0.8, 0.2, 0.3, 0.1)[None].repeat(2, 1, 1), turned(1.2, -0.5, 1, 1)[None]]
        assert torch.autograd.gradcheck(lambda x: warp(x, matrices, 5), (image,))

    def test_without_any_face_there_is_an_empty_batch_that_still_hangs_on_the_pictures(self):
        image = torch.rand(2, 3, 6, 7, generator=rng(), requires_grad=True)
        crops = warp(image, [torch.zeros(0, 2, 3)] * 2, 5)
        assert crops.shape == (0, 3, 5, 5)
        (grad,) = torch.autograd.grad(crops.sum(), image)
        assert bool((grad == 0).all())

    def test_half_precision_is_computed_in_float32(self):
        image = torch.rand(1, 3, 300, 300, generator=rng()).bfloat16()
        crop = warp(image, [turned(0.4, 0.1, 1, 1)[None]], 16)
        assert torch.equal(crop, warp(image.float(), [turned(0.4, 0.1, 1, 1)[None]], 16))


class TestIResNet:
    @pytest.mark.parametrize(("name", "millions"), [("r50", 43.59), ("r100", 65.16)])
    def test_full_sizes(self, name, millions):
        with torch.device("meta"):
            model = IResNet(IResNetConfig(layers=LAYERS[name]))
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
        assert model(torch.zeros(2, 3, 112, 112, device="meta")).shape == (2, 512)

    def test_sizes_that_do_not_fit_are_refused(self):
        with pytest.raises(ValueError, match="multiple of 16"):
            IResNetConfig(image_size=100)
        with pytest.raises(ValueError, match="four stages"):
            IResNetConfig(layers=(1, 2, 3))

    def test_gradient_matches_finite_differences(self):
        model = tiny_iresnet().double()
        crops = torch.rand(1, 3, CROP, CROP, generator=rng(), dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(model, (crops,), eps=1e-7, atol=1e-5, fast_mode=True)

    def test_what_is_saved_is_loaded(self, tmp_path):
        model = tiny_iresnet()
        save_iresnet(model, tmp_path / "face.safetensors")
        loaded = load_iresnet(tmp_path / "face.safetensors")
        assert loaded.config == TINY
        assert not loaded.training
        crops = torch.rand(2, 3, CROP, CROP, generator=rng())
        assert torch.equal(loaded(crops), model(crops))

    @pytest.mark.parametrize("form", ["plain", "nested", "prefixed", "half", "uncounted"])
    def test_torch_files_as_they_are_released(self, tmp_path, form):
        state: dict[str, Any] = dict(tiny_iresnet().state_dict())
        if form == "uncounted":
            state = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
        if form == "half":
            state = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        if form == "prefixed":
            state = {f"module.{name}": tensor for name, tensor in state.items()}
        torch.save({"state_dict": state, "epoch": 3} if form == "nested" else state, tmp_path / "backbone.pth")
        loaded = load_iresnet(str(tmp_path / "backbone.pth"))
        assert loaded.config == TINY
        assert all(p.dtype == torch.float32 for p in loaded.parameters())
        assert torch.allclose(loaded.fc.weight, tiny_iresnet().fc.weight, atol=1e-3)
        assert loaded(torch.rand(1, 3, CROP, CROP)).isfinite().all()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s: s.pop("layer2.1.prelu.weight"), r"lacks the tensor 'layer2\.1\.prelu\.weight'"),
            (lambda s: s.pop("fc.weight"), r"lacks the tensor 'fc\.weight'; is it an IResNet"),
            (lambda s: s.update({"layer2.1.se.weight": torch.zeros(2)}), r"unknown tensor 'layer2\.1\.se\.weight'"),
            (lambda s: s.update({"bn2.bias": torch.zeros(3)}), r"'bn2\.bias' has shape \(3,\); expected \(8,\)"),
            (lambda s: s.update({"fc.weight": torch.zeros(6)}), r"'fc\.weight' should have 2 dimensions"),
            (
                lambda s: s.update({"fc.weight": torch.zeros(6, 24)}),
                r"'fc\.weight' of shape \(6, 24\) fits no square of 8",
            ),
            (lambda s: s.update({"fc.weight": torch.zeros(0, 8)}), r"'fc\.weight' is empty"),
            (lambda s: s.update({"bn2.bias": torch.zeros(8).long()}), r"'bn2\.bias' is no ordinary tensor"),
            (lambda s: s.update({"bn2.bias": torch.full((8,), torch.nan)}), r"'bn2\.bias' holds values .* not finite"),
            (lambda s: s.update({"module.bn2.bias": torch.zeros(8)}), r"tensors twice, with and without 'module\.'"),
        ],
    )
    def test_a_wrong_tensor_is_named_with_its_file(self, tmp_path, change, message):
        state = dict(tiny_iresnet().state_dict())
        change(state)
        save_file(state, tmp_path / "wrong.safetensors")
        with pytest.raises(CheckpointError, match=rf"wrong\.safetensors.*{message}"):
            load_iresnet(tmp_path / "wrong.safetensors")

    def test_a_file_that_is_missing_damaged_or_holds_code(self, tmp_path):
        class Payload:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "broken-in"),)

        save_iresnet(tiny_iresnet(), tmp_path / "whole")
        (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:-100])
        (tmp_path / "empty").write_bytes(b"")
        torch.save({"state_dict": tiny_iresnet().state_dict(), "args": Payload()}, tmp_path / "evil.pth")
        torch.save([1, 2], tmp_path / "list.pth")
        for name in ("nowhere", "cut", "empty", "evil.pth", "list.pth"):
            with pytest.raises(CheckpointError, match=name) as caught:
                load_iresnet(tmp_path / name)
            assert "\n" not in str(caught.value)
            assert "weights_only" not in str(caught.value)
        assert not (tmp_path / "broken-in").exists()

    def test_a_tensor_larger_than_its_file(self, tmp_path):
        state = dict(tiny_iresnet().state_dict())
        state["bn2.bias"] = torch.zeros(1).expand(8)
        torch.save(state, tmp_path / "small.pth")
        with pytest.raises(CheckpointError, match=r"'bn2\.bias' is no ordinary tensor"):
            load_iresnet(tmp_path / "small.pth")


class TestGivenDetector:
    def test_it_returns_what_the_example_states(self):
        example = Example(
            id="a",
            identity_refs=(torch.zeros(3, 8, 8),) * 2,
            extras={
                FACE_LANDMARKS: [template().tolist()],
                IDENTITY_LANDMARKS: [[], template()[None]],
            },
        )
        (faces,) = GivenDetector().detect(torch.zeros(1, 3, 8, 8), [known_in_picture(example)])
        assert torch.equal(faces.landmarks_N52[0], template())
        assert faces.boxes_N4[0].tolist() == [*template().amin(0).tolist(), *template().amax(0).tolist()]
        assert [len(f) for f in GivenDetector().detect(torch.zeros(2, 3, 8, 8), known_in_references(example))] == [0, 1]

    @pytest.mark.parametrize(
        ("extras", "message"),
        [
            ({}, "needs landmarks in the example's extras: 'face_landmarks'"),
            ({FACE_LANDMARKS: [[1, 2]]}, r"example 'a': extras\['face_landmarks'\] has shape \(1, 2\)"),
            ({FACE_LANDMARKS: "left"}, r"extras\['face_landmarks'\] is no array of numbers"),
        ],
    )
    def test_what_is_missing_or_misshapen_is_named(self, extras, message):
        with pytest.raises(ScoringError, match=message):
            GivenDetector().detect(torch.zeros(1, 3, 8, 8), [known_in_picture(Example(id="a", extras=extras))])

    def test_one_entry_for_each_reference(self):
        example = Example(id="a", identity_refs=(torch.zeros(3, 8, 8),), extras={IDENTITY_LANDMARKS: [[], []]})
        with pytest.raises(ScoringError, match="has 2 entries for 1 identity references"):
            known_in_references(example)

    def test_a_detector_that_breaks_its_word(self):
        with pytest.raises(ScoringError, match=r"expected \(1, 4\), \(1,\) and \(1, 5, 2\)"):
            Faces(boxes_N4=torch.zeros(2, 4), scores_N=torch.zeros(1), landmarks_N52=torch.zeros(1, 5, 2))

        class Short(FaceDetector):
            def detect(self, pixels_B3HW: Tensor, known: Any) -> list[Faces]:
                return []

        with pytest.raises(ScoringError, match="Short answered for 0 pictures instead of 2"):
            linear_encoder(Short()).find(torch.zeros(2, 3, 8, 8), [None, None])


class FakeSession:
    """Answers with fixed arrays and keeps what it was asked."""

    def __init__(self, outputs: list[np.ndarray], shape: list[Any]) -> None:
        self.outputs, self.shape = outputs, shape
        self.asked: list[np.ndarray] = []

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name="picture", shape=self.shape)]

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name=str(i)) for i in range(len(self.outputs))]

    def run(self, output_names: Any, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        assert output_names is None
        self.asked.append(feeds["picture"])
        return self.outputs


def scrfd_session(boxes: Tensor, landmarks: Tensor, scores: list[float], side: int = 64) -> FakeSession:
    """What SCRFD would say for faces in the network's input, each told by a cell of another stride."""
    outputs: list[list[np.ndarray]] = [[], [], []]
    for level, stride in enumerate((8, 16, 32)):
        cells = side // stride
        score, box, points = np.zeros((2 * cells**2, 1)), np.zeros((2 * cells**2, 4)), np.zeros((2 * cells**2, 10))
        for index in range(level, len(scores), 3):
            row, column, anchor = 1, cells - 1, index % 2
            cell = 2 * (row * cells + column) + anchor
            centre = np.array([column * stride, row * stride])
            score[cell] = scores[index]
            box[cell] = np.concatenate([centre - boxes[index, :2].numpy(), boxes[index, 2:].numpy() - centre]) / stride
            points[cell] = ((landmarks[index].numpy() - centre) / stride).reshape(-1)
        for kind, array in zip(outputs, (score, box, points), strict=True):
            kind.append(array.astype(np.float32))
    return FakeSession([array for kind in outputs for array in kind], [1, 3, side, side])


class TestScrfd:
    BOXES = torch.tensor([[4.0, 6, 20, 24], [30, 2, 50, 26], [3, 5, 19, 25]])

    def test_faces_come_back_in_pixels_of_the_picture(self):
        landmarks = torch.rand(3, 5, 2, generator=rng()) * 30
        session = scrfd_session(self.BOXES, landmarks, [0.9, 0.6, 0.8])
        picture = torch.rand(3, 32, 128, generator=rng())  # fits at half its size
        (faces,) = Scrfd(session).detect(picture[None], [None])
        # The third is the first once more, less surely.
        assert torch.allclose(faces.boxes_N4, 2 * self.BOXES[:2], atol=1e-4)
        assert torch.allclose(faces.landmarks_N52, 2 * landmarks[:2], atol=1e-4)
        assert faces.scores_N.tolist() == pytest.approx([0.9, 0.6])
        (surer,) = Scrfd(session, confidence=0.7).detect(picture[None], [None])
        assert len(surer) == 1

    def test_what_the_network_sees(self):
        session = scrfd_session(self.BOXES, torch.zeros(3, 5, 2), [0, 0, 0])
        picture = torch.stack([torch.full((64, 32), level) for level in (0.0, 0.5, 1.0)])
        assert [len(faces) for faces in Scrfd(session).detect(picture[None], [None])] == [0]
        (seen,) = session.asked
        assert seen.shape == (1, 3, 64, 64)
        assert seen.dtype == np.float32
        for channel, level in enumerate((0.0, 0.5, 1.0)):
            assert np.allclose(seen[0, channel, :, :32], (255 * level - 127.5) / 128, atol=1e-5)
        assert np.allclose(seen[0, :, :, 32:], -127.5 / 128)

    def test_an_open_input_size_becomes_640(self):
        session = scrfd_session(self.BOXES, torch.zeros(3, 5, 2), [0, 0, 0])
        session.shape = [1, 3, "?", "?"]
        assert Scrfd(session).input_size == (640, 640)


class TestRetinaFace:
    def test_anchors(self):
        expected = [
            [(column + 0.5) * stride, (row + 0.5) * stride, side, side]
            for stride, sides in ((8, (16, 32)), (16, (64, 128)), (32, (256, 512)))
            for row in range(math.ceil(40 / stride))
            for column in range(math.ceil(100 / stride))
            for side in sides
        ]
        assert retinaface_anchors(40, 100).tolist() == expected

    def test_faces_are_read_relative_to_their_anchors(self):
        height, width = 40, 100
        anchors = retinaface_anchors(height, width)
        box, landmarks, index = torch.tensor([10.0, 4, 40, 30]), torch.rand(5, 2, generator=rng()) * 30, 7
        centre, side = anchors[index, :2], anchors[index, 2:]
        outputs = [torch.zeros(1, len(anchors), k) for k in (4, 2, 10)]
        outputs[0][0, index] = torch.cat(
            [((box[:2] + box[2:]) / 2 - centre) / (0.1 * side), ((box[2:] - box[:2]) / side).log() / 0.2]
        )
        outputs[1][0, index, 1] = 0.9
        outputs[1][0, index + 1, 1] = 0.7  # under UMO's 0.8
        outputs[2][0, index] = ((landmarks - centre) / (0.1 * side)).flatten()
        session = FakeSession([output.numpy() for output in outputs], [1, 3, "h", "w"])
        picture = torch.rand(1, 3, height, width, generator=rng())
        (faces,) = RetinaFace(session).detect(picture, [None])
        assert torch.allclose(faces.boxes_N4, box[None], atol=1e-4)
        assert torch.allclose(faces.landmarks_N52, landmarks[None], atol=1e-4)
        assert np.allclose(session.asked[0], retinaface_input(picture).permute(0, 3, 1, 2).numpy())

    def test_input_is_bgr_minus_the_mean(self):
        picture = torch.tensor([1.0, 0.5, 0.0])[None, :, None, None]
        assert retinaface_input(picture).flatten().tolist() == [0 - 104, 127.5 - 117, 255 - 123]


class TestSuppression:
    @given(st.integers(0, 12), st.integers(0, 10_000), st.sampled_from([0.2, 0.4, 0.7]))
    @settings(max_examples=40, deadline=None)
    def test_what_stays_does_not_overlap_and_what_goes_has_a_better_one(self, count, seed, overlap):
        corner = torch.rand(count, 2, generator=rng(seed)) * 20
        boxes = torch.cat([corner, corner + 2 + torch.rand(count, 2, generator=rng(seed + 1)) * 20], dim=1)
        scores = torch.rand(count, generator=rng(seed + 2))
        kept = suppress(boxes, scores, overlap).tolist()

        def iou(a: int, b: int) -> float:
            w = min(boxes[a, 2], boxes[b, 2]) - max(boxes[a, 0], boxes[b, 0]) + 1
            h = min(boxes[a, 3], boxes[b, 3]) - max(boxes[a, 1], boxes[b, 1]) + 1
            area = [float((box[2] - box[0] + 1) * (box[3] - box[1] + 1)) for box in (boxes[a], boxes[b])]
            common = max(float(w), 0) * max(float(h), 0)
            return common / (sum(area) - common)

        assert scores[kept].tolist() == sorted(scores[kept].tolist(), reverse=True)
        assert all(iou(a, b) <= overlap + 1e-6 for a, b in itertools.combinations(kept, 2))
        for gone in set(range(count)) - set(kept):
            assert any(iou(gone, best) > overlap - 1e-6 and scores[best] >= scores[gone] for best in kept)


class TestOpenDetector:
    @pytest.fixture
    def runtime(self, monkeypatch, tmp_path) -> dict[str, Any]:
        """A stand-in for onnxruntime that opens every file as a session with this many outputs."""
        made: dict[str, Any] = {"outputs": 9}

        def session(path: str, providers: list[str]) -> FakeSession:
            if made["outputs"] is None:
                raise RuntimeError("Protobuf parsing failed.\nmore")
            return FakeSession([np.zeros(1)] * made["outputs"], [1, 3, 64, 64])

        module = ModuleType("onnxruntime")
        module.InferenceSession = session  # type: ignore[attr-defined]
        module.get_available_providers = lambda: ["CPUExecutionProvider"]  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "onnxruntime", module)
        (tmp_path / "net.onnx").write_bytes(b"onnx")
        return made

    def test_given(self):
        assert isinstance(open_detector("given"), GivenDetector)
        with pytest.raises(ConfigError, match="confidence: the detector 'given' has none"):
            open_detector("given", confidence=0.5)

    def test_the_kind_is_told_by_the_outputs(self, runtime, tmp_path):
        path = str(tmp_path / "net.onnx")
        for count, kind, confidence in ((9, Scrfd, 0.5), (15, Scrfd, 0.5), (3, RetinaFace, 0.8)):
            runtime["outputs"] = count
            detector = open_detector(path)
            assert isinstance(detector, kind)
            assert detector.confidence == confidence
        detector = open_detector(path, confidence=0.3)
        assert isinstance(detector, RetinaFace)
        assert detector.confidence == 0.3
        runtime["outputs"] = 6
        with pytest.raises(CheckpointError, match=r"net\.onnx has 6 outputs"):
            open_detector(path)
        runtime["outputs"] = None
        with pytest.raises(
            CheckpointError, match=r"net\.onnx cannot be read by onnxruntime: Protobuf parsing failed\.$"
        ):
            open_detector(path)

    def test_without_onnxruntime_the_fix_is_named(self, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        (tmp_path / "net.onnx").write_bytes(b"onnx")
        with pytest.raises(ConfigError, match=r"pip install -e '\.\[faces\]'"):
            open_detector(str(tmp_path / "net.onnx"))

    def test_a_file_that_is_not_there(self):
        with pytest.raises(CheckpointError, match=r"nowhere\.onnx does not exist"):
            open_detector("nowhere.onnx")


class TestEncoder:
    def test_a_crop_is_the_pasted_person(self):
        encoder = linear_encoder()
        places = [(5, 9), (40, 30)]
        picture = scene([person(1), person(2)], places)
        (faces,) = encoder.find(picture[None], [landmarks_at(*places)])
        (drawn,) = encoder.embed(picture[None], [encoder.align(faces)])
        expected = torch.nn.functional.normalize(encoder.network(2 * torch.stack([person(1), person(2)]) - 1), dim=-1)
        assert torch.allclose(drawn, expected, atol=1e-6)

    def test_references_are_looked_at_once(self):
        encoder = linear_encoder()
        calls: list[int] = []
        encoder.network.register_forward_hook(lambda _m, args, _out: calls.append(len(args[0])))
        examples = [example_of([person(1), person(2)], [], id=str(i)) for i in range(3)]
        first = [encoder.references(example) for example in examples]
        assert calls == [1, 1]
        assert all(torch.equal(a, b) for refs in first for a, b in zip(refs, first[0], strict=True))
        encoder.references(example_of([person(1).clone()], []))
        assert calls == [1, 1]

    def test_another_content_shape_or_place_is_another_reference(self):
        encoder = linear_encoder()
        picture = scene([person(1), person(2)], [(0, 0), (20, 20)], (40, 48))

        def seen(pixels: Tensor, x: int, y: int) -> Tensor:
            return encoder.references(example_of([pixels], [], reference_places=[(x, y)]))[0]

        different = [seen(picture, 0, 0), seen(picture, 20, 20), seen(picture.reshape(3, 48, 40), 0, 0)]
        picture[0].mul_(0.5)
        different.append(seen(picture, 0, 0))
        assert all(not torch.allclose(a, b, atol=1e-3) for a, b in itertools.combinations(different, 2))

    def test_the_least_recently_used_reference_is_dropped(self, monkeypatch):
        monkeypatch.setattr(encoder_module, "CACHED_REFERENCES", 2)
        encoder = linear_encoder()
        calls: list[int] = []
        encoder.network.register_forward_hook(lambda _m, args, _out: calls.append(len(args[0])))
        for seed in (3, 4, 3, 5, 3):
            encoder.references(example_of([person(seed)], []))
        assert len(calls) == 3
        encoder.references(example_of([person(4)], []))
        assert len(calls) == 4

    def test_references_come_largest_first_and_without_gradient(self):
        encoder = linear_encoder()
        picture = scene([person(1), person(2)], [(0, 0), (20, 20)], (64, 64)).requires_grad_()
        large = landmarks_at((20, 20)) * 1.5
        example = Example(
            id="a",
            identity_refs=(picture,),
            extras={IDENTITY_LANDMARKS: [torch.cat([landmarks_at((0, 0)), large])]},
        )
        with torch.inference_mode():
            (both,) = encoder.references(example)
        assert not both.requires_grad
        assert not both.is_inference()
        (own,) = encoder.embed(picture.detach()[None], [encoder.align(encoder.find(picture[None], [large])[0])])
        assert torch.allclose(both[0], own[0])

    def test_it_is_frozen_and_stays_in_evaluation_mode(self):
        encoder = FaceEncoder(GivenDetector(), tiny_iresnet().train(), crop_size=CROP).train()
        assert not encoder.network.training
        assert not any(p.requires_grad for p in encoder.parameters())

    def test_autocast_does_not_coarsen_embeddings(self):
        encoder = FaceEncoder(GivenDetector(), tiny_iresnet(), crop_size=CROP)
        pixels, matrices = scene([person(1)], [(4, 4)]).float()[None], [turned(1, 0, -4, -4)[None]]
        (expected,) = encoder.embed(pixels, matrices)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(encoder.embed(pixels, matrices)[0], expected)
        assert expected.dtype == torch.float32
        assert float(expected.norm()) == pytest.approx(1, abs=1e-6)

    def test_landmarks_that_allow_no_alignment_are_no_face(self):
        known = torch.cat([landmarks_at((4, 4)), torch.full((1, 5, 2), 9.0), landmarks_at((8, 8)) * torch.nan])
        (faces,) = linear_encoder().find(torch.zeros(1, 3, 64, 64), [known])
        assert len(faces) == 1

    def test_a_crop_without_direction_gives_a_bounded_gradient(self):
        pixels = torch.full((1, 3, CROP, CROP), 0.5, dtype=torch.float64, requires_grad=True)
        (drawn,) = linear_encoder().embed(pixels, [turned(1, 0, 0, 0)[None]])
        (grad,) = torch.autograd.grad(drawn.sum(), pixels)
        assert float(grad.norm()) < 1e6


class TestWindows:
    @pytest.mark.parametrize("size", [(64, 64), (40, 72), (100, 33), (1024, 768)])
    def test_they_lie_inside_and_each_size_covers_the_picture(self, size):
        boxes = windows(*size)
        assert bool((boxes[:, :2] >= -1e-9).all())
        assert bool((boxes[:, 2] <= size[1] - 1 + 1e-9).all())
        assert bool((boxes[:, 3] <= size[0] - 1 + 1e-9).all())
        sides = boxes[:, 2:] - boxes[:, :2] + 1
        assert torch.allclose(sides[:, 0], sides[:, 1])
        for side in sides[:, 0].round(decimals=6).unique():
            chosen = boxes[(sides[:, 0] - side).abs() < 1e-3]
            for axis, length in ((0, size[1]), (1, size[0])):
                starts = chosen[:, axis].unique()
                assert float(starts[0]) == 0
                assert float(starts[-1]) == pytest.approx(length - float(side))
                assert bool((starts.diff() <= float(side) / 2 + 1e-6).all())

    def test_how_many(self):
        assert len(windows(64, 64)) == 1 + 9 + 49
        assert len(windows(1, 1)) == 0

    def test_untouched(self):
        boxes = torch.tensor([[0.0, 0, 9, 9], [10, 10, 19, 19], [9, 9, 12, 12]])
        assert untouched(boxes, torch.tensor([[2.0, 2, 5, 5]])).tolist() == [False, True, True]
        assert untouched(boxes, torch.tensor([[9.0, 0, 30, 9]])).tolist() == [False, True, False]
        assert untouched(boxes, torch.tensor([[5.0, 12, 8.2, 15]])).tolist() == [True, True, False]
        assert untouched(boxes, torch.zeros(0, 4)).tolist() == [True] * 3

    def test_a_window_becomes_the_whole_crop(self):
        picture = torch.rand(1, 3, 32, 48, generator=rng(), dtype=torch.float64)
        box = torch.tensor([[8.0, 4, 23, 19]], dtype=torch.float64)
        crop = warp(picture, [window_transforms(box, CROP)], CROP)
        assert torch.allclose(crop[0], picture[0, :, 4:20, 8:24])


class TestMetrics:
    def test_id_sim(self):
        assert id_sim(torch.tensor([[0.25, 0.5], [-0.5, -0.25]])).tolist() == [50, -25]
        assert id_sim(torch.zeros(2, 0)).tolist() == [0, 0]

    def test_id_conf(self):
        similarity = torch.tensor([[0.8, 0.2, 0.1], [0.6, -0.3, -0.5], [-0.1, -0.2, -0.3], [0.5, 0.5, 0.1]])
        assert id_conf(similarity) == pytest.approx([0.75, 1, 0, 0], abs=1e-6)
        assert id_conf(similarity[:, :1]) == [None] * 4
        assert id_conf(similarity[:, :0]) == [None] * 4

    @given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 1000))
    @settings(max_examples=30, deadline=None)
    def test_they_do_not_depend_on_order(self, m, n, seed):
        similarity = torch.rand(m, n, generator=rng(seed)) * 2 - 1
        rows, columns = torch.randperm(m, generator=rng(seed)), torch.randperm(n, generator=rng(seed))
        shuffled = similarity[rows][:, columns]
        assert torch.equal(id_sim(shuffled), id_sim(similarity)[rows])
        assert id_conf(shuffled) == [id_conf(similarity)[row] for row in rows.tolist()]
        report, turned_report = identity_report([similarity]), identity_report([shuffled])
        assert (report.coverage, report.missing_faces) == (turned_report.coverage, turned_report.missing_faces)
        assert all(value is None or 0 <= value <= 1 for value in id_conf(similarity))

    def test_the_report_counts_what_the_means_leave_out(self):
        report = identity_report(
            [
                torch.tensor([[0.8, 0.4]]),  # one face more
                torch.tensor([[0.5], [0.1], [0.0]]),  # two faces short
                torch.zeros(1, 0),  # nobody there
                torch.zeros(0, 4),  # nobody wanted
            ]
        )
        assert report.id_sim == pytest.approx((80 + 50 + 10 + 0 + 0) / 5, abs=1e-4)
        assert report.id_conf == pytest.approx(50, abs=1e-4)
        assert report.coverage == pytest.approx(1 / 5)
        assert (report.missing_faces, report.extra_faces) == (3, 1)
        assert (report.num_references, report.num_pictures) == (5, 3)

    def test_nothing_to_average(self):
        report = identity_report([torch.zeros(0, 2)])
        assert (report.id_sim, report.id_conf, report.coverage, report.num_pictures) == (None, None, None, 0)
