"""Preprocessing against PIL itself, and its gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data
from torch import Tensor

from rewardgen.rewards.preprocess import clamp_straight_through, normalise, resize_centre_crop, straight_through

PHOTOS = {"square": data.astronaut, "wide": data.coffee, "small": data.chelsea}


def to_tensor(picture: np.ndarray) -> Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255


def pil_resize_crop(picture: Image.Image, size: int, in_two_steps: bool = False) -> np.ndarray:
    """torchvision's Resize(size) and CenterCrop(size) on a PIL picture."""
    width, height = picture.size
    if width <= height:
        width, height = size, int(size * height / width)
    else:
        width, height = int(size * width / height), size
    left, top = round((width - size) / 2), round((height - size) / 2)
    if in_two_steps:
        # Pillow before 13 resizes rows first; later ones do so only if the picture is not tall.
        picture = picture.resize((width, picture.height), Image.Resampling.BICUBIC)
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    return np.array(resized.crop((left, top, left + size, top + size)))


def pil_float(picture: np.ndarray, size: int) -> Tensor:
    planes = [Image.fromarray(picture[..., c].astype(np.float32) / 255) for c in range(3)]
    return torch.from_numpy(np.stack([pil_resize_crop(plane, size) for plane in planes]))[None]


def pil_8bit(picture: np.ndarray, size: int, in_two_steps: bool = False) -> Tensor:
    return torch.from_numpy(pil_resize_crop(Image.fromarray(picture), size, in_two_steps)).permute(2, 0, 1)[None]


@pytest.mark.parametrize("size", [600, 224, 64])
@pytest.mark.parametrize("photo", PHOTOS)
class TestPhotographs:
    def test_equal_to_pil_on_float_pictures(self, photo, size):
        picture = PHOTOS[photo]()
        assert (resize_centre_crop(to_tensor(picture), size) - pil_float(picture, size)).abs().max() < 1e-5

    def test_equal_to_pil_on_8bit_pictures_when_rounding(self, photo, size):
        picture = PHOTOS[photo]()
        levels = resize_centre_crop(to_tensor(picture), size, round_8bit=True) * 255
        assert torch.equal(levels.round().byte(), pil_8bit(picture, size))
        assert (levels - levels.round()).abs().max() < 1e-4


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 24), st.integers(0, 10_000))
def test_equal_to_pil_at_any_size(height, width, size, seed):
    picture = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert (resize_centre_crop(to_tensor(picture), size) - pil_float(picture, size)).abs().max() < 1e-5
    rounded = resize_centre_crop(to_tensor(picture), size, round_8bit=True) * 255
    assert torch.equal(rounded.round().byte(), pil_8bit(picture, size, in_two_steps=True))


def test_a_picture_of_the_right_size_is_left_as_it_is():
    pixels = torch.rand(2, 3, 16, 16)
    assert torch.equal(resize_centre_crop(pixels, 16), pixels)


def test_gradient_matches_finite_differences():
    pixels = torch.rand(1, 1, 9, 13, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: resize_centre_crop(x, 5), pixels)
    assert torch.autograd.gradcheck(lambda x: resize_centre_crop(x, 14), pixels)


def test_rounding_keeps_the_gradient_of_the_smooth_path():
    probe = torch.randn(2, 3, 8, 8)
    grads = []
    for round_8bit in (False, True):
        pixels = torch.rand(2, 3, 20, 17, generator=torch.Generator().manual_seed(0)).requires_grad_()
        (resize_centre_crop(pixels, 8, round_8bit=round_8bit) * probe).sum().backward()
        grads.append(pixels.grad)
    assert grads[0].abs().max() > 0
    assert torch.equal(*grads)


def test_half_precision_and_autocast_do_not_coarsen_the_resize():
    pixels = torch.rand(1, 3, 32, 32)
    expected = resize_centre_crop(pixels, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(resize_centre_crop(pixels, 20), expected)
    coarse = pixels.bfloat16()
    assert torch.equal(resize_centre_crop(coarse, 20), resize_centre_crop(coarse.float(), 20))


def test_weights_made_in_inference_mode_serve_gradients_later():
    with torch.inference_mode():
        resize_centre_crop(torch.rand(1, 3, 19, 23), 11)
    pixels = torch.rand(1, 3, 19, 23, requires_grad=True)
    resize_centre_crop(pixels, 11).sum().backward()
    assert pixels.grad is not None


@pytest.mark.parametrize("pixels", [torch.rand(3, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)])
def test_other_tensors_are_refused(pixels):
    with pytest.raises(ValueError, match="expected floating-point pictures"):
        resize_centre_crop(pixels, 4)


def test_normalise_is_per_channel():
    pixels = torch.rand(2, 3, 4, 5)
    result = normalise(pixels, (0.1, 0.2, 0.3), (0.5, 1.0, 2.0))
    assert torch.allclose(result[:, 2], (pixels[:, 2] - 0.3) / 2)
    assert torch.allclose(result[:, 0], (pixels[:, 0] - 0.1) / 0.5)


def test_straight_through_takes_the_value_exactly_and_the_gradient_of_the_other():
    value, source = torch.rand(50) * 1e4, torch.rand(50, requires_grad=True)
    result = straight_through(value, source * 3)
    result.sum().backward()
    assert torch.equal(result, value)
    assert torch.equal(source.grad, torch.full((50,), 3.0))


def test_clamping_keeps_gradients_outside_the_range():
    pixels = torch.tensor([-0.5, 0.25, 1.5], requires_grad=True)
    result = clamp_straight_through(pixels)
    result.sum().backward()
    assert result.tolist() == [0.0, 0.25, 1.0]
    assert pixels.grad.tolist() == [1.0, 1.0, 1.0]
